"""``m_grouped_bf16_gemm_nt_masked``: BF16 expert layers over a fixed buffer for each expert (decode)."""

from __future__ import annotations

from typing import Literal

from cachebuilder.ops.grouped import MaskedBf16Gemm


class MGroupedBf16GemmNtMasked(MaskedBf16Gemm):
    """Rows [experts, max_m, k], weights [experts, n, k]."""

    op: Literal["m_grouped_bf16_gemm_nt_masked"]
