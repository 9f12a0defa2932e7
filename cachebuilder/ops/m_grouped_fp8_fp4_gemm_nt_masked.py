"""``m_grouped_fp8_fp4_gemm_nt_masked``: FP4 expert weights and a fixed FP8 buffer for each expert (decode)."""

from __future__ import annotations

from typing import Literal

from cachebuilder.ops.grouped import MaskedFp8Gemm


class MGroupedFp8Fp4GemmNtMasked(MaskedFp8Gemm):
    """FP8 rows [experts, max_m, k], weights [experts, n, k] in FP4."""

    majors = (10, 12)
    formats = ("fp8", "fp4")

    op: Literal["m_grouped_fp8_fp4_gemm_nt_masked"]
