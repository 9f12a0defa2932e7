"""What the dense BF16 ops share; their kernels accumulate in float32 and write BF16 or float32."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from cachebuilder.ops.base import Bf16K, N, TokenOp
from cachebuilder.ops.device import Device
from cachebuilder.ops.trial import Inputs, Trial, bf16_product, dense_output, product_nt


class Bf16Gemm(TokenOp):
    """A dense BF16 linear layer of weight [n, k]; D is BF16 or, as SGLang's router asks for it, FP32."""

    #: n: as it stands, t: transposed; A, then B. ``nt`` is the layout of a linear layer.
    layout: ClassVar[str] = "nt"

    n: N
    k: Bf16K
    out_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    accumulate: Annotated[Literal[True] | None, Field(description="D += A·B, as C given at the same address")] = None

    def points(self, device: Device) -> range:
        """Every M; of a transposed A every 8th, the multiples that its rows of M elements must be (TMA row stride)."""
        return range(8, self.largest_m + 1, 8) if self.layout[0] == "t" else super().points(device)

    def prepare(self, device: Device) -> Callable[[int], None]:
        """Buffers for the largest M, row-sliced at each call."""
        a = device.empty(self.largest_m * self.k, dtype="bfloat16")
        b = device.empty(*((self.n, self.k) if self.layout[1] == "t" else (self.k, self.n)), dtype="bfloat16")
        d = device.empty(self.largest_m, self.n, dtype=self.out_dtype)
        gemm, options = self.function(device.deep_gemm), self.options()

        def call(m: int) -> None:
            shape = (m, self.k) if self.layout[0] == "n" else (self.k, m)
            out = d[:m]
            gemm(a[: m * self.k].view(shape), b, out, **({"c": out} if self.accumulate else {}), **options)

        return call

    def trial(self, device: Device, value: int, seed: int) -> Trial:
        """M = ``value``; float32 product of the BF16 operands, added to what D held if it accumulates."""
        inputs = Inputs(device, seed)
        a, b = inputs.normal(value, self.k), inputs.normal(self.n, self.k)
        d, buffer = inputs.output(value, self.n, dtype=self.out_dtype)
        expected = product_nt(device.torch, a, b)
        c = {}
        if self.accumulate:
            d.copy_(inputs.normal(value, self.n, dtype="float32") * math.sqrt(self.k))
            expected += d.float()
            c = {"c": d}
        left = a if self.layout[0] == "n" else a.mT.contiguous()
        right = b if self.layout[1] == "t" else b.mT.contiguous()
        self.function(device.deep_gemm)(left, right, d, **c, **self.options())
        return Trial((dense_output(device.torch, "d", buffer, expected),))

    def reference(self, device: Device) -> Callable[[int], None]:
        """The same product of BF16 operands."""
        return bf16_product(device, self.largest_m, self.n, self.k)
