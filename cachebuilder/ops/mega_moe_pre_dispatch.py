"""``mega_moe_pre_dispatch``: tokens quantised into the mega-MoE buffer, on SM100."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from cachebuilder.ops.base import Device
from cachebuilder.ops.mega_moe import MegaMoeOp, pre_dispatch, pre_dispatch_trial, sm100_buffer
from cachebuilder.ops.trial import Trial


class MegaMoePreDispatch(MegaMoeOp):
    """x [M, hidden] and its routing [M, topk] into the buffer of `Fp8Fp4MegaMoe`."""

    majors = (10,)

    op: Literal["mega_moe_pre_dispatch"]

    def prepare(self, device: Device) -> Callable[[int], None]:
        """The buffer, and inputs for the most tokens."""
        return pre_dispatch(device, self, sm100_buffer(device, self))

    def trial(self, device: Device, value: int, seed: int) -> Trial:
        """``value`` tokens; FP8 with a packed UE8M0 scale for each 1 × 32."""
        return pre_dispatch_trial(device, self, sm100_buffer(device, self), value, seed, 32, packed=True)
