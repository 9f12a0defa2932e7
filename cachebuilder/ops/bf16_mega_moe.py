"""``bf16_mega_moe``: a whole MoE layer in one kernel, BF16, on SM100."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from cachebuilder.ops.base import Device
from cachebuilder.ops.mega_moe import Kind, Sm100MegaMoeOp, sm100_buffer


class Bf16MegaMoe(Sm100MegaMoeOp):
    """Expert weights in BF16, as vLLM 0.33.0 ``fused_moe/deep_gemm_mega_moe.py`` calls it."""

    found_in = "sgl-deep-gemm 0.1.4 to 0.2.3.post2 and vLLM 0.33.0's copy"

    op: Literal["bf16_mega_moe"]

    def kinds(self) -> tuple[Kind, Kind]:
        """BF16 throughout."""
        return "bf16", "bf16"

    def buffer(self, device: Device) -> Any:
        """The buffer for BF16."""
        return sm100_buffer(device, self, "bf16xbf16")

    def prepare(self, device: Device) -> Callable[[int], None]:
        """The buffer, this rank's weights, and an output for the most tokens."""
        there = self.buffer(device)
        first = device.empty(self.local_experts, 2 * self.intermediate, self.hidden, dtype="bfloat16")
        second = device.empty(self.local_experts, self.hidden, self.intermediate, dtype="bfloat16")
        y = device.empty(self.largest_m, self.hidden, dtype="bfloat16")
        function = self.function(device.deep_gemm)

        def call(m: int) -> None:
            function(y[:m], first, second, there, activation_clamp=self.activation_clamp)

        return call
