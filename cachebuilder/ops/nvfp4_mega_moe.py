"""``nvfp4_mega_moe``: a whole MoE layer in one kernel, NVFP4 activations and weights, on SM100."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from cachebuilder.ops.base import Device
from cachebuilder.ops.mega_moe import MegaMoeOp, packed_weight, sm100_buffer


class Nvfp4MegaMoe(MegaMoeOp):
    """Expert weights in FP4 with an E4M3 scale for each 1 × 16, as vLLM 0.33.0 ``fused_moe/deep_gemm_mega_moe.py``."""

    majors = (10,)
    found_in = "sgl-deep-gemm 0.1.7 to 0.2.3.post2 and vLLM 0.33.0's copy"

    op: Literal["nvfp4_mega_moe"]

    def prepare(self, device: Device) -> Callable[[int], None]:
        """The buffer, this rank's weights, and an output for the most tokens."""
        there = sm100_buffer(device, self, "nvfp4xnvfp4")
        first = packed_weight(device, self, 2 * self.intermediate, self.hidden, 16)
        second = packed_weight(device, self, self.hidden, self.intermediate, 16)
        y = device.empty(self.largest_m, self.hidden, dtype="bfloat16")
        function = self.function(device.deep_gemm)

        def call(m: int) -> None:
            function(y[:m], first, second, there, activation_clamp=self.activation_clamp)

        return call
