"""What the pre-dispatches of mega-MoE share: tokens quantised into the buffer, and how that is checked."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from cachebuilder.ops.device import Device
from cachebuilder.ops.mega_moe import MegaMoeOp
from cachebuilder.ops.scaled import as_near, from_fp4, quantise, to_fp4, unpack
from cachebuilder.ops.trial import TOLERANCE, Inputs, Output, Trial


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
