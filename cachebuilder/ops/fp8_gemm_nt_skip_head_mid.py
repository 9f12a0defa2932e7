"""``fp8_gemm_nt_skip_head_mid``: a dense FP8 layer that leaves a gap in each head of its output."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Annotated, Literal

from pydantic import Field, model_validator

from cachebuilder.ops.base import Fp8K, N, TokenOp
from cachebuilder.ops.device import Device
from cachebuilder.ops.scaled import ScaledOp
from cachebuilder.ops.trial import Inputs, Trial, dense_output, product_nt


class Fp8GemmNtSkipHeadMid(ScaledOp, TokenOp):
    """Weight [n, k]; each head's ``left + right`` columns are written around ``mid`` untouched ones."""

    op: Literal["fp8_gemm_nt_skip_head_mid"]
    found_in = "sgl-deep-gemm 0.1.4 to 0.2.3.post2 and vLLM 0.25.0's copy"

    n: N
    k: Fp8K
    left: Annotated[int, Field(ge=8, multiple_of=8, description="columns before the gap")]
    mid: Annotated[int, Field(ge=8, multiple_of=8, description="columns of the gap")]
    right: Annotated[int, Field(ge=8, multiple_of=8, description="columns behind the gap")]

    @model_validator(mode="after")
    def _check_heads(self) -> Fp8GemmNtSkipHeadMid:
        if self.n % (self.left + self.right):
            raise ValueError(f"wanted n in whole heads of left + right = {self.left + self.right}, found {self.n}")
        return self

    @property
    def heads(self) -> int:
        """Heads in a row."""
        return self.n // (self.left + self.right)

    def prepare(self, device: Device) -> Callable[[int], None]:
        """Buffers for the largest M, row-sliced at each call."""
        a = self.empty(device, 0, self.largest_m, self.k)
        weight = self.empty(device, 1, self.n, self.k).pair()
        d = device.empty(self.largest_m, self.n + self.heads * self.mid, dtype="bfloat16")
        gemm, options = self.function(device.deep_gemm), self.options()

        def call(m: int) -> None:
            gemm(a.pair(m), weight, d[:m], (self.left, self.mid, self.right), **options)

        return call

    def trial(self, device: Device, value: int, seed: int) -> Trial:
        """M = ``value``; the float32 product in the written columns, NaN left in the gaps."""
        torch, inputs = device.torch, Inputs(device, seed)
        a = self.random(device, inputs, 0, value, self.k)
        b = self.random(device, inputs, 1, self.n, self.k)
        width = self.left + self.mid + self.right
        d, buffer = inputs.output(value, self.heads * width, dtype="bfloat16")
        self.function(device.deep_gemm)(a.pair(), b.pair(), d, (self.left, self.mid, self.right), **self.options())
        column = torch.arange(self.heads * width, device=device.name)[None] % width
        gap = (column >= self.left) & (column < self.left + self.mid)
        expected = torch.zeros(value, self.heads * width, device=device.name)
        expected[:, ~gap[0]] = product_nt(torch, a.values(torch), b.values(torch))
        whole = dense_output(torch, "d", buffer, expected)
        return Trial((replace(whole, written=whole.written & ~gap, untouched=whole.untouched | gap),))
