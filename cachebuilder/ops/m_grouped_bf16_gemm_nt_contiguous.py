"""``m_grouped_bf16_gemm_nt_contiguous``: BF16 expert layers over rows sorted by expert (prefill)."""

from __future__ import annotations

from typing import Literal

from cachebuilder.ops.grouped import ContiguousBf16Gemm


class MGroupedBf16GemmNtContiguous(ContiguousBf16Gemm):
    """Expert weights [experts, n, k]; rows [M, k] sorted by expert, M a multiple of DeepGEMM's alignment."""

    op: Literal["m_grouped_bf16_gemm_nt_contiguous"]
