"""``m_grouped_fp8_gemm_nt_contiguous``: FP8 expert layers over rows sorted by expert (prefill)."""

from __future__ import annotations

from typing import Literal

from cachebuilder.ops.grouped import ContiguousFp8Gemm


class MGroupedFp8GemmNtContiguous(ContiguousFp8Gemm):
    """Expert weights [experts, n, k]; rows [M, k] sorted by expert, M a multiple of DeepGEMM's alignment."""

    op: Literal["m_grouped_fp8_gemm_nt_contiguous"]
