"""Plan what FlashInfer would compile at run time: its modules, and the kernels that its GEMM asks for."""

from __future__ import annotations

import re
from collections.abc import Mapping

from cachebuilder.errors import PlanError
from cachebuilder.flashinfer.entries import GEMM_MODULE
from cachebuilder.manifest.inputs import Inputs
from cachebuilder.planning.plan import FlashInferPlan, Kernel
from cachebuilder.planning.requests import selections
from cachebuilder.sweep import flashinfer as sweep

_KERNEL = re.compile(r"&(\w+)<")
_ARCH = re.compile(r"--gpu-architecture=(sm_\w+)")


def make(inputs: Inputs, modules: Mapping[str, bytes]) -> FlashInferPlan:
    """Plan what the manifest's ``flashinfer`` needs, by calling FlashInfer's own GEMM on a virtual GPU.

    Args:
        modules: the manifest's modules, by name. FlashInfer's GEMM is in one of them.

    Raises:
        InstallationError: FlashInfer does not load.
        PlanError: FlashInfer refuses a shape, or the virtual GPU does not answer a CUDA call.
    """
    needs, gpu = inputs.manifest.flashinfer, inputs.manifest.target.gpu
    assert needs is not None and inputs.flashinfer is not None
    kernels: list[Kernel] = []
    calls = 0
    if needs.gemms:
        answer, requests = sweep.requested_kernels(inputs.flashinfer, gpu, needs.gemms, modules[GEMM_MODULE])
        selected_by, calls = selections(answer.sweeps), answer.calls
        for entry, request in requests.items():
            name, arch = _KERNEL.search(request.source), _ARCH.search(" ".join(request.flags))
            if name is None or arch is None or arch[1] != sweep.arch_of(gpu):
                raise PlanError(f"{entry}: wanted a kernel for {sweep.arch_of(gpu)}, found {' '.join(request.flags)}")
            kernels.append(
                Kernel(
                    entry=entry,
                    name=name[1],
                    source=request.source,
                    flags=request.flags,
                    selected_by=selected_by[entry],
                )
            )
    return FlashInferPlan(
        arch=sweep.arch_of(gpu),
        modules=tuple(needs.all_modules),
        gemms=tuple(gemm.model_dump(mode="json") for gemm in needs.gemms),
        kernels=tuple(kernels),
        calls=calls,
    )
