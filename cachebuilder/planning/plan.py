"""The plan: every kernel that DeepGEMM will ask for, and the points of the ops that select it."""

from __future__ import annotations

import re
from typing import Any

from pydantic import SerializerFunctionWrapHandler, model_serializer

from cachebuilder.common.records import Record
from cachebuilder.cuda.gpus import Gpu
from cachebuilder.deepgemm import source as sources
from cachebuilder.deepgemm.generation import Generation
from cachebuilder.planning.selection import Selection


class Kernel(Record):
    """One kernel to compile.

    Attributes:
        entry: the name of its folder in DeepGEMM's cache, which holds the key.
        name: DeepGEMM's name for the kernel's family.
        source: the text of ``kernel.cu``.
        flags: nvcc's flags, without source, output and include paths.
        metadata: ``meta.json`` without the paths of this machine (DeepJIT only).
        selected_by: every op and point that launches the kernel; empty for a kernel of the manifest's `sources`.
    """

    entry: str
    name: str
    source: str
    flags: tuple[str, ...]
    metadata: str | None = None
    selected_by: tuple[Selection, ...]

    @property
    def family(self) -> tuple[str | None, str | None]:
        """The template that the source instantiates and its GemmType, as `deepgemm.source.family` returns them."""
        return sources.family(self.source)

    @property
    def arch(self) -> str | None:
        """The architecture in the flags, such as ``sm_90a``; None if they name none."""
        match = re.search(r"(?:^|\s)--gpu-architecture=(sm_\w+)(?:\s|$)", " ".join(self.flags))
        return match[1] if match else None


class FlashInferPlan(Record):
    """What FlashInfer would compile at run time.

    Attributes:
        arch: as nvcc names it, for example ``sm_90a``.
        modules: the modules to build, by name.
        gemms: the manifest's shapes, as JSON objects.
        kernels: the kernels that the GEMM asks for. ``selected_by`` counts the shapes as it counts a manifest's ops.
        calls: how often the sweep called FlashInfer.
    """

    arch: str
    modules: tuple[str, ...]
    gemms: tuple[dict[str, object], ...]
    kernels: tuple[Kernel, ...]
    calls: int


class Plan(Record):
    """All kernels of a manifest for one DeepGEMM and one compiler.

    Attributes:
        sm_counts: the SM counts at which any op was swept, ascending.
        arch: as nvcc names it, for example ``sm_90a``.
        include: legacy only: the include path that is part of every key, as DeepGEMM wrote it.
        legacy_flags: legacy only: the flags as DeepGEMM joins them for its keys.
        ops: the manifest's ops, as JSON objects.
        calls: how often the sweep called DeepGEMM.
        torch, python, peak_bytes: the versions and the peak memory of the sweep, for information only.
        flashinfer: None where the manifest needs nothing of FlashInfer.
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
    flashinfer: FlashInferPlan | None = None

    @model_serializer(mode="wrap")
    def _without_unset_flashinfer(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out what most plans do not have."""
        fields: dict[str, Any] = dump(self)
        if fields.get("flashinfer", ...) is None:
            del fields["flashinfer"]
        return fields
