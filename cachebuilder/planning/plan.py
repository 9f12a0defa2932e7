"""The plan: every kernel that DeepGEMM will ask for, and which points of which op select it."""

from __future__ import annotations

import re

from cachebuilder.common.records import Record
from cachebuilder.cuda.gpus import Gpu
from cachebuilder.deepgemm import source as sources
from cachebuilder.deepgemm.generation import Generation
from cachebuilder.planning.selection import Selection


class Kernel(Record):
    """One kernel to compile.

    Attributes:
        entry: the folder's name in DeepGEMM's cache, which is the key.
        name: DeepGEMM's name for the kernel's family.
        source: the text of ``kernel.cu``.
        flags: nvcc's flags, without source, output and include paths.
        metadata: ``meta.json`` with no path of this machine in it (DeepJIT only).
        selected_by: every op and point that launches it; none for a kernel of the manifest's `sources`.
    """

    entry: str
    name: str
    source: str
    flags: tuple[str, ...]
    metadata: str | None = None
    selected_by: tuple[Selection, ...]

    @property
    def family(self) -> tuple[str | None, str | None]:
        """The template that it instantiates and its GemmType: what DeepGEMM names a kernel by."""
        return sources.family(self.source)

    @property
    def arch(self) -> str | None:
        """The architecture in its flags, as ``sm_90a``."""
        match = re.search(r"(?:^|\s)--gpu-architecture=(sm_\w+)(?:\s|$)", " ".join(self.flags))
        return match[1] if match else None


class Plan(Record):
    """All kernels of a manifest for one DeepGEMM and one compiler.

    Attributes:
        sm_counts: all at which any op was swept, ascending.
        arch: as nvcc names it, ``sm_90a``.
        include: legacy only: the include path that is part of every key, as DeepGEMM wrote it.
        legacy_flags: legacy only: the flags as DeepGEMM joins them for its keys.
        ops: the manifest's, dumped.
        calls: how often DeepGEMM was called to find this out.
        torch, python, peak_bytes: recorded of the sweep; they bind nothing.
    """

    generation: Generation
    gpu: Gpu
    sm_counts: tuple[int, ...]
    arch: str
    include: str | None = None
    legacy_flags: str | None = None
    ops: tuple[dict[str, object], ...]
    kernels: tuple[Kernel, ...]
    calls: int
    torch: str
    python: str
    peak_bytes: int
