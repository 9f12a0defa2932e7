"""Turn what DeepGEMM asked its compiler for during a sweep into the plan's kernels."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence

from cachebuilder.deepgemm import entries as entry_files
from cachebuilder.deepgemm.command import Command
from cachebuilder.errors import PlanError
from cachebuilder.manifest.inputs import Inputs
from cachebuilder.planning.plan import Kernel
from cachebuilder.planning.selection import Range, Selection
from cachebuilder.sweep.protocol import OpSweep
from cachebuilder.sweep.recorder import RecordedEntry
from cachebuilder.sweep.run import Result


class Requests:
    """What DeepGEMM asked its compiler for in a sweep.

    Attributes:
        kernels: every kernel that was asked for: those of the ops and of the check that runs before the ops.
        planned: those that the manifest's ops launch.
        legacy_flags: legacy only: the flags as DeepGEMM joins them for its keys.

    Raises:
        PlanError: two kernels of one family have different flags, or a command has an include path that is not
            DeepGEMM's own.
    """

    def __init__(self, inputs: Inputs, swept: Result) -> None:
        entries = swept.entries | swept.checked
        include, deep_gemm = str(inputs.installation.include), str(inputs.installation.imported_as)
        selected_by = selections(swept.answer.sweeps)
        self.kernels = [
            Kernel(
                entry=entry.name,
                name=entry.kernel_name,
                source=entry.source,
                flags=flags_of(entry, include),
                metadata=_portable_metadata(entry, str(swept.cache_root), deep_gemm),
                selected_by=selected_by.get(entry.name, ()),
            )
            for entry in entries.values()
        ]
        self.planned = [kernel for kernel in self.kernels if kernel.entry in swept.entries]
        legacy = inputs.installation.generation == "legacy"
        self.legacy_flags = _legacy_flags(next(iter(entries.values()))) if legacy else None
        _check_flags(self.kernels)


def flags_of(entry: RecordedEntry, include: str) -> tuple[str, ...]:
    """The flags of a recorded command, without source, output and DeepGEMM's own include path.

    Raises:
        PlanError: the command has another include path.
    """
    command = Command.parse(entry.arguments)
    if foreign := [path for path in command.includes if path != include]:
        raise PlanError(f"{entry.name}: wanted no include path except {include}, found {' '.join(foreign)}")
    return command.flags


def _legacy_flags(entry: RecordedEntry) -> str:
    """The flags as legacy DeepGEMM hashes them: everything after the output file in its command."""
    return entry.arguments.split(" -o ", 1)[1].split(" ", 1)[1]


def selections(sweeps: Sequence[OpSweep]) -> dict[str, tuple[Selection, ...]]:
    """Where each entry is launched, by entry. Adjacent ranges are joined."""
    selected_by: dict[str, list[Selection]] = {}
    for swept in sweeps:
        ranges_of: dict[str, list[Range]] = {}
        for span in swept.spans:
            for entry in dict.fromkeys(span.entries):
                ranges = ranges_of.setdefault(entry, [])
                first = span.first
                if ranges and ranges[-1].last + span.step == first:
                    first = ranges.pop().first
                ranges.append(Range(first=first, last=span.last, step=span.step))
        for entry, ranges in ranges_of.items():
            selection = Selection(op=swept.op, sm_count=swept.sm_count, ranges=tuple(ranges))
            selected_by.setdefault(entry, []).append(selection)
    return {entry: tuple(selected) for entry, selected in selected_by.items()}


def _check_flags(kernels: Iterable[Kernel]) -> None:
    """Raise `PlanError` if two kernels of one family have different flags."""
    first_of: dict[str, Kernel] = {}
    for kernel in kernels:
        first = first_of.setdefault(kernel.name, kernel)
        if kernel.flags != first.flags:
            raise PlanError(
                f"{kernel.entry}: wanted the same flags as for {first.entry}, a kernel of the same family: "
                f"{' '.join(first.flags)}; found {' '.join(kernel.flags)}"
            )


def _portable_metadata(entry: RecordedEntry, cache_root: str, deep_gemm: str) -> str | None:
    """DeepJIT's ``meta.json`` without the paths of this machine. DeepJIT writes the file and never reads it."""
    if entry.metadata is None:
        return None
    source = entry.arguments.split(" ", 1)[0]  # <root>/tmp/<uuid>/kernel.cu
    text = entry.metadata.replace(source.removesuffix(entry_files.SOURCE), "")
    text = text.replace(f"{cache_root.removesuffix('/root')}/cuda/bin/", "").replace(deep_gemm, "deep_gemm")
    return json.dumps(json.loads(text), separators=(",", ":"))
