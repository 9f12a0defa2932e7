"""``fp8_gemm_nt``: D[M, N] = A[M, K] · B[N, K]ᵀ in FP8 with block scales; the FP8 linear layer."""

from __future__ import annotations

from typing import Literal

from cachebuilder.ops.scaled import ScaledGemm


class Fp8GemmNt(ScaledGemm):
    """A dense FP8 linear layer of weight [n, k]."""

    op: Literal["fp8_gemm_nt"]
