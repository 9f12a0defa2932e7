"""``einsum``: a batched BF16 GEMM, one weight for each head (MLA's absorbed projections)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Literal

from pydantic import Field

from cachebuilder.ops.base import N, TokenOp
from cachebuilder.ops.device import Device
from cachebuilder.ops.trial import Inputs, Trial, dense_output, product_nt


class Einsum(TokenOp):
    """``bhr,hdr->bhd`` or ``bhd,hdr->bhr`` with B [h, d, r]; called with every number of tokens b.

    DeepGEMM's third expression, ``bmk,bnk->mn``, is of training; no engine calls it.
    """

    op: Literal["einsum"]
    expr: Literal["bhr,hdr->bhd", "bhd,hdr->bhr"]
    h: Annotated[int, Field(ge=1, le=4096, description="heads")]
    d: N
    r: N

    @property
    def widths(self) -> tuple[int, int]:
        """A's and D's last dimension."""
        return (self.r, self.d) if self.expr == "bhr,hdr->bhd" else (self.d, self.r)

    def prepare(self, device: Device) -> Callable[[int], None]:
        """Buffers for the most tokens, sliced at each call."""
        wide, narrow = self.widths
        a = device.empty(self.largest_m, self.h, wide, dtype="bfloat16")
        b = device.empty(self.h, self.d, self.r, dtype="bfloat16")
        out = device.empty(self.largest_m, self.h, narrow, dtype="bfloat16")
        function = self.function(device.deep_gemm)

        def call(m: int) -> None:
            function(self.expr, a[:m], b, out[:m])

        return call

    def trial(self, device: Device, value: int, seed: int) -> Trial:
        """``value`` tokens; for each head the float32 product."""
        torch, inputs = device.torch, Inputs(device, seed)
        wide, narrow = self.widths
        a, b = inputs.normal(value, self.h, wide), inputs.normal(self.h, self.d, self.r)
        out, buffer = inputs.output(value, self.h, narrow, dtype="bfloat16")
        self.function(device.deep_gemm)(self.expr, a, b, out)
        weight = b if self.expr == "bhr,hdr->bhd" else b.mT
        expected = torch.stack([product_nt(torch, a[:, i], weight[i]) for i in range(self.h)], 1).flatten(0, 1)
        return Trial((dense_output(torch, "d", buffer, expected),))
