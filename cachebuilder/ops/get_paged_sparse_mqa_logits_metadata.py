"""``get_paged_sparse_mqa_logits_metadata``: the schedule of `fp8_fp4_paged_sparse_mqa_logits`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from cachebuilder.ops.attention import KEYS, Batch
from cachebuilder.ops.device import Device
from cachebuilder.ops.sparse_attention import PagedOp
from cachebuilder.ops.trial import Inputs, Trial


class GetPagedSparseMqaLogitsMetadata(PagedOp):
    """Called with every batch to ``max_batch``; the number of blocks is a template argument."""

    variable = "batch"

    op: Literal["get_paged_sparse_mqa_logits_metadata"]
    max_batch: Batch

    def points(self, device: Device) -> range:
        """Every batch from 1 to ``max_batch``."""
        return range(1, self.max_batch + 1)

    def prepare(self, device: Device) -> Callable[[int], None]:
        """Lengths, pages and blocks of the largest batch, sliced at each call."""
        lengths = device.empty(self.max_batch, dtype="int32")
        table = device.empty(self.max_batch, KEYS // self.page_size, dtype="int32")
        chosen = self.chosen(device, None, self.max_batch)

        def call(batch: int) -> None:
            self.schedule(device, lengths[:batch], table[:batch], chosen[:batch])

        return call

    def trial(self, device: Device, value: int, seed: int) -> Trial:
        """``value`` sequences with random pages and blocks; a block's place counts blocks, page after page."""
        torch, inputs, pages = device.torch, Inputs(device, seed), KEYS // self.page_size
        numbers = inputs.integers(0, 4 * pages - 1, value * pages)
        table = torch.tensor(numbers, dtype=torch.int32, device=device.name).view(value, pages)
        lengths = torch.tensor(inputs.integers(1, self.most_keys, value), dtype=torch.int32, device=device.name)
        chosen = self.chosen(device, inputs, value)
        schedule = self.schedule(device, lengths, table, chosen)
        per_page = self.page_size // self.block
        places = table.gather(1, chosen.long() // per_page) * per_page + chosen % per_page
        return self.schedule_trial(device, schedule, places, lengths)
