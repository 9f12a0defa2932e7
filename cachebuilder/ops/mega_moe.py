"""What the mega-MoE ops share: dispatch, both expert GEMMs and combine in one kernel over a buffer of all ranks.

On a node the buffer is symmetric memory of a process group. DeepGEMM itself sees only its address at each rank, the
number of ranks and its own, so a plan needs no group: one allocation stands for every rank's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from importlib import import_module
from types import ModuleType, SimpleNamespace
from typing import Annotated, Any

from pydantic import Field, model_validator

from cachebuilder.ops.base import Device, TokenOp
from cachebuilder.ops.layout import unpacked
from cachebuilder.ops.scaled import quantise
from cachebuilder.ops.trial import TOLERANCE, Inputs, Output, Trial, product_nt


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


def sm100_buffer(device: Device, op: MegaMoeOp, mma_type: str = "fp8xfp4", shared_experts: int = 0) -> Any:
    """The buffer of SM100's kernels.

    Args:
        mma_type: DeepGEMM's word for the types of activations and weights. vLLM 0.33.0's copy has a buffer of its own
            for NVFP4 (``deep_gemm/mega/nvfp4.py``).
        shared_experts: that every token goes to.
    """
    if mma_type == "nvfp4xnvfp4" and (own := getattr(device.deep_gemm, "NVFP4SymmBuffer", None)):
        return _without_group(device, op, lambda group: own(group, *_shape(op)))
    make = device.deep_gemm.get_symm_buffer_for_mega_moe
    options = {"num_shared_experts": shared_experts} if shared_experts else {}
    return _without_group(device, op, lambda group: make(group, *_shape(op), mma_type=mma_type, **options))


def packed_weight(device: Device, op: MegaMoeOp, n: int, k: int, columns: int, fp8: bool = False) -> tuple[Any, Any]:
    """This rank's weights [n, k], in FP4 unless ``fp8``, and a scale for each 1 × ``columns``, four to an int32."""
    kind, width = ("float8_e4m3fn", k) if fp8 else ("int8", k // 2)
    data = device.empty(op.local_experts, n, width, dtype=kind)
    return data, device.empty(op.local_experts, k // (4 * columns), n, dtype="int32").mT


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


def pre_dispatch(device: Device, op: MegaMoeOp, there: Any, **options: Any) -> Callable[[int], None]:
    """The call that quantises M tokens and their routing into the buffer ``there``; inputs for the most tokens."""
    x = device.empty(op.largest_m, op.hidden, dtype="bfloat16")
    chosen = device.empty(op.largest_m, op.topk, dtype="int32")
    weights = device.empty(op.largest_m, op.topk, dtype="float32")
    # Legacy copies hand FP8 out as bytes; FP4 is bytes, two to each.
    fp8 = there.x.shape[-1] == op.hidden
    quantised = there.x.view(device.torch.float8_e4m3fn) if fp8 else there.x
    function, into = op.function(device.deep_gemm), (quantised, there.x_sf, there.topk_idx, there.topk_weights)

    def call(m: int) -> None:
        function(x[:m], chosen[:m], weights[:m], *into, m, **options)

    return call


#: The largest relative error of a whole layer. Its kernel quantises the activations between the two GEMMs to FP8; where
#: its own sum differs from the reference's in the last bits, some round to the neighbouring value, 6 to 12 % away:
#: 3e-4 of difference moves one in three hundred of them and costs 5e-3.
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
    """
    y = torch.zeros_like(x)
    for expert in chosen.unique().tolist():
        rows, slots = (chosen == expert).nonzero(as_tuple=True)
        gate, up = product_nt(torch, x[rows], first(expert)).chunk(2, -1)
        if op.activation_clamp is not None:
            gate, up = gate.clamp(max=op.activation_clamp), up.clamp(-op.activation_clamp, op.activation_clamp)
        activation = quantised(torch.nn.functional.silu(gate) * up * weights[rows, slots, None])
        y[rows] += product_nt(torch, activation, second(expert)).bfloat16().float()
    return y


def pre_dispatch_trial(
    device: Device, op: MegaMoeOp, there: Any, tokens: int, seed: int, columns: int, packed: bool
) -> Trial:
    """``tokens`` tokens in the buffer ``there``: their values, routing and scales, and nothing in the rows behind.

    The routing of unused rows is "no expert": -1, and weight 0 (``sm90_mega_moe_pre_dispatch.cuh`` and
    ``sm100_mega_moe_pre_dispatch.cuh`` of sgl-deep-gemm 0.2.3.post2).

    Args:
        columns: that one scale covers.
        packed: scales are UE8M0 exponents, four to an int32.
    """
    torch, inputs = device.torch, Inputs(device, seed)
    fp8 = torch.float8_e4m3fn
    x = inputs.normal(tokens, op.hidden)
    chosen, weights = op.routing(device, inputs, tokens)
    there.x.view(torch.uint8).fill_(0x7F)  # NaN
    there.x_sf.fill_(0 if packed else math.nan)
    op.function(device.deep_gemm)(
        x, chosen.int(), weights, there.x.view(fp8), there.x_sf, there.topk_idx, there.topk_weights, tokens
    )
    data, scales = quantise(torch, x.float(), (1, columns), packed, False)
    rows = torch.arange(len(there.x), device=device.name)[:, None]
    used = rows < tokens

    def output(name: str, actual: Any, expected: Any, empty: float, rest: Any, tolerance: float) -> Output:
        full = torch.full(actual.shape, empty, device=device.name, dtype=torch.float32)
        full[:tokens] = expected
        return Output(name, actual, full, used | rest, ~(used | rest), tolerance)

    # Copies: the views that DeepGEMM hands out do not keep the buffer, which goes with ``there``.
    written = there.x_sf[:, : scales.shape[1]].clone() if not packed else unpacked(device, there.x_sf, scales.shape[1])
    nothing, everything = torch.zeros_like(used), torch.ones_like(used)
    return Trial(
        (
            output("buf_x", there.x.view(fp8).float(), data.float(), 0.0, nothing, TOLERANCE),
            # Packed exponents have no NaN to poison them with: a row that is not written keeps zeroes.
            output("buf_x_sf", written, scales, 0.0, everything if packed else nothing, 1e-6),
            output("buf_topk_idx", there.topk_idx.clone(), chosen.float(), -1.0, everything, 0.0),
            output("buf_topk_weights", there.topk_weights.clone(), weights, 0.0, everything, 1e-6),
        )
    )
