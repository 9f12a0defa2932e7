"""``bf16_gemm_tn``: D[M, N] = A[K, M]ᵀ · B[K, N] in BF16."""

from __future__ import annotations

from typing import Literal

from cachebuilder.ops.dense_bf16 import Bf16Gemm


class Bf16GemmTn(Bf16Gemm):
    """A dense BF16 layer of weight [k, n], A transposed."""

    layout = "tn"

    op: Literal["bf16_gemm_tn"]
