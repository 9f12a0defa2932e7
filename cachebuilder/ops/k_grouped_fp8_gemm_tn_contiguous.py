"""``k_grouped_fp8_gemm_tn_contiguous``: the experts' weight gradient in FP8, rows of tokens."""

from __future__ import annotations

from typing import Literal

from cachebuilder.ops.k_grouped import KGroupedGemm


class KGroupedFp8GemmTnContiguous(KGroupedGemm):
    """A [all K, m] and B [all K, n]; SM100's form."""

    majors = (10, 12)

    op: Literal["k_grouped_fp8_gemm_tn_contiguous"]
