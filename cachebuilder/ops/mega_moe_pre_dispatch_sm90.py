"""``mega_moe_pre_dispatch_sm90``: tokens quantised into the mega-MoE buffer, on SM90."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from cachebuilder.ops.device import Device
from cachebuilder.ops.mega_moe import MegaMoeOp, sm90_buffer
from cachebuilder.ops.pre_dispatch import pre_dispatch, pre_dispatch_trial
from cachebuilder.ops.trial import Trial


class MegaMoePreDispatchSm90(MegaMoeOp):
    """x [M, hidden] and its routing [M, topk] into the buffer of `Fp8MegaMoe`."""

    majors = (9,)

    found_in = "sgl-deep-gemm 0.1.5 to 0.2.3.post2"

    op: Literal["mega_moe_pre_dispatch_sm90"]

    def prepare(self, device: Device) -> Callable[[int], None]:
        """The buffer, and inputs for the most tokens."""
        return pre_dispatch(device, self, sm90_buffer(device, self))

    def trial(self, device: Device, value: int, seed: int) -> Trial:
        """``value`` tokens; FP8 with a float32 scale for each 1 × 128."""
        return pre_dispatch_trial(device, self, sm90_buffer(device, self), value, seed, 128, packed=False)
