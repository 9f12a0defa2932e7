"""Reads the frozen nvcc's log: which kernels were missed, how often, and what to do about each.

A log comes from machines that serve models, perhaps through several hands. Only names and paths in the form that the
frozen nvcc writes are taken from it.
"""

from __future__ import annotations

import contextlib
import os
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cachebuilder.artifact.whole import open_file
from cachebuilder.common.folders import Folder, is_safe
from cachebuilder.common.records import Record
from cachebuilder.deepgemm.source import Shape, is_deep_gemms, kernel_template, read_shape
from cachebuilder.restoring import miss_log
from cachebuilder.restoring.compatibility import Difference
from cachebuilder.restoring.near_misses import NOT_COMPARED, Caches, Comparison, Request

#: The largest generated source is a page long.
_MAX_SOURCE_BYTES = 1 << 20
#: What to do about a kernel of another library that takes the frozen nvcc for the toolkit's.
FOREIGN = (
    "do not add it: it is not DeepGEMM's, since it includes none of its headers. Another library took this nvcc from "
    "CUDA_HOME or PATH: give it a real one, or turn its compilation off"
)


#: N and K in the source of a kernel of FlashInfer's GEMM (``compiler.cuh``, FlashInfer 0.6.13).
_FLASHINFER_GEMM = re.compile(r"&fp8_gemm_kernel(?:_swapAB)?<(\d{1,7}), (\d{1,7}),")


class Miss(Record):
    """A kernel that was asked for and not found.

    Attributes:
        kernel: the name of its template, or the name in the log.
        count: requests in the log.
        first, last: seconds since 1970, UTC; null where the log has no time.
        artifacts: names of the artifacts that lacked it.
        shape: what its source says; null where the source says none.
        advice: what to add to the manifest, or why there is nothing to add.
        source: the text of ``kernel.cu``; null where no copy of it was kept.
        folder: the restored folder that it was compared with; null where that was not found.
        entry: the folder's entry with the same source, which another key leads to; null where there is none.
        differences: how the requests differ from what the folder's kernels were built with.
    """

    kernel: str
    count: int
    first: int | None
    last: int | None
    artifacts: tuple[str, ...]
    shape: Shape | None
    advice: str
    source: str | None
    folder: str | None = None
    entry: str | None = None
    differences: tuple[Difference, ...] = ()

    @property
    def can_be_added(self) -> bool:
        """Whether a build may help: it is DeepGEMM's kernel, and the cache has its source under no key."""
        return self.entry is None and self.advice != FOREIGN and not flashinfer_advice(self.source)

    def occurrences(self) -> str:
        """How often and when, as ``2 times, 2026-01-01 10:00:00Z to 2026-01-02 08:30:00Z``."""
        first, last = _time_text(self.first), _time_text(self.last)
        times = "1 time" if self.count == 1 else f"{self.count} times"
        return f"{times}, {first}" if first == last else f"{times}, {first} to {last}"


class Log(Record):
    """A whole log, the kernel missed most often first. Lines that are not the frozen nvcc's are only counted."""

    unreadable_lines: int
    misses: tuple[Miss, ...]

    def requests(self) -> int:
        """Requests in all."""
        return sum(miss.count for miss in self.misses)


def read(*paths: Path, dir: Path | None = None) -> Log:
    """The logs at ``paths``, grouped by kernel source; lines without a source are grouped by the kernel's name.

    Args:
        dir: the restored folder that was served from; default: the one that the log is in, or that its lines name.

    Raises:
        ArtifactError: one of them cannot be read, or ``dir`` is no restored folder.
    """
    caches = Caches(dir)
    groups: dict[tuple[str, str | None, Comparison], list[dict[str, Any]]] = {}
    unreadable_lines = 0
    for path in paths:
        with open_file(path) as file:
            owner = os.fstat(file.fileno()).st_uid
            for line in miss_log.lines(file, path):
                if line is None:
                    unreadable_lines += 1
                    continue
                source = _read_source(line.get("source"), path, owner)
                name = (kernel_template(source) if source else None) or miss_log.kernel_of(line) or miss_log.UNKNOWN
                of_flashinfer = flashinfer_advice(source) is not None  # its names are made otherwise
                request = Request.of(line.get("command"))
                comparison = NOT_COMPARED if of_flashinfer else caches.compare(path, request, source)
                groups.setdefault((name.removesuffix("_impl"), source, comparison), []).append(line)
    misses = [_miss(*key, lines) for key, lines in groups.items()]
    misses.sort(key=lambda miss: (-miss.count, miss.kernel, miss.source or ""))
    return Log(unreadable_lines=unreadable_lines, misses=tuple(misses))


