"""``fp8_gemm_tt``: D[M, N] = A[K, M]ᵀ · B[N, K]ᵀ in FP8, of training's backward passes."""

from __future__ import annotations

from typing import Literal

from cachebuilder.ops.scaled import ScaledGemm


class Fp8GemmTt(ScaledGemm):
    """Weight [n, k], A transposed; M from 1 to ``max_tokens``."""

    layout = "tt"
    majors = (10, 12)

    op: Literal["fp8_gemm_tt"]
