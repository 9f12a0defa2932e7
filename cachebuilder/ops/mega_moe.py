"""What the mega-MoE ops share: dispatch, both expert GEMMs and combine in one kernel over a buffer of all ranks.

On a node the buffer is symmetric memory of a process group. DeepGEMM itself sees only its address at each rank, the
number of ranks and its own, so a plan needs no group: one allocation stands for every rank's.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import import_module
from types import ModuleType, SimpleNamespace
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from cachebuilder.ops.attention import accepts
from cachebuilder.ops.base import Device, TokenOp
from cachebuilder.ops.scaled import Scaled, as_near, from_fp4, quantise, random, requantised, to_fp4, unpack
from cachebuilder.ops.trial import TOLERANCE, Inputs, Output, Trial, dense_output, product_nt

#: What SM100's kernels read: FP8 or FP4 with packed UE8M0 scales for 1 × 32, FP4 with packed E4M3 for 1 × 16, or BF16.
Kind = Literal["fp8", "fp4", "nvfp4", "bf16"]


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


@dataclass(frozen=True)
class Plain:
    """An operand without scales, as `Scaled` is one with them."""

    data: Any

    def pair(self) -> Any:
        """As DeepGEMM takes it."""
        return self.data

    def values(self, torch: ModuleType, *index: Any) -> Any:
        """float32 values of ``data[index]``."""
        return (self.data[index] if index else self.data).float()


def operand(device: Device, inputs: Inputs, kind: Kind, deviation: float, *shape: int) -> Scaled | Plain:
    """Random activations or weights ``[…, MN, K]``."""
    if kind == "bf16":
        mn, k = shape[-2:]
        data = device.empty(*shape, dtype="bfloat16")
        for matrix in data.view(-1, mn, k):  # one at a time: float32 copies of all experts would not fit
            matrix.copy_(inputs.normal(mn, k, dtype="float32") * deviation)
        return Plain(data)
    columns = 16 if kind == "nvfp4" else 32
    return random(device, inputs, shape, (1, columns), True, kind != "fp8", nvfp4=kind == "nvfp4", deviation=deviation)


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
    rounded: bool = False,
    combined: Callable[[Any, Any], Any] | None = None,
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
        rounded: gate and up are BF16 before they are limited, as SM100's kernels have them.
        combined: what the sum takes of outputs [rows, hidden] and their routing weights [rows, 1], where these are not
            applied to the activation.
    """
    y = torch.zeros_like(x)
    for expert in chosen.unique().tolist():
        rows, slots = (chosen == expert).nonzero(as_tuple=True)
        share = weights[rows, slots, None]
        activation = swiglu(torch, op, product_nt(torch, x[rows], first(expert)), rounded)
        activation = quantised(activation if combined else activation * share)
        output = product_nt(torch, activation, second(expert)).bfloat16().float()
        y[rows] += combined(output, share) if combined else output
    return y


def swiglu(torch: ModuleType, op: MegaMoeOp, both: Any, rounded: bool) -> Any:
    """``silu(gate) · up`` of gate and up side by side, float32; the limit is BF16 where they are."""
    gate, up = (both.bfloat16().float() if rounded else both).chunk(2, -1)
    if op.activation_clamp is not None:
        limit = op.activation_clamp
        limit = float(torch.tensor(limit, dtype=torch.bfloat16)) if rounded else limit
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return torch.nn.functional.silu(gate) * up


