"""``fp8_fp4_paged_sparse_mqa_logits``: the indexer's logits at chosen blocks, of a decode step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from cachebuilder.ops.attention import FEWEST_KEYS, KEYS, Batch
from cachebuilder.ops.device import Device
from cachebuilder.ops.sparse_attention import HEAD_DIM, HeadsOp, PagedOp
from cachebuilder.ops.trial import Inputs, Trial


class Fp8Fp4PagedSparseMqaLogits(HeadsOp, PagedOp):
    """Queries [batch, 1, heads, 128] over a paged cache; called with every batch to ``max_batch``."""

    variable = "batch"

    op: Literal["fp8_fp4_paged_sparse_mqa_logits"]
    max_batch: Batch

    def points(self, device: Device) -> range:
        """Every batch from 1 to ``max_batch``."""
        return range(1, self.max_batch + 1)

    def prepare(self, device: Device) -> Callable[[int], None]:
        """Buffers for the largest batch, sliced at each call."""
        batch, pages = self.max_batch, KEYS // self.page_size
        q = self.operand(device, None, batch, 1, self.heads)
        cache, _ = self.cache(device, None, pages)
        weights = device.empty(batch, self.heads, dtype="bfloat16")
        lengths, table = device.empty(batch, dtype="int32"), device.empty(batch, pages, dtype="int32")
        chosen = self.chosen(device, None, batch)
        function = self.function(device.deep_gemm)

        def call(size: int) -> None:
            schedule = self.schedule(device, lengths[:size], table[:size], chosen[:size])
            query = q.data[:size], q.scales[:size]
            function(query, cache, weights[:size], schedule, self.blocks, self.block)

        return call

    def trial(self, device: Device, value: int, seed: int) -> Trial:
        """``value`` sequences of 64 keys and more in shuffled pages, at random blocks."""
        torch, inputs, pages = device.torch, Inputs(device, seed), KEYS // self.page_size
        q = self.operand(device, inputs, value, 1, self.heads)
        cache, keys = self.cache(device, inputs, 4 * pages)
        weights = inputs.normal(value, self.heads)
        numbers = inputs.integers(0, 4 * pages - 1, value * pages)
        table = torch.tensor(numbers, dtype=torch.int32, device=device.name).view(value, pages)
        lengths = torch.tensor(
            inputs.integers(FEWEST_KEYS, self.most_keys, value), dtype=torch.int32, device=device.name
        )
        chosen = self.chosen(device, inputs, value)
        schedule = self.schedule(device, lengths, table, chosen)
        logits = self.function(device.deep_gemm)(q.pair, cache, weights, schedule, self.blocks, self.block)
        own = keys.values.view(4 * pages, self.page_size, HEAD_DIM)[table.long()].flatten(1, 2)
        position = self.position(device, chosen, torch.zeros_like(lengths))
        return self.sparse_trial(device, logits, q, own, weights, position, lengths)
