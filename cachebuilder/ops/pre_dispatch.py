"""The pre-dispatches of mega-MoE: tokens quantised into its buffer, with their routing."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import Field

from cachebuilder.ops.device import Device
from cachebuilder.ops.mega_moe import MegaMoeOp, sm90_buffer, sm100_buffer
from cachebuilder.ops.scaled import FP8_MAX, Quantisation, as_near, from_fp4, quantise, to_fp4, unpack
from cachebuilder.ops.trial import TOLERANCE, Inputs, Output, Trial

#: The smallest FP4 value twice, and what it stands for: FP4 has no NaN.
_FP4_POISON, _FP4_POISON_VALUE = 0x11, 0.5
_FP8_NAN = 0x7F


class PreDispatchOp(MegaMoeOp):
    """x [M, hidden] and its routing [M, topk] into the buffer of the mega-MoE that follows."""

    @property
    def quantisation(self) -> Quantisation:
        """How the tokens are quantised."""
        raise NotImplementedError

    def buffer(self, device: Device) -> Any:
        """DeepGEMM's own buffer."""
        raise NotImplementedError

    def call_options(self, buffer: Any) -> dict[str, Any]:
        """Keyword arguments of the call."""
        return {}

    def destination(self, device: Device, buffer: Any) -> tuple[Any, ...]:
        """Elements, scales, experts and weights in ``buffer``, as the function takes them."""
        # Legacy copies return FP8 as bytes; FP4 is bytes, two elements to each.
        elements = buffer.x if self.quantisation.fp4 else buffer.x.view(device.torch.float8_e4m3fn)
        return elements, buffer.x_sf, buffer.topk_idx, buffer.topk_weights

    def prepare(self, device: Device) -> Callable[[int], None]:
        """The buffer, and inputs for the most tokens."""
        buffer = self.buffer(device)
        x = device.empty(self.largest_m, self.hidden, dtype="bfloat16")
        expert_ids = device.empty(self.largest_m, self.topk, dtype="int32")
        weights = device.empty(self.largest_m, self.topk, dtype="float32")
        destination, options = self.destination(device, buffer), self.call_options(buffer)
        function = self.function(device.deep_gemm)

        def call(m: int) -> None:
            function(x[:m], expert_ids[:m], weights[:m], *destination, m, **options)

        return call

    def trial(self, device: Device, value: int, seed: int) -> Trial:
        """``value`` tokens: their values, scales and routing in the buffer, and nothing in the rows behind them.

        In FP4 as ``impls/sm100_mega_moe_pre_dispatch.cuh`` of sgl-deep-gemm 0.2.3.post2 does it, in the same order.
        """
        torch, inputs, quantisation = device.torch, Inputs(device, seed), self.quantisation
        nvfp4 = quantisation.scales == "e4m3"
        buffer = self.buffer(device)
        x = inputs.normal(value, self.hidden)
        expert_ids, weights = self.routing(device, inputs, value)
        buffer.x.view(torch.uint8).fill_(_FP4_POISON if quantisation.fp4 else _FP8_NAN)
        # Packed exponents have no NaN: in a row that is not written they stay zero.
        unwritten_scale = 0.0 if quantisation.packed else math.nan
        buffer.x_sf.fill_(unwritten_scale)
        if nvfp4:
            buffer.x_scales.fill_(math.nan)
        destination, options = self.destination(device, buffer), self.call_options(buffer)
        self.function(device.deep_gemm)(x, expert_ids.int(), weights, *destination, value, **options)

        outputs: list[Output] = []
        if nvfp4:
            groups = x.float().unflatten(-1, (-1, quantisation.columns)).abs().amax(-1)
            outer = x.float().abs().amax(-1, keepdim=True).clamp(min=1e-4) / (FP8_MAX * 6)
            scales = (groups / (6 * outer)).clamp(max=FP8_MAX).to(torch.float8_e4m3fn).float()
            scaled = x.float() * (1 / (scales * outer)).repeat_interleave(quantisation.columns, -1)
            data = to_fp4(torch, scaled)
            outputs.append(_rows("buf_x_scales", buffer.x_scales[:, None].clone(), outer, math.nan, 1e-6))
        else:
            data, scales = quantise(torch, x.float(), quantisation)
            scaled = x.float() / scales.repeat_interleave(quantisation.columns, -1)
        if quantisation.fp4:
            written, nearest, unwritten = from_fp4(torch, buffer.x), from_fp4(torch, data), _FP4_POISON_VALUE
        else:
            written, nearest, unwritten = destination[0].float(), data.float(), math.nan
        # Copies: the views that DeepGEMM returns do not keep the buffer alive.
        written_scales = unpack(torch, buffer.x_sf, quantisation.scales) if quantisation.packed else buffer.x_sf.clone()
        return Trial(
            (
                _rows("buf_x", written, as_near(torch, scaled, written[:value], nearest), unwritten),
                _rows("buf_x_sf", written_scales[:, : scales.shape[1]], scales, unwritten_scale, 1e-6),
                *_routing(buffer, expert_ids, weights),
                *outputs,
            )
        )


