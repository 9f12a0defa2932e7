"""``fp8_fp4_sparse_mqa_logits``: the indexer's logits at chosen blocks, of a prefill."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from cachebuilder.ops.attention import KEYS
from cachebuilder.ops.base import TokenOp
from cachebuilder.ops.device import Device
from cachebuilder.ops.sparse_attention import HeadsOp, RowsOp
from cachebuilder.ops.trial import Inputs, Trial


class Fp8Fp4SparseMqaLogits(HeadsOp, RowsOp, TokenOp):
    """Queries [rows, heads, 128], keys [tokens, 128]; called with every number of rows to ``max_tokens``."""

    variable = "rows"

    op: Literal["fp8_fp4_sparse_mqa_logits"]

    def prepare(self, device: Device) -> Callable[[int], None]:
        """Buffers for the most rows, sliced at each call, with a schedule of its own."""
        rows = self.largest_m
        q, kv = self.operand(device, None, rows, self.heads), self.operand(device, None, KEYS)
        weights = device.empty(rows, self.heads, dtype="bfloat16")
        starts, ends = self.bounds(device, None, rows)
        chosen = self.chosen(device, None, rows)
        function, options = self.function(device.deep_gemm), self.alignment()

        def call(m: int) -> None:
            schedule = self.schedule(device, starts[:m], ends[:m], chosen[:m])
            query = q.data[:m], q.scales[:m]
            function(query, kv.pair, weights[:m], schedule, self.blocks, self.block, **options)

        return call

    def trial(self, device: Device, value: int, seed: int) -> Trial:
        """``value`` rows against 1024 keys at random blocks."""
        inputs = Inputs(device, seed)
        q, kv = self.operand(device, inputs, value, self.heads), self.operand(device, inputs, KEYS)
        weights = inputs.normal(value, self.heads)
        starts, ends = self.bounds(device, inputs, value)
        chosen = self.chosen(device, inputs, value)
        schedule = self.schedule(device, starts, ends, chosen)
        logits = self.function(device.deep_gemm)(
            q.pair, kv.pair, weights, schedule, self.blocks, self.block, **self.alignment()
        )
        return self.sparse_trial(device, logits, q, kv.values, weights, self.position(device, chosen, starts), ends)
