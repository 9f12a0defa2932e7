"""``fp8_gemm_nt``: D[M, N] = A[M, K] · B[N, K]ᵀ in FP8 with 1×128 and 128×128 scales; the block-FP8 linear layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from cachebuilder.ops.base import FP8_BLOCK, Device, Fp8K, N, TokenOp
from cachebuilder.ops.trial import Inputs, Trial, dense_output, dequantise, product_nt


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

    def trial(self, device: Device, value: int, seed: int) -> Trial:
        """M = ``value``; float32 product of the dequantised operands."""
        inputs = Inputs(device, seed)
        a, b = inputs.fp8_rows(value, self.k), inputs.fp8_blocks(self.n, self.k)
        d, buffer = inputs.output(value, self.n, dtype="bfloat16")
        self.function(device.deep_gemm)(a, b, d, **self.options())
        expected = product_nt(device.torch, dequantise(*a, rows=1), dequantise(*b, rows=FP8_BLOCK))
        return Trial((dense_output(device.torch, "d", buffer, expected),))
