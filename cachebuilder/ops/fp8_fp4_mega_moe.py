"""``fp8_fp4_mega_moe``: a whole MoE layer in one kernel, FP8 activations and FP4 weights, on SM100."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from cachebuilder.ops.base import Device
from cachebuilder.ops.mega_moe import MegaMoeOp, sm100_buffer


class Fp8Fp4MegaMoe(MegaMoeOp):
    """Expert weights in FP4 with packed 1 × 32 scales, as SGLang 0.5.23 ``layers/moe/mega_moe.py`` calls it."""

    majors = (10,)

    op: Literal["fp8_fp4_mega_moe"]

    def prepare(self, device: Device) -> Callable[[int], None]:
        """The buffer, this rank's weights, and an output for the most tokens."""
        there = sm100_buffer(device, self)

        def weight(n: int, k: int) -> tuple[Any, Any]:
            data = device.empty(self.local_experts, n, k // 2, dtype="int8")
            return data, device.empty(self.local_experts, k // 128, n, dtype="int32").mT  # four 1 × 32 scales a word

        first, second = weight(2 * self.intermediate, self.hidden), weight(self.hidden, self.intermediate)
        y = device.empty(self.largest_m, self.hidden, dtype="bfloat16")
        function = self.function(device.deep_gemm)

        def call(m: int) -> None:
            function(y[:m], first, second, there, activation_clamp=self.activation_clamp)

        return call
