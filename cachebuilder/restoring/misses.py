"""The frozen nvcc's log, read: which kernels were missed, how often, and what to add to the manifest.

A log comes from where models are served, perhaps by way of others: what it names is taken only in the shapes that the
frozen nvcc writes.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cachebuilder.deepgemm.source import Shape, kernel_template, read_shape
from cachebuilder.errors import ArtifactError

#: A line longer than this is none of ours: the frozen nvcc keeps its own under 4 KiB.
_MAX_LINE_BYTES = 64 << 10
#: The largest generated source is a page long.
_MAX_SOURCE_BYTES = 1 << 20
_KERNEL = re.compile(r"[A-Za-z0-9_:]{1,200}")
_ARTIFACT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True)
class Miss:
    """One kernel that was asked for and not found.

    Attributes:
        kernel: the name of its template, or what the log says.
        count: requests in the log.
        first, last: seconds since 1970, UTC; None where the log has no time.
        artifacts: names of the artifacts that lacked it.
        source: the text of ``kernel.cu``; None where no copy of it was kept.
        shape: what the source says; None where that cannot be told.
    """

    kernel: str
    count: int
    first: int | None
    last: int | None
    artifacts: tuple[str, ...]
    source: str | None
    shape: Shape | None


@dataclass(frozen=True)
class Log:
    """A whole log: the kernels, most often missed first, and how many lines were none of ours."""

    misses: tuple[Miss, ...]
    unreadable: int


def read(path: Path) -> Log:
    """The log at ``path``, grouped by kernel source; lines without a source are grouped by the kernel's name.

    Raises:
        ArtifactError: it cannot be read.
    """
    groups: dict[tuple[str, str | None], list[dict[str, Any]]] = {}
    unreadable = 0
    try:
        with path.open("rb") as file:
            while data := file.readline(_MAX_LINE_BYTES):
                if not data.strip():
                    continue
                line = _parse(data)
                if line is None:
                    unreadable += 1
                    continue
                source = _source(line.get("source"), path)
                name = (kernel_template(source) if source else None) or _said(line, "kernel", _KERNEL) or "unknown"
                groups.setdefault((name.removesuffix("_impl"), source), []).append(line)
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be read: {error.strerror}") from error
    misses = [_miss(name, source, lines) for (name, source), lines in groups.items()]
    misses.sort(key=lambda miss: (-miss.count, miss.kernel, miss.source or ""))
    return Log(tuple(misses), unreadable)


def _parse(data: bytes) -> dict[str, Any] | None:
    try:
        line = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return line if isinstance(line, dict) and "kernel" in line else None


def _said(line: dict[str, Any], field: str, form: re.Pattern[str]) -> str | None:
    """A field of a line, where it has the form of the frozen nvcc's."""
    value = line.get(field)
    return value if isinstance(value, str) and form.fullmatch(value) else None


def _source(name: object, log: Path) -> str | None:
    """The kept copy of a source: where the log says, else in the log's own folder, if both were moved.

    Only a ``.cu`` in a folder named ``….d``, and no link: no line makes this read another file into a manifest.
    """
    if not isinstance(name, str) or "\0" in name or not Path(name).parent.name.endswith(".d"):
        return None
    for path in (Path(name), log.with_name(f"{log.name}.d") / Path(name).name):
        try:
            if path.suffix != ".cu" or path.is_symlink():
                continue
            if path.is_file() and path.stat().st_size <= _MAX_SOURCE_BYTES:
                return path.read_text(errors="replace")
        except OSError:
            continue
    return None


def _miss(name: str, source: str | None, lines: list[dict[str, Any]]) -> Miss:
    times = [line["time"] for line in lines if type(line.get("time")) is int]
    return Miss(
        kernel=name,
        count=len(lines),
        first=min(times, default=None),
        last=max(times, default=None),
        artifacts=tuple(sorted({said for line in lines if (said := _said(line, "artifact", _ARTIFACT))})),
        source=source,
        shape=read_shape(source) if source else None,
    )


def advice(shape: Shape | None) -> str:
    """What to add to the manifest for a missed kernel; a ``?`` stands for what its source does not say."""
    if shape is None:
        return (
            "its source does not tell a shape: see with cachebuilder verify which call of your manifest needs it; "
            "if none does, an op is missing from it"
        )
    if shape.op is None:
        return (
            f"its op cannot be told from its source ({shape.gemm_type}): build the kernel itself, with --add-to, or "
            "look for the op in cachebuilder's list of entry points"
        )
    fields: dict[str, object] = {"op": shape.op}
    if shape.experts is not None:
        fields["experts"] = shape.experts
        fields["max_m" if shape.op.endswith("_masked") else "topk"] = None
    fields |= {"n": shape.n, "k": shape.k}
    text = ", ".join(f"{name}: {'?' if value is None else value}" for name, value in fields.items())
    return f"- {{{text}}}"
