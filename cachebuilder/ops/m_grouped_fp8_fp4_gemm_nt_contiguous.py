"""``m_grouped_fp8_fp4_gemm_nt_contiguous``: FP4 expert weights and FP8 rows sorted by expert (prefill)."""

from __future__ import annotations

from typing import Literal

from cachebuilder.ops.grouped import ContiguousFp8Gemm


class MGroupedFp8Fp4GemmNtContiguous(ContiguousFp8Gemm):
    """Expert weights [experts, n, k] in FP4; FP8 rows [M, k] sorted by expert."""

    majors = (10, 12)
    formats = ("fp8", "fp4")

    op: Literal["m_grouped_fp8_fp4_gemm_nt_contiguous"]
