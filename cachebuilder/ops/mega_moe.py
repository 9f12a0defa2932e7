"""What the mega-MoE ops share: dispatch, both expert GEMMs and combine in one kernel over a buffer of all ranks.

On a node the buffer is symmetric memory of a process group. DeepGEMM itself sees only its address at each rank, the
number of ranks and its own, so a plan needs no group: one allocation stands for every rank's.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from types import SimpleNamespace
from typing import Annotated, Any

from pydantic import Field, model_validator

from cachebuilder.ops.base import Device, TokenOp


class MegaMoeOp(TokenOp):
    """One rank of ``ranks``; called with every number of tokens from 1 to ``max_tokens``.

    ``max_tokens`` also sizes the buffer (``num_max_tokens_per_rank``), which is a template argument of the kernel: it
    must be the engine's.
    """

    found_in = "sgl-deep-gemm 0.1.7 and 0.2.3.post2"

    ranks: Annotated[int, Field(ge=1, le=1024, description="expert parallel ranks")]
    experts: Annotated[int, Field(ge=1, le=65536, description="experts of all ranks")]
    topk: Annotated[int, Field(ge=1, le=64, description="experts a token is routed to")]
    hidden: Annotated[int, Field(ge=128, le=1 << 16, multiple_of=128, description="hidden size")]
    intermediate: Annotated[int, Field(ge=128, le=1 << 16, multiple_of=128, description="an expert's inner size")]
    activation_clamp: Annotated[float | None, Field(gt=0, description="limit of the activation; left out: none")] = None

    @model_validator(mode="after")
    def _check_experts(self) -> MegaMoeOp:
        if self.experts % self.ranks:
            raise ValueError(f"wanted experts in equal parts for {self.ranks} ranks, found {self.experts}")
        return self

    @property
    def local_experts(self) -> int:
        """Experts of this rank."""
        return self.experts // self.ranks


def sm90_buffer(device: Device, op: MegaMoeOp) -> Any:
    """The buffer of SM90's kernels."""
    make = device.deep_gemm.get_symm_buffer_for_sm90_mega_moe
    return _without_group(device, op, lambda group: make(group, *_shape(op)))


def sm100_buffer(device: Device, op: MegaMoeOp) -> Any:
    """The buffer of SM100's kernels, FP8 activations and FP4 weights, no shared experts."""
    make = device.deep_gemm.get_symm_buffer_for_mega_moe
    return _without_group(device, op, lambda group: make(group, *_shape(op)))


def _shape(op: MegaMoeOp) -> tuple[int, ...]:
    return op.experts, op.largest_m, op.topk, op.hidden, op.intermediate


def _without_group(device: Device, op: MegaMoeOp, make: Callable[[Any], Any]) -> Any:
    """DeepGEMM's own buffer, made while plain memory stands in for symmetric memory, and an object for the group.

    Of the group it asks its size and this rank's number; of symmetric memory, its address at every rank
    (sgl-deep-gemm 0.2.3.post2, ``deep_gemm/mega/__init__.py``, ``SymmBuffer``).
    """
    symmetric: Any = import_module("torch.distributed._symmetric_memory")
    before = symmetric.empty, symmetric.rendezvous
    symmetric.empty = device.torch.empty
    symmetric.rendezvous = lambda memory, group: SimpleNamespace(buffer_ptrs=[memory.data_ptr()] * op.ranks)
    try:
        return make(SimpleNamespace(size=lambda: op.ranks, rank=lambda: 0, barrier=lambda: None))
    finally:
        symmetric.empty, symmetric.rendezvous = before


def pre_dispatch(device: Device, op: MegaMoeOp, there: Any) -> Callable[[int], None]:
    """The call that quantises M tokens and their routing into the buffer ``there``; inputs for the most tokens."""
    x = device.empty(op.largest_m, op.hidden, dtype="bfloat16")
    chosen = device.empty(op.largest_m, op.topk, dtype="int32")
    weights = device.empty(op.largest_m, op.topk, dtype="float32")
    function, fp8 = op.function(device.deep_gemm), device.torch.float8_e4m3fn  # legacy copies hand out bytes

    def call(m: int) -> None:
        into = there.x.view(fp8), there.x_sf, there.topk_idx, there.topk_weights
        function(x[:m], chosen[:m], weights[:m], *into, m)

    return call
