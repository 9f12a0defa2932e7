"""What the mega-MoE ops share: dispatch, both expert GEMMs and combine in one kernel over a buffer of all ranks.

On a node the buffer is symmetric memory of a process group. DeepGEMM itself sees only its address at each rank, the
number of ranks and its own, so a plan needs no group: one allocation stands for every rank's.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from types import ModuleType, SimpleNamespace
from typing import Annotated, Any, cast

from pydantic import Field, model_validator

from cachebuilder.ops.base import TokenOp
from cachebuilder.ops.device import Device
from cachebuilder.ops.trial import Inputs, product_nt


class MegaMoeOp(TokenOp):
    """One rank of ``ranks``; called with every number of tokens from 1 to ``max_tokens``.

    ``max_tokens`` also sizes the buffer (``num_max_tokens_per_rank``), which is a template argument of the kernel: it
    must be the engine's.
    """

    found_in = "sgl-deep-gemm 0.1.4 to 0.2.3.post2 and vLLM 0.33.0's copy"

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

    def routing(self, device: Device, inputs: Inputs, tokens: int) -> tuple[Any, Any]:
        """Random experts int64 [tokens, topk], no two the same, and their weights float32 [tokens, topk]."""
        scores = inputs.normal(tokens, self.experts, dtype="float32")
        weights, chosen = scores.topk(self.topk, dim=-1)
        return chosen, device.torch.softmax(weights, -1)


def sm90_buffer(device: Device, op: MegaMoeOp) -> Any:
    """The buffer of SM90's kernels."""
    make = device.deep_gemm.get_symm_buffer_for_sm90_mega_moe
    return _without_group(device, op, lambda group: make(group, *_shape(op)))


def sm100_buffer(device: Device, op: MegaMoeOp, mma_type: str = "fp8xfp4", **options: Any) -> Any:
    """The buffer of SM100's kernels.

    Args:
        mma_type: DeepGEMM's word for the types of activations and weights. vLLM 0.33.0's copy has a buffer of its own
            for NVFP4 (``deep_gemm/mega/nvfp4.py``).
        options: keyword arguments of the buffer.
    """
    if mma_type == "nvfp4xnvfp4" and (own := nvfp4_buffer(device.deep_gemm)):
        options.pop("activation", None)  # it has no such argument: activations have one size in it
        return _without_group(device, op, lambda group: own(group, *_shape(op), **options))
    make = device.deep_gemm.get_symm_buffer_for_mega_moe
    return _without_group(device, op, lambda group: make(group, *_shape(op), mma_type=mma_type, **options))


def nvfp4_buffer(deep_gemm: ModuleType) -> Callable[..., Any] | None:
    """What makes NVFP4's own buffer, which vLLM 0.33.0's copy has (``deep_gemm/mega/nvfp4.py``); None elsewhere."""
    return cast("Callable[..., Any] | None", getattr(deep_gemm, "NVFP4SymmBuffer", None))


def _shape(op: MegaMoeOp) -> tuple[int, ...]:
    return op.experts, op.largest_m, op.topk, op.hidden, op.intermediate


def _without_group(device: Device, op: MegaMoeOp, make: Callable[[Any], Any]) -> Any:
    """DeepGEMM's own buffer, made while plain memory stands in for symmetric memory, and an object for the group.

    Of the group it asks its size and this rank's number; of symmetric memory, its address at every rank
    (sgl-deep-gemm 0.2.3.post2, ``deep_gemm/mega/__init__.py``, ``SymmBuffer``).

    Raises:
        ValueError: several ranks on a real GPU: their kernels would wait for each other in one buffer.
    """
    if op.ranks > 1 and not device.virtual:
        raise ValueError(f"wanted one rank on one GPU, found {op.ranks}: the other ranks' buffers are on other GPUs")
    symmetric: Any = import_module("torch.distributed._symmetric_memory")
    before = symmetric.empty, symmetric.rendezvous
    symmetric.empty = device.torch.empty
    symmetric.rendezvous = lambda memory, group: SimpleNamespace(buffer_ptrs=[memory.data_ptr()] * op.ranks)
    try:
        return make(SimpleNamespace(size=lambda: op.ranks, rank=lambda: 0, barrier=lambda: None))
    finally:
        symmetric.empty, symmetric.rendezvous = before


#: The largest relative error of a whole layer. Its kernel quantises the activations between the two GEMMs to FP8; where
#: its own sum differs from the reference's in the last bits, some round to the neighbouring value, 6 to 12 % away:
#: 3e-4 of difference moves one in three hundred of them and costs 5e-3. On SM90, FP8 products are added in registers
#: that keep 14 bits. Up to 255 tokens they go to float32 after each 128 of K; from 256 on they stay there for all of K
#: (``kReuseAccumAsFinal`` of ``sm90_fp8_mega_moe.cuh``). At a hidden size of 7168 a CPU that truncates likewise is off
#: by 1.2e-4 before the quantisation and 3e-3 after the layer, then by 2.3e-3 and 1.3e-2 (4e-3 and 1.4e-2 on an H200);
#: from 16384 on it would be beyond this bound.
LAYER_TOLERANCE = 2e-2


def layer(
    torch: ModuleType,
    op: MegaMoeOp,
    x: Any,
    chosen: Any,
    weights: Any,
    first: Callable[[int], Any],
    second: Callable[[int], Any],
    quantised: Callable[[Any], Any],
    activated: Callable[[Any], Any] | None = None,
    combined: Callable[[Any, Any], Any] | None = None,
    outer: Callable[[int], Any] = lambda expert: 1.0,
) -> Any:
    """What the layer is in float32: for each token the sum of its experts, y [tokens, hidden].

    As ``sm90_fp8_mega_moe.cuh`` of sgl-deep-gemm 0.1.5 does it: a routing weight is applied to the activation
    ``silu(gate) · up`` before that is quantised, gate is limited from above and up on both sides, and each expert's
    output is rounded to BF16 before the sum.

    Args:
        x: [tokens, hidden], float32.
        chosen, weights: [tokens, topk].
        first: an expert's gate and up [2 · intermediate, hidden], float32; gate comes first.
        second: an expert's down [hidden, intermediate].
        quantised: activations [rows, intermediate] as the kernel keeps them between the GEMMs.
        activated: the activation of gate and up side by side; left out: `swiglu` of float32.
        combined: what the sum takes of outputs [rows, hidden] and their routing weights [rows, 1], where these are not
            applied to the activation.
        outer: what an expert's activation is multiplied by before it is quantised.
    """
    activated = activated or (lambda both: swiglu(torch, op, both))
    y = torch.zeros_like(x)
    for expert in chosen.unique().tolist():
        rows, slots = (chosen == expert).nonzero(as_tuple=True)
        share = weights[rows, slots, None]
        activation = activated(product_nt(torch, x[rows], first(expert))) * outer(expert)
        activation = quantised(activation if combined else activation * share)
        output = product_nt(torch, activation, second(expert)).bfloat16().float()
        y[rows] += combined(output, share) if combined else output
    return y


def swiglu(torch: ModuleType, op: MegaMoeOp, both: Any) -> Any:
    """``silu(gate) · up`` of gate and up side by side, float32."""
    gate, up = both.chunk(2, -1)
    if op.activation_clamp is not None:
        gate, up = gate.clamp(max=op.activation_clamp), up.clamp(-op.activation_clamp, op.activation_clamp)
    return torch.nn.functional.silu(gate) * up
