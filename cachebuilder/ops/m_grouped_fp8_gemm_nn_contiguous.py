"""``m_grouped_fp8_gemm_nn_contiguous``: the same with weights [experts, k, n]."""

from __future__ import annotations

from typing import Literal

from cachebuilder.ops.grouped import ContiguousFp8Gemm


class MGroupedFp8GemmNnContiguous(ContiguousFp8Gemm):
    """Expert weights [experts, k, n]; rows [M, k] sorted by expert."""

    layout = "nn"
    majors = (10, 12)

    op: Literal["m_grouped_fp8_gemm_nn_contiguous"]