class Sm100MegaMoeOp(MegaMoeOp):
    """A layer on SM100; the reference is from its kernels' sources and was held to no such card yet.

    What a routing weight is applied to, and that gate and up are rounded to BF16 before they are limited:
    ``impls/sm100_bf16_mega_moe.cuh`` and ``sm100_fp8_fp4_mega_moe.cuh`` of sgl-deep-gemm 0.1.7 and 0.2.3.post2 and of
    vLLM 0.33.0's copy.
    """

    majors = (10,)

    def kinds(self) -> tuple[Kind, Kind]:
        """Of activations, before each GEMM, and of weights."""
        raise NotImplementedError

    def buffer(self, device: Device) -> Any:
        """DeepGEMM's own buffer."""
        raise NotImplementedError

    def combined(self, device: Device, options: dict[str, Any]) -> Callable[[Any, Any], Any] | None:
        """What `layer` says of it, for the keyword arguments of the call."""
        return None

    def extra(self, device: Device, inputs: Inputs, x: Any) -> tuple[dict[str, Any], Any]:
        """More keyword arguments of the call, and what they add to y; ``x`` are the activations in float32."""
        return {}, 0.0

    def trial(self, device: Device, value: int, seed: int) -> Trial:
        """``value`` tokens, one rank.

        Raises:
            NotImplementedError: outputs are sent in FP8 (``DG_USE_FP8_COMBINE`` of sgl-deep-gemm).
        """
        if os.environ.get("DG_USE_FP8_COMBINE", "0") != "0":
            raise NotImplementedError("no reference for DG_USE_FP8_COMBINE")
        torch, inputs, hidden, inner = device.torch, Inputs(device, seed), self.hidden, self.intermediate
        (kind, weight_kind), there = self.kinds(), self.buffer(device)
        # Gate and up of deviation 4: some beyond a clamp of 7 or 10, and within NVFP4's scales, which end at 448.
        deviation = 2 * hidden**-0.25
        x = operand(device, inputs, kind, deviation, value, hidden)
        first = operand(device, inputs, weight_kind, deviation, self.local_experts, 2 * inner, hidden)
        second = operand(device, inputs, weight_kind, 1.0, self.local_experts, hidden, inner)
        chosen, weights = self.routing(device, inputs, value)
        there.x.view(x.data.dtype)[:value] = x.data
        if isinstance(x, Scaled):
            there.x_sf[:value] = x.pair()[1]
        there.topk_idx[:value], there.topk_weights[:value] = chosen, weights
        y, buffer = inputs.output(value, hidden, dtype="bfloat16")
        options, more = self.extra(device, inputs, x.values(torch))
        given = _transformed(device, kind, first.pair(), second.pair())
        self.function(device.deep_gemm)(y, *given, there, activation_clamp=self.activation_clamp, **options)
        expected = layer(
            torch, self, x.values(torch), chosen, weights,
            lambda expert: first.values(torch, expert), lambda expert: second.values(torch, expert),
            lambda activation: _kept(torch, kind, activation), True, self.combined(device, options),
        )  # fmt: skip
        tolerance = TOLERANCE if kind == "bf16" else LAYER_TOLERANCE
        return Trial((replace(dense_output(torch, "y", buffer, expected + more), tolerance=tolerance),))


def _transformed(device: Device, kind: Kind, first: Any, second: Any) -> Any:
    """Weights as the kernels read them; sgl-deep-gemm brings those for FP4 activations into another order."""
    transform = device.deep_gemm.transform_weights_for_mega_moe
    mma_type = {"fp4": "mxf4xmxf4", "nvfp4": "nvfp4xnvfp4"}.get(kind)
    given = {"mma_type": mma_type} if mma_type and accepts(transform, "mma_type") else {}
    return transform(first, second, **given)


def _kept(torch: ModuleType, kind: Kind, activation: Any) -> Any:
    """Activations between the GEMMs, of the kind that those before the first have."""
    if kind == "bf16":
        return activation.bfloat16().float()
    return requantised(torch, activation, 16 if kind == "nvfp4" else 32, kind != "fp8", kind == "nvfp4")


