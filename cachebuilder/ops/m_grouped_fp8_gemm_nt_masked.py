"""``m_grouped_fp8_gemm_nt_masked``: FP8 expert layers over a fixed buffer for each expert (decode)."""

from __future__ import annotations

from typing import Literal

from cachebuilder.ops.grouped import MaskedFp8Gemm


class MGroupedFp8GemmNtMasked(MaskedFp8Gemm):
    """Rows [experts, max_m, k], weights [experts, n, k]."""

    entry_points = ("m_grouped_fp8_gemm_nt_masked", "fp8_m_grouped_gemm_nt_masked")

    op: Literal["m_grouped_fp8_gemm_nt_masked"]
