"""``bf16_gemm_tt``: D[M, N] = A[K, M]ᵀ · B[N, K]ᵀ in BF16."""

from __future__ import annotations

from typing import Literal

from cachebuilder.ops.dense_bf16 import Bf16Gemm


class Bf16GemmTt(Bf16Gemm):
    """A dense BF16 layer of weight [n, k], A transposed."""

    layout = "tt"

    op: Literal["bf16_gemm_tt"]
