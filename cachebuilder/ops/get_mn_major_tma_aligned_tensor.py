"""``get_mn_major_tma_aligned_tensor``: float32 scales into the layout that SM90's kernels read."""

from __future__ import annotations

from typing import Literal

from cachebuilder.ops.layout import LayoutOp


class GetMnMajorTmaAlignedTensor(LayoutOp):
    """Scales [M, columns], M-major and padded to 16 bytes."""

    op: Literal["get_mn_major_tma_aligned_tensor"]
