"""``m_grouped_bf16_gemm_nn_contiguous``: the same with weights [experts, k, n]."""

from __future__ import annotations

from typing import Literal

from cachebuilder.ops.grouped import ContiguousBf16Gemm


class MGroupedBf16GemmNnContiguous(ContiguousBf16Gemm):
    """Expert weights [experts, k, n]; rows [M, k] sorted by expert."""

    layout = "nn"

    op: Literal["m_grouped_bf16_gemm_nn_contiguous"]
