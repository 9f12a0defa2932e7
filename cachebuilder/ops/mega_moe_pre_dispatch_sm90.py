"""``mega_moe_pre_dispatch_sm90``: tokens quantised into the mega-MoE buffer, on SM90."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from cachebuilder.ops.base import Device
from cachebuilder.ops.mega_moe import MegaMoeOp, sm90_buffer


class MegaMoePreDispatchSm90(MegaMoeOp):
    """x [M, hidden] and its routing [M, topk] into the buffer of `Fp8MegaMoe`."""

    majors = (9,)

    op: Literal["mega_moe_pre_dispatch_sm90"]

    def prepare(self, device: Device) -> Callable[[int], None]:
        """The buffer, and inputs for the most tokens."""
        there = sm90_buffer(device, self)
        x = device.empty(self.largest_m, self.hidden, dtype="bfloat16")
        chosen = device.empty(self.largest_m, self.topk, dtype="int32")
        weights = device.empty(self.largest_m, self.topk, dtype="float32")
        function, fp8 = self.function(device.deep_gemm), device.torch.float8_e4m3fn  # legacy copies hand out bytes

        def call(m: int) -> None:
            into = there.x.view(fp8), there.x_sf, there.topk_idx, there.topk_weights
            function(x[:m], chosen[:m], weights[:m], *into, m)

        return call
