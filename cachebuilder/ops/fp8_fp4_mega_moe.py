"""``fp8_fp4_mega_moe``: a whole MoE layer in one kernel, FP8 activations and FP4 weights, or others of 8 and 4 bits, on
SM100.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import Field

from cachebuilder.ops.base import Device
from cachebuilder.ops.mega_moe import Kind, Sm100MegaMoeOp, packed_weight, sm100_buffer


class Fp8Fp4MegaMoe(Sm100MegaMoeOp):
    """Expert weights in FP4 with packed 1 × 32 scales, as SGLang 0.5.23 ``layers/moe/mega_moe.py`` calls it."""

    op: Literal["fp8_fp4_mega_moe"]
    mma_type: Annotated[
        Literal["fp8xfp8", "mxf4xmxf4"] | None,
        Field(
            description="activations and weights, in DeepGEMM's words; left out: fp8xfp4. fp8xfp8 is vLLM's copy's, "
            "mxf4xmxf4 sgl-deep-gemm's"
        ),
    ] = None

    def kinds(self) -> tuple[Kind, Kind]:
        """As ``mma_type`` says."""
        return ("fp4" if self.mma_type == "mxf4xmxf4" else "fp8"), ("fp8" if self.mma_type == "fp8xfp8" else "fp4")

    def buffer(self, device: Device) -> Any:
        """The buffer for these kinds."""
        return sm100_buffer(device, self, self.mma_type or "fp8xfp4")

    def prepare(self, device: Device) -> Callable[[int], None]:
        """The buffer, this rank's weights, and an output for the most tokens."""
        there = self.buffer(device)
        fp8 = self.mma_type == "fp8xfp8"
        first = packed_weight(device, self, 2 * self.intermediate, self.hidden, 32, fp8)
        second = packed_weight(device, self, self.hidden, self.intermediate, 32, fp8)
        y = device.empty(self.largest_m, self.hidden, dtype="bfloat16")
        function = self.function(device.deep_gemm)

        def call(m: int) -> None:
            function(y[:m], first, second, there, activation_clamp=self.activation_clamp)

        return call
