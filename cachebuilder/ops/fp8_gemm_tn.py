"""``fp8_gemm_tn``: D[M, N] = A[K, M]ᵀ · B[K, N] in FP8, of training's backward passes."""

from __future__ import annotations

from typing import Literal

from cachebuilder.ops.scaled import ScaledGemm


class Fp8GemmTn(ScaledGemm):
    """Weight [k, n], A transposed; M from 1 to ``max_tokens``."""

    layout = "tn"
    majors = (10, 12)

    op: Literal["fp8_gemm_tn"]