class MegaMoePreDispatchSm90(PreDispatchOp):
    """Tokens quantised into the buffer of `fp8_mega_moe`, on SM90: x [M, hidden] and its routing [M, topk]."""

    majors = (9,)
    found_in = "sgl-deep-gemm 0.1.5 to 0.2.3.post2"

    op: Literal["mega_moe_pre_dispatch_sm90"]

    @property
    def quantisation(self) -> Quantisation:
        """FP8 with a float32 scale for each 1 × 128."""
        return Quantisation(1, 128)

    def buffer(self, device: Device) -> Any:
        """SM90's buffer."""
        return sm90_buffer(device, self)


class MegaMoePreDispatch(PreDispatchOp):
    """Tokens quantised into the buffer of `fp8_fp4_mega_moe`, on SM100: x [M, hidden] and its routing [M, topk]."""

    majors = (10,)
    found_in = "sgl-deep-gemm 0.1.4 to 0.2.3.post2"

    op: Literal["mega_moe_pre_dispatch"]
    mma_type: Annotated[
        Literal["mxf4xmxf4", "nvfp4xnvfp4"] | None,
        Field(description="of the layer that follows, in DeepGEMM's words; left out: fp8xfp4"),
    ] = None

    @property
    def quantisation(self) -> Quantisation:
        """FP8, or FP4, with a UE8M0 scale for each 1 × 32; NVFP4 with an E4M3 scale for each 1 × 16."""
        if self.mma_type == "nvfp4xnvfp4":
            return Quantisation(1, 16, "e4m3", fp4=True)
        return Quantisation(1, 32, "ue8m0", fp4=self.mma_type is not None)

    def buffer(self, device: Device) -> Any:
        """SM100's buffer, for ``mma_type``."""
        return sm100_buffer(device, self, self.mma_type or "fp8xfp4")

    def call_options(self, buffer: Any) -> dict[str, Any]:
        """The type; for NVFP4 also the float32 scale of each token."""
        options: dict[str, Any] = {"mma_type": self.mma_type} if self.mma_type else {}
        if self.mma_type == "nvfp4xnvfp4":
            options |= {"group_size": 16, "buf_x_scales": buffer.x_scales}
        return options


def _rows(name: str, actual: Any, expected: Any, behind: float, tolerance: float = TOLERANCE) -> Output:
    """The first rows of ``actual`` are ``expected``; all others still hold ``behind``."""
    full = expected.new_full(actual.shape, 0.0 if math.isnan(behind) else behind)
    full[: len(expected)] = expected
    rest = expected.new_zeros((len(actual), 1)).bool()
    rest[len(expected) :] = True
    untouched = rest & math.isnan(behind)
    return Output(name, actual, full, ~untouched, untouched, tolerance)


def _routing(buffer: Any, expert_ids: Any, weights: Any) -> tuple[Output, ...]:
    """Experts and weights of the tokens; an unused row has −1, "no expert", and 0.

    ``sm90_mega_moe_pre_dispatch.cuh`` and ``sm100_mega_moe_pre_dispatch.cuh`` of sgl-deep-gemm 0.2.3.post2.
    """
    return (
        _rows("buf_topk_idx", buffer.topk_idx.clone(), expert_ids.float(), -1.0, 0.0),
        _rows("buf_topk_weights", buffer.topk_weights.clone(), weights, 0.0, 1e-6),
    )
