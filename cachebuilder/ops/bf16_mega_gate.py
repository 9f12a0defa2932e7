"""``bf16_mega_gate``: the router of experts: its GEMM, scores and top k in one kernel (DeepSeek-V4)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Literal

from pydantic import Field

from cachebuilder.ops.base import Bf16K, Device, Experts, TokenOp


class Bf16MegaGate(TokenOp):
    """x [M, hidden], weight [experts, hidden]; called with every M from 1 to ``max_tokens``."""

    majors = (10,)
    found_in = "sgl-deep-gemm 0.2.3.post2 and vLLM 0.33.0's copy"

    op: Literal["bf16_mega_gate"]
    hidden: Bf16K
    experts: Experts
    topk: Annotated[int, Field(ge=1, le=64, description="experts a token is routed to")]
    scoring: Literal["identity", "sigmoid", "softmax", "sqrtsoftplus"] = "sqrtsoftplus"
    bias: Annotated[bool, Field(description="scores are corrected by a bias before the choice")] = True

    def prepare(self, device: Device) -> Callable[[int], None]:
        """Buffers for the largest M, row-sliced at each call; arguments as vLLM 0.33.0 gives them."""
        largest = self.largest_m
        x = device.empty(largest, self.hidden, dtype="bfloat16")
        weight = device.empty(self.experts, self.hidden, dtype="bfloat16")
        bias = device.empty(self.experts, dtype="float32") if self.bias else None
        chosen = device.empty(largest, self.topk, dtype="int64")
        weights = device.empty(largest, self.topk, dtype="float32")
        function = self.function(device.deep_gemm)

        def call(m: int) -> None:
            out = (chosen[:m], weights[:m])
            function(x[:m], weight, self.topk, False, 0, 1.0, 0, scoring_func=self.scoring, bias=bias, out=out)

        return call
