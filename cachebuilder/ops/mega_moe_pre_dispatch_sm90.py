"""``mega_moe_pre_dispatch_sm90``: tokens quantised into the mega-MoE buffer, on SM90."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from cachebuilder.ops.base import Device
from cachebuilder.ops.mega_moe import MegaMoeOp, pre_dispatch, sm90_buffer


class MegaMoePreDispatchSm90(MegaMoeOp):
    """x [M, hidden] and its routing [M, topk] into the buffer of `Fp8MegaMoe`."""

    majors = (9,)

    op: Literal["mega_moe_pre_dispatch_sm90"]

    def prepare(self, device: Device) -> Callable[[int], None]:
        """The buffer, and inputs for the most tokens."""
        return pre_dispatch(device, self, sm90_buffer(device, self))