def _read_source(name: object, log: Path, owner: int) -> str | None:
    """The kept copy of a source: at the path in the log, else in the log's own folder, if both were moved.

    The copy must be a ``.cu`` file in a folder named ``….d`` and no link, so that no line of a log can bring another
    file into a manifest. Nobody but the log's owner, this user and root may be able to change it.
    """
    if not isinstance(name, str) or "\0" in name or not Path(name).parent.name.endswith(".d"):
        return None
    for path in (Path(name), log.with_name(f"{log.name}.d") / Path(name).name):
        if path.suffix != ".cu":
            continue
        with contextlib.suppress(OSError), Folder.at(path.parent.parent) as beside, beside.open(path.parent.name) as d:
            data = d.read(path.name, _MAX_SOURCE_BYTES)
            if is_safe(d.status(), owner) and is_safe(d.status(path.name), owner):
                return data.decode(errors="replace")
    return None


def _miss(name: str, source: str | None, comparison: Comparison, lines: list[dict[str, Any]]) -> Miss:
    times = [seconds for line in lines if (seconds := miss_log.time_of(line)) is not None]
    of_flashinfer = flashinfer_advice(source)
    shape = read_shape(source) if source and not of_flashinfer else None
    own_advice = FOREIGN if source and not is_deep_gemms(source) else advice(shape)
    return Miss(
        kernel=name,
        count=len(lines),
        first=min(times, default=None),
        last=max(times, default=None),
        artifacts=tuple(sorted({artifact for line in lines if (artifact := miss_log.artifact_of(line))})),
        shape=shape,
        advice=of_flashinfer or comparison.advice() or own_advice,
        source=source,
        folder=comparison.folder,
        entry=comparison.entry,
        differences=comparison.differences,
    )


def _time_text(seconds: int | None) -> str:
    if seconds is None:
        return "at an unknown time"
    try:
        return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%SZ")
    except (OverflowError, OSError, ValueError):
        return f"at {seconds} s"


def flashinfer_advice(source: str | None) -> str | None:
    """What to add to the manifest for a kernel of FlashInfer's GEMM; None where the source is another kernel's."""
    if (match := _FLASHINFER_GEMM.search(source or "")) is None:
        return None
    return f"FlashInfer's GEMM asked for it: under flashinfer: gemms:, add - {{n: {match[1]}, k: {match[2]}}}"


def advice(shape: Shape | None) -> str:
    """What to add to the manifest for a missed kernel; a ``?`` stands for what its source does not say."""
    if shape is None:
        return (
            "its source names no shape: cachebuilder verify shows which call of your manifest needs it; if none does, "
            "the manifest lacks an op"
        )
    if shape.op is None:
        return (
            f"its source names no op ({shape.gemm_type}): build the kernel itself, with --add-to, or look for the op "
            "in cachebuilder's list of entry points"
        )
    fields: dict[str, object] = {"op": shape.op}
    if shape.experts is not None:
        fields["experts"] = shape.experts
        fields["max_m" if shape.op.endswith("_masked") else "topk"] = None
    fields |= {"n": shape.n, "k": shape.k}
    text = ", ".join(f"{name}: {'?' if value is None else value}" for name, value in fields.items())
    return f"- {{{text}}}"
