"""``k_grouped_bf16_gemm_tn_contiguous``: the experts' weight gradient in BF16."""

from __future__ import annotations

from typing import Literal

from cachebuilder.ops.k_grouped import KGroupedGemm


class KGroupedBf16GemmTnContiguous(KGroupedGemm):
    """A [all K, m] and B [all K, n]."""

    fp8 = False

    op: Literal["k_grouped_bf16_gemm_tn_contiguous"]
