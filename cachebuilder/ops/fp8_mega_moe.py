"""``fp8_mega_moe``: a whole MoE layer in one kernel, FP8, on SM90."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from cachebuilder.ops.base import Device
from cachebuilder.ops.mega_moe import MegaMoeOp, sm90_buffer


class Fp8MegaMoe(MegaMoeOp):
    """Expert weights in FP8 with 128 × 128 scales, as SGLang 0.5.23 ``layers/moe/mega_moe_sm90.py`` calls it."""

    majors = (9,)

    op: Literal["fp8_mega_moe"]

    def prepare(self, device: Device) -> Callable[[int], None]:
        """The buffer, this rank's weights, and an output for the most tokens."""
        there = sm90_buffer(device, self)
        experts, hidden, inner = self.local_experts, self.hidden, self.intermediate
        blocks = hidden // 128, inner // 128
        first = (
            device.empty(experts, 2 * inner, hidden, dtype="float8_e4m3fn"),
            device.empty(experts, 2 * blocks[1], blocks[0], dtype="float32"),
        )
        second = (
            device.empty(experts, hidden, inner, dtype="float8_e4m3fn"),
            device.empty(experts, *blocks, dtype="float32"),
        )
        y = device.empty(self.largest_m, hidden, dtype="bfloat16")
        function = self.function(device.deep_gemm)

        def call(m: int) -> None:
            function(y[:m], first, second, there, activation_clamp=self.activation_clamp)

        return call