def pre_dispatch_trial(
    device: Device, op: MegaMoeOp, there: Any, tokens: int, seed: int, columns: int, packed: bool
) -> Trial:
    """``tokens`` tokens in FP8 in the buffer ``there``: their values, routing and scales, nothing in the rows behind.

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
    groups = scales.shape[1]
    buffer = there.x.view(fp8).float()
    nearest = as_near(torch, x.float() / scales.repeat_interleave(columns, 1), buffer[:tokens], data.float())
    # Copies: the views that DeepGEMM hands out do not keep the buffer, which goes with ``there``.
    written = unpack(torch, there.x_sf)[:, :groups] if packed else there.x_sf[:, :groups].clone()
    return Trial(
        (
            _rows("buf_x", buffer, nearest, math.nan),
            # Packed exponents have no NaN to poison them with: a row that is not written keeps zeroes.
            _rows("buf_x_sf", written, scales, 0.0 if packed else math.nan, 1e-6),
            *_routing(there, chosen, weights),
        )
    )


def fp4_pre_dispatch_trial(device: Device, op: MegaMoeOp, there: Any, tokens: int, seed: int, nvfp4: bool) -> Trial:
    """The same in FP4, with UE8M0 scales for 1 × 32, or E4M3 ones for 1 × 16 and one of float32 for each token.

    As ``impls/sm100_mega_moe_pre_dispatch.cuh`` of sgl-deep-gemm 0.2.3.post2 does it, in the same order.
    """
    torch, inputs = device.torch, Inputs(device, seed)
    x = inputs.normal(tokens, op.hidden)
    chosen, weights = op.routing(device, inputs, tokens)
    there.x.view(torch.uint8).fill_(0x11)  # the smallest value, twice: FP4 has no NaN
    there.x_sf.fill_(0)
    options: dict[str, Any] = {"mma_type": "nvfp4xnvfp4" if nvfp4 else "mxf4xmxf4"}
    if nvfp4:
        there.x_scales.fill_(math.nan)
        options |= {"group_size": 16, "buf_x_scales": there.x_scales}
    op.function(device.deep_gemm)(
        x, chosen.int(), weights, there.x, there.x_sf, there.topk_idx, there.topk_weights, tokens, **options
    )
    outputs = list(_routing(there, chosen, weights))
    values = x.float()
    if nvfp4:
        groups = values.unflatten(-1, (-1, 16)).abs().amax(-1)
        outer = values.abs().amax(-1, keepdim=True).clamp(min=1e-4) / (448 * 6)
        scales = (groups / (6 * outer)).clamp(max=448).to(torch.float8_e4m3fn).float()
        scaled = values * (1 / (scales * outer)).repeat_interleave(16, -1)
        data = to_fp4(torch, scaled)
        outputs.append(_rows("buf_x_scales", there.x_scales[:, None].clone(), outer, math.nan, 1e-6))
    else:
        data, scales = quantise(torch, values, (1, 32), True, True)
        scaled = values / scales.repeat_interleave(32, -1)
    buffer = from_fp4(torch, there.x)
    nearest = as_near(torch, scaled, buffer[:tokens], from_fp4(torch, data))
    return Trial(
        (
            _rows("buf_x", buffer, nearest, 0.5),
            _rows("buf_x_sf", unpack(torch, there.x_sf, nvfp4)[:, : scales.shape[1]], scales, 0.0, 1e-6),
            *outputs,
        )
    )


def _rows(name: str, actual: Any, expected: Any, behind: float, tolerance: float = TOLERANCE) -> Output:
    """The first rows of ``actual`` are ``expected``; all others still hold ``behind``."""
    full = expected.new_full(actual.shape, 0.0 if math.isnan(behind) else behind)
    full[: len(expected)] = expected
    rest = expected.new_zeros((len(actual), 1)).bool()
    rest[len(expected) :] = True
    kept = rest & math.isnan(behind)
    return Output(name, actual, full, ~kept, kept, tolerance)


def _routing(there: Any, chosen: Any, weights: Any) -> tuple[Output, ...]:
    """Experts and weights of the tokens; an unused row's are "no expert", −1, and 0 (``sm90_mega_moe_pre_dispatch.cuh``
    and ``sm100_mega_moe_pre_dispatch.cuh`` of sgl-deep-gemm 0.2.3.post2).
    """
    return (
        _rows("buf_topk_idx", there.topk_idx.clone(), chosen.float(), -1.0, 0.0),
        _rows("buf_topk_weights", there.topk_weights.clone(), weights, 0.0, 1e-6),
    )
