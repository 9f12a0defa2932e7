"""Einsums: batched GEMMs with one weight for each head, in BF16, or for each group of heads, in FP8."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import Field

from cachebuilder.ops.base import Fp8K, N, TokenOp
from cachebuilder.ops.device import Device, ceil_div, round_up
from cachebuilder.ops.scaled import ScaledOp
from cachebuilder.ops.seen import SeenCall, Sighting, require, tensor
from cachebuilder.ops.trial import Inputs, Trial, dense_output, product_nt


class Einsum(TokenOp):
    """``bhr,hdr->bhd`` or ``bhd,hdr->bhr`` with B [h, d, r], as MLA's absorbed projections; called with every b.

    DeepGEMM's third expression, ``bmk,bnk->mn``, belongs to training; no engine calls it.
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

    @classmethod
    def sighting(cls, call: SeenCall) -> Sighting:
        """All sizes from B, the tokens from A."""
        given = call.by_name("expr", "a", "b", "d", "c", "use_cublaslt")
        require(given["expr"] in ("bhr,hdr->bhd", "bhd,hdr->bhr"), f"the expression {given['expr']}")
        require(given["c"] is None and not given["use_cublaslt"], "c or use_cublaslt")
        h, d, r = tensor(given["b"], 3, "bfloat16").shape
        return Sighting({"expr": given["expr"], "h": h, "d": d, "r": r}, tensor(given["a"], 3, "bfloat16").shape[0])

    def prepare(self, device: Device) -> Callable[[int], None]:
        """Buffers for the most tokens, sliced at each call."""
        width_in, width_out = self.widths
        a = device.empty(self.largest_m, self.h, width_in, dtype="bfloat16")
        b = device.empty(self.h, self.d, self.r, dtype="bfloat16")
        out = device.empty(self.largest_m, self.h, width_out, dtype="bfloat16")
        function = self.function(device.deep_gemm)

        def call(m: int) -> None:
            function(self.expr, a[:m], b, out[:m])

        return call

    def trial(self, device: Device, value: int, seed: int) -> Trial:
        """``value`` tokens; for each head the float32 product."""
        torch, inputs = device.torch, Inputs(device, seed)
        width_in, width_out = self.widths
        a, b = inputs.normal(value, self.h, width_in), inputs.normal(self.h, self.d, self.r)
        out, buffer = inputs.output(value, self.h, width_out, dtype="bfloat16")
        self.function(device.deep_gemm)(self.expr, a, b, out)
        weight = b if self.expr == "bhr,hdr->bhd" else b.mT
        expected = torch.stack([product_nt(torch, a[:, i], weight[i]) for i in range(self.h)], 1).flatten(0, 1)
        return Trial((dense_output(torch, "d", buffer, expected),))


class Fp8Einsum(ScaledOp, TokenOp):
    """``bhr,hdr->bhd`` in FP8, DeepSeek-V4's output projection; called with every number of tokens.

    A is [tokens, h, r], B [h, d, r], D [tokens, h, d]. The other two expressions that DeepGEMM has on SM100 belong to
    training; no engine calls them.
    """

    op: Literal["fp8_einsum"]
    h: Annotated[int, Field(ge=1, le=4096, description="groups")]
    d: N
    r: Fp8K

    @classmethod
    def sighting(cls, call: SeenCall) -> Sighting:
        """All sizes from B, the tokens from A."""
        given = call.by_name("expr", "a", "b", "d", "c", "recipe")
        require(given["expr"] == "bhr,hdr->bhd" and given["c"] is None, f"the expression {given['expr']}, or c")
        a, b, fields = cls.scaled_fields(given, given["a"], given["b"])
        h, d, r = tensor(b, 3, "float8_e4m3fn").shape
        return Sighting({"h": h, "d": d, "r": r} | fields, tensor(a, 3, "float8_e4m3fn").shape[0])

    def prepare(self, device: Device) -> Callable[[int], None]:
        """Buffers for the most tokens, sliced at each call; the scales of A as the engines' own kernels write them."""
        tokens, (_, columns) = self.largest_m, self.blocks[0]
        a = device.empty(tokens, self.h, self.r, dtype="float8_e4m3fn")
        weight = self.operand(device, None, 1, self.h, self.d, self.r).pair()
        out = device.empty(tokens, self.h, self.d, dtype="bfloat16")
        words = ceil_div(self.r, 4 * columns)
        packed = device.empty(self.h * words * round_up(tokens, 4), dtype="int32")
        plain = device.empty(tokens, self.h, ceil_div(self.r, columns), dtype="float32")
        function, options = self.function(device.deep_gemm), self.options()

        def call(m: int) -> None:
            scales = plain[:m]
            if self.packed:
                aligned = round_up(m, 4)
                scales = packed[: self.h * words * aligned].view(self.h, words, aligned).permute(2, 0, 1)[:m]
            function("bhr,hdr->bhd", (a[:m], scales), weight, out[:m], **options)

        return call

    def options(self) -> dict[str, Any]:
        """The recipe; this function has no other option."""
        options = super().options()
        return {"recipe": options["recipe"]} if "recipe" in options else {}

    def trial(self, device: Device, value: int, seed: int) -> Trial:
        """``value`` tokens; for each group the float32 product of the dequantised operands."""
        torch, inputs = device.torch, Inputs(device, seed)
        a = self.operand(device, inputs, 0, self.h, value, self.r)
        b = self.operand(device, inputs, 1, self.h, self.d, self.r)
        data, scales = (x.permute(1, 0, 2) for x in a.pair())
        out, buffer = inputs.output(value, self.h, self.d, dtype="bfloat16")
        pair = (data.contiguous(), scales if self.packed else scales.contiguous())
        self.function(device.deep_gemm)("bhr,hdr->bhd", pair, b.pair(), out, **self.options())
        products = [product_nt(torch, a.values(torch, i), b.values(torch, i)) for i in range(self.h)]
        return Trial((dense_output(torch, "d", buffer, torch.stack(products, 1).flatten(0, 1)),))
