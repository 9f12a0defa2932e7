"""``bf16_gemm_nt``: D[M, N] = A[M, K] · B[N, K]ᵀ in BF16."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from cachebuilder.ops.base import Bf16K, Device, N, TokenOp
from cachebuilder.ops.trial import Inputs, Trial, dense_output, product_nt


class Bf16GemmNt(TokenOp):
    """A dense BF16 linear layer of weight [n, k]; D is BF16 or, as SGLang's router asks for it, FP32."""

    op: Literal["bf16_gemm_nt"]
    n: N
    k: Bf16K
    out_dtype: Literal["bfloat16", "float32"] = "bfloat16"

    def prepare(self, device: Device) -> Callable[[int], None]:
        """Buffers for the largest M, row-sliced at each call."""
        a = device.empty(self.largest_m, self.k, dtype="bfloat16")
        b = device.empty(self.n, self.k, dtype="bfloat16")
        d = device.empty(self.largest_m, self.n, dtype=self.out_dtype)
        gemm, options = self.function(device.deep_gemm), self.options()

        def call(m: int) -> None:
            gemm(a[:m], b, d[:m], **options)

        return call

    def trial(self, device: Device, value: int, seed: int) -> Trial:
        """M = ``value``; float32 product of the BF16 operands."""
        inputs = Inputs(device, seed)
        a, b = inputs.normal(value, self.k), inputs.normal(self.n, self.k)
        d, buffer = inputs.output(value, self.n, dtype=self.out_dtype)
        self.function(device.deep_gemm)(a, b, d, **self.options())
        return Trial((dense_output(device.torch, "d", buffer, product_nt(device.torch, a, b)),))
