"""``fp8_gemm_nt``: D[M, N] = A[M, K] · B[N, K]ᵀ in FP8 with 1×128 and 128×128 scales; the block-FP8 linear layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from cachebuilder.ops.base import Device, Fp8K, N, TokenOp


class Fp8GemmNt(TokenOp):
    """A dense FP8 linear layer of weight [n, k], called with every M from 1 to ``max_tokens``."""

    op: Literal["fp8_gemm_nt"]
    n: N
    k: Fp8K

    def prepare(self, device: Device) -> Callable[[int], None]:
        """Buffers for the largest M, row-sliced at each call."""
        a, sfa = device.fp8_rows(self.largest_m, self.k)
        b = device.fp8_blocks(self.n, self.k)
        d = device.empty(self.largest_m, self.n, dtype="bfloat16")
        gemm, options = self.function(device.deep_gemm), self.options()

        def call(m: int) -> None:
            gemm((a[:m], sfa[:m]), b, d[:m], **options)

        return call
