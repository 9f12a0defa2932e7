"""``nvfp4_mega_moe``: a whole MoE layer in one kernel, NVFP4 activations and weights, on SM100."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from cachebuilder.ops.base import Device
from cachebuilder.ops.mega_moe import Kind, Sm100MegaMoeOp, packed_weight, sm100_buffer


class Nvfp4MegaMoe(Sm100MegaMoeOp):
    """Expert weights in FP4 with an E4M3 scale for each 1 × 16, as vLLM 0.33.0 ``fused_moe/deep_gemm_mega_moe.py``."""

    found_in = "sgl-deep-gemm 0.1.7 to 0.2.3.post2 and vLLM 0.33.0's copy"

    op: Literal["nvfp4_mega_moe"]

    def kinds(self) -> tuple[Kind, Kind]:
        """NVFP4 throughout."""
        return "nvfp4", "nvfp4"

    def buffer(self, device: Device) -> Any:
        """The buffer for NVFP4."""
        return sm100_buffer(device, self, "nvfp4xnvfp4")

    def combined(self, device: Device, options: dict[str, Any]) -> Callable[[Any, Any], Any] | None:
        """A routing weight is applied to the activation by sgl-deep-gemm (``impls/sm100_fp8_fp4_mega_moe.cuh``), to the
        output by vLLM 0.33.0's copy (``impls/sm100_nvfp4_mega_moe.cuh``).
        """
        if not hasattr(device.deep_gemm, "NVFP4SymmBuffer"):
            return None
        return lambda output, share: output * share

    def prepare(self, device: Device) -> Callable[[int], None]:
        """The buffer, this rank's weights, and an output for the most tokens."""
        there = self.buffer(device)
        first = packed_weight(device, self, 2 * self.intermediate, self.hidden, 16)
        second = packed_weight(device, self, self.hidden, self.intermediate, 16)
        y = device.empty(self.largest_m, self.hidden, dtype="bfloat16")
        function = self.function(device.deep_gemm)

        def call(m: int) -> None:
            function(y[:m], first, second, there, activation_clamp=self.activation_clamp)

        return call
