"""``k_grouped_fp8_gemm_nt_contiguous``: the experts' weight gradient in FP8, K-major operands."""

from __future__ import annotations

from typing import Literal

from cachebuilder.ops.k_grouped import KGroupedGemm


class KGroupedFp8GemmNtContiguous(KGroupedGemm):
    """Each expert's A [m, K] and B [n, K], one expert after another; SM90's form."""

    k_major = True
    majors = (9, 12)

    op: Literal["k_grouped_fp8_gemm_nt_contiguous"]
