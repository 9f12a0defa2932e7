"""``fp8_fp4_gemm_nt``: D[M, N] = A[M, K] · B[N, K]ᵀ with FP8 or FP4 operands, as MXFP4 layers have."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from cachebuilder.ops.scaled import Format, ScaledGemm


class Fp8Fp4GemmNt(ScaledGemm):
    """A dense layer of FP4 weight [n, k] and FP8 activations; either may be of the other format."""

    majors = (10, 12)

    op: Literal["fp8_fp4_gemm_nt"]
    a_format: Annotated[Literal["fp4"] | None, Field(description="left out: FP8")] = None
    b_format: Annotated[Literal["fp8"] | None, Field(description="left out: FP4")] = None

    @property
    def formats(self) -> tuple[Format, Format]:  # type: ignore[override]
        """Element formats of A and B."""
        return self.a_format or "fp8", self.b_format or "fp4"
