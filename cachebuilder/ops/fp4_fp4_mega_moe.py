"""``fp4_fp4_mega_moe``: a whole MoE layer in one kernel, NVFP4 experts and shared ones in BF16, on SM100."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import Field

from cachebuilder.ops.device import Device
from cachebuilder.ops.mega_moe_sm100 import Kind, NormedMegaMoeOp, Plain
from cachebuilder.ops.scaled import Scaled


class Fp4Fp4MegaMoe(NormedMegaMoeOp):
    """Expert weights in FP4 with an E4M3 scale for each 1 × 16; vLLM 0.33.0 ``models/muse_spark/nvidia/mega_moe.py``.

    The expert scales that vLLM gives beside them (``l1_alphas``, ``l2_alphas``, ``a2_scales``) and the norm's epsilon
    are arguments of the kernel and select none (vLLM 0.33.0's copy, ``impls/sm100_fp4_fp4_mega_moe.cuh``).
    """

    found_in = "vLLM 0.33.0's copy"

    op: Literal["fp4_fp4_mega_moe"]
    hidden: Annotated[int, Field(ge=256, le=1 << 16, multiple_of=256, description="hidden size")]
    intermediate: Annotated[int, Field(ge=256, le=1 << 16, multiple_of=256, description="an expert's inner size")]

    def kinds(self) -> tuple[Kind, Kind]:
        """NVFP4 throughout."""
        return "nvfp4", "nvfp4"

    def shared_kind(self, device: Device) -> Kind:
        """BF16."""
        return "bf16"

    @property
    def buffer_type(self) -> str:
        """NVFP4."""
        return "fp4xfp4"

    def by_token(self, device: Device) -> dict[str, Any]:
        """The shared experts' activations, BF16."""
        return {"x_bf16": device.empty(self.largest_m, self.hidden, dtype="bfloat16")} if self.shared_experts else {}

    def shared_inputs(self, device: Device, there: Any, x: Scaled | Plain, tokens: int, options: dict[str, Any]) -> Any:
        """The others' in BF16."""
        options["x_bf16"] = x.values(device.torch).bfloat16()
        return options["x_bf16"].float()

    def combined(self, device: Device, options: dict[str, Any]) -> Callable[[Any, Any], Any]:
        """A routing weight is applied to an expert's output, BF16 before and after, or to its RMS norm (vLLM 0.33.0's
        copy, ``impls/sm100_fp4_fp4_mega_moe.cuh``).
        """
        return super().combined(device, options) or (lambda output, share: (output * share).bfloat16().float())
