"""``get_mn_major_tma_aligned_packed_ue8m0_tensor``: float32 scales into Blackwell's packed exponents."""

from __future__ import annotations

from typing import Any, Literal

from cachebuilder.ops.device import Device
from cachebuilder.ops.layout import LayoutOp, unpacked


class GetMnMajorTmaAlignedPackedUe8m0Tensor(LayoutOp):
    """Scales [M, columns] as int32 [M, ⌈columns/4⌉] of four exponents each."""

    op: Literal["get_mn_major_tma_aligned_packed_ue8m0_tensor"]

    def result(self, device: Device, values: Any) -> Any:
        """float32 scales of the packed exponents."""
        return unpacked(device, values, self.columns)
