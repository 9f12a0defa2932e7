"""``bf16_mega_moe``: a whole MoE layer in one kernel, BF16, on SM100."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from cachebuilder.ops.mega_moe_sm100 import Kind, NormedActivatedMegaMoeOp


class Bf16MegaMoe(NormedActivatedMegaMoeOp):
    """Expert weights in BF16, as vLLM 0.33.0 ``fused_moe/deep_gemm_mega_moe.py`` calls it."""

    found_in = "sgl-deep-gemm 0.1.4 to 0.2.5 and vLLM 0.33.0's copy"

    op: Literal["bf16_mega_moe"]
    activation: Annotated[Literal["swiglustep"] | None, Field(description="left out: swiglu; vLLM's copy's")] = None

    def kinds(self) -> tuple[Kind, Kind]:
        """BF16 throughout."""
        return "bf16", "bf16"

    @property
    def buffer_type(self) -> str:
        """BF16."""
        return "bf16xbf16"
