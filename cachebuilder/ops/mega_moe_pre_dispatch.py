"""``mega_moe_pre_dispatch``: tokens quantised into the mega-MoE buffer, on SM100."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import Field

from cachebuilder.ops.device import Device
from cachebuilder.ops.mega_moe import MegaMoeOp, sm100_buffer
from cachebuilder.ops.pre_dispatch import fp4_pre_dispatch_trial, pre_dispatch, pre_dispatch_trial
from cachebuilder.ops.trial import Trial


class MegaMoePreDispatch(MegaMoeOp):
    """x [M, hidden] and its routing [M, topk] into the buffer of `Fp8Fp4MegaMoe`."""

    majors = (10,)

    found_in = "sgl-deep-gemm 0.1.4 to 0.2.3.post2"

    op: Literal["mega_moe_pre_dispatch"]
    mma_type: Annotated[
        Literal["mxf4xmxf4", "nvfp4xnvfp4"] | None,
        Field(description="of the layer that follows, in DeepGEMM's words; left out: fp8xfp4"),
    ] = None

    def prepare(self, device: Device) -> Callable[[int], None]:
        """The buffer, and inputs for the most tokens."""
        there = sm100_buffer(device, self, self.mma_type or "fp8xfp4")
        options: dict[str, Any] = {"mma_type": self.mma_type} if self.mma_type else {}
        if self.mma_type == "nvfp4xnvfp4":
            options |= {"group_size": 16, "buf_x_scales": there.x_scales}
        return pre_dispatch(device, self, there, **options)

    def trial(self, device: Device, value: int, seed: int) -> Trial:
        """``value`` tokens; FP8 with a packed UE8M0 scale for each 1 × 32, or FP4."""
        there = sm100_buffer(device, self, self.mma_type or "fp8xfp4")
        if self.mma_type:
            return fp4_pre_dispatch_trial(device, self, there, value, seed, self.mma_type == "nvfp4xnvfp4")
        return pre_dispatch_trial(device, self, there, value, seed, 32, packed=True)
