"""``fp8_fp4_mega_moe``: a whole MoE layer in one kernel, FP8 activations and FP4 weights, or others of 8 and 4 bits, on
SM100.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from cachebuilder.ops.device import Device
from cachebuilder.ops.mega_moe_sm100 import ActivatedMegaMoeOp, Kind
from cachebuilder.ops.trial import Trial


class Fp8Fp4MegaMoe(ActivatedMegaMoeOp):
    """Expert weights in FP4 with packed 1 × 32 scales, as SGLang 0.5.23 ``layers/moe/mega_moe.py`` calls it.

    Shared experts are in FP8 with such scales, in FP4 with ``mxf4xmxf4``.
    """

    op: Literal["fp8_fp4_mega_moe"]
    mma_type: Annotated[
        Literal["fp8xfp8", "mxf4xmxf4"] | None,
        Field(
            description="activations and weights, in DeepGEMM's words; left out: fp8xfp4. fp8xfp8 is not in "
            "sgl-deep-gemm 0.1.7, mxf4xmxf4 not in vLLM's copy"
        ),
    ] = None
    activation: Annotated[
        Literal["swigluoai", "swiglustep", "situ"] | None,
        Field(description="left out: swiglu; swigluoai is sgl-deep-gemm's, swiglustep vLLM's copy's"),
    ] = None

    def kinds(self) -> tuple[Kind, Kind]:
        """As ``mma_type`` says."""
        return ("fp4" if self.mma_type == "mxf4xmxf4" else "fp8"), ("fp8" if self.mma_type == "fp8xfp8" else "fp4")

    @property
    def buffer_type(self) -> str:
        """That of ``mma_type``."""
        return self.mma_type or "fp8xfp4"

    def trial(self, device: Device, value: int, seed: int) -> Trial:
        """``value`` tokens, one rank.

        Raises:
            NotImplementedError: shared experts in FP4: no engine lays their scales out.
        """
        if self.shared_experts and self.mma_type == "mxf4xmxf4":
            raise NotImplementedError("no reference for shared experts in FP4")
        return super().trial(device, value, seed)
