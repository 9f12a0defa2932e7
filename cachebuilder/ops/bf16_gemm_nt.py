"""``bf16_gemm_nt``: D[M, N] = A[M, K] · B[N, K]ᵀ in BF16."""

from __future__ import annotations

from typing import Literal

from cachebuilder.ops.dense_bf16 import Bf16Gemm


class Bf16GemmNt(Bf16Gemm):
    """A dense BF16 layer of weight [n, k]."""

    op: Literal["bf16_gemm_nt"]
