"""``fp8_fp4_mqa_logits``: the indexer's logits of a prefill, keys in one piece."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import Field

from cachebuilder.ops.attention import FEWEST_KEYS, KEYS, MqaOp, accepts, expected_logits, logits_output
from cachebuilder.ops.base import TokenOp
from cachebuilder.ops.device import Device
from cachebuilder.ops.trial import Inputs, Trial


class Fp8Fp4MqaLogits(MqaOp, TokenOp):
    """Queries [rows, heads, head_dim], keys [tokens, head_dim]; called with every number of rows to ``max_tokens``.

    A kernel differs by ``compressed``, with which each row's logits begin at its own first key
    (``max_seqlen_k``): vLLM 0.33.0 and SGLang's DeepSeek-V4 do, SGLang's DeepSeek-V3.2 does not.
    """

    variable = "rows"

    op: Literal["fp8_fp4_mqa_logits"]
    compressed: Annotated[Literal[True] | None, Field(description="max_seqlen_k is given")] = None

    def arguments(self, q: Any, scales: Any) -> Any:
        """Q as this function takes it."""
        return q, scales

    def call_options(self, device: Device, function: Callable[..., Any], keys: int) -> dict[str, Any]:
        """Keyword arguments; a DeepGEMM without ``clean_logits`` knows the compressed form only."""
        given = self.format_options(function) | self.logits_option(device, function)
        compressed = self.compressed or not accepts(function, "clean_logits")
        return given | {"max_seqlen_k": keys if compressed else 0}

    def prepare(self, device: Device) -> Callable[[int], None]:
        """Buffers for the most rows, row-sliced at each call."""
        rows = self.largest_m
        q = self.operand(device, None, True, rows, self.heads)
        kv = self.operand(device, None, False, KEYS)
        weights = device.empty(rows, self.heads, dtype=self.weights or "float32")
        starts, ends = device.empty(rows, dtype="int32"), device.empty(rows, dtype="int32")
        function = self.function(device.deep_gemm)
        options = self.call_options(device, function, KEYS)

        def call(m: int) -> None:
            scales = None if q.scales is None else q.scales[:m]
            query = self.arguments(q.data[:m], scales)
            self.check(device, function(query, kv.pair, weights[:m], starts[:m], ends[:m], **options))

        return call

    def trial(self, device: Device, value: int, seed: int) -> Trial:
        """``value`` rows against 1024 keys, each from its own first to its own last."""
        torch, inputs = device.torch, Inputs(device, seed)
        q = self.operand(device, inputs, True, value, self.heads)
        kv = self.operand(device, inputs, False, KEYS)
        weights = inputs.normal(value, self.heads, dtype=self.weights or "float32")
        starts = torch.tensor(inputs.integers(0, KEYS // 2 - FEWEST_KEYS, value), dtype=torch.int32, device=device.name)
        ends = torch.tensor(inputs.integers(KEYS // 2 + 1, KEYS, value), dtype=torch.int32, device=device.name)
        function = self.function(device.deep_gemm)
        options = self.call_options(device, function, KEYS)
        logits = function(self.arguments(*q.pair), kv.pair, weights, starts, ends, **options)
        self.check(device, logits)
        expected = expected_logits(torch, q.values.view(value, self.heads, -1), kv.values, weights)
        position = torch.arange(KEYS, device=device.name)[None]
        if options["max_seqlen_k"]:
            source = (position + starts[:, None]).clamp(max=KEYS - 1).long()
            expected, valid = expected.gather(1, source), position < (ends - starts)[:, None]
        else:
            valid = (position >= starts[:, None]) & (position < ends[:, None])
        return Trial((logits_output(device, logits[:, :KEYS], expected, valid, bool(self.weights)),))
