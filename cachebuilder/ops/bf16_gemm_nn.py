"""``bf16_gemm_nn``: D[M, N] = A[M, K] · B[K, N] in BF16; SGLang's batch-invariant mode calls it."""

from __future__ import annotations

from typing import Literal

from cachebuilder.ops.dense_bf16 import Bf16Gemm


class Bf16GemmNn(Bf16Gemm):
    """A dense BF16 layer of weight [k, n]."""

    layout = "nn"

    op: Literal["bf16_gemm_nn"]
