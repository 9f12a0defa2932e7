"""``fp8_gemm_nn``: D[M, N] = A[M, K] · B[K, N] in FP8, of training's backward passes."""

from __future__ import annotations

from typing import Literal

from cachebuilder.ops.scaled import ScaledGemm


class Fp8GemmNn(ScaledGemm):
    """Weight [k, n]; M from 1 to ``max_tokens``."""

    layout = "nn"
    majors = (10, 12)

    op: Literal["fp8_gemm_nn"]
