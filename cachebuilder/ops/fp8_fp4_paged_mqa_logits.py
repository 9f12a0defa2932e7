"""``fp8_fp4_paged_mqa_logits``: the indexer's logits of a decode step, keys in cache pages."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import Field

from cachebuilder.ops.attention import (
    FEWEST_KEYS,
    KEYS,
    Batch,
    MqaOp,
    NextN,
    PageSize,
    expected_logits,
    logits_output,
    paged_schedule,
    schedule_slots,
)
from cachebuilder.ops.device import Device
from cachebuilder.ops.trial import Inputs, Trial


class Fp8Fp4PagedMqaLogits(MqaOp):
    """Queries [batch, next_n, heads, head_dim] over a paged cache; called with every batch to ``max_batch``."""

    variable = "batch"

    op: Literal["fp8_fp4_paged_mqa_logits"]
    max_batch: Batch
    next_n: NextN = 1
    page_size: PageSize = 64
    varlen: Annotated[Literal[True] | None, Field(description="rows of one sequence told apart by indices")] = None

    def unsupported(self, major: int) -> str | None:
        """Indices are Blackwell's."""
        return "varlen is Blackwell's" if major == 9 and self.varlen else super().unsupported(major)

    def points(self, device: Device) -> range:
        """Every batch from 1 to ``max_batch``."""
        return range(1, self.max_batch + 1)

    def arguments(self, q: Any, scales: Any) -> Any:
        """Q as this function takes it."""
        return q, scales

    def call_options(self, device: Device, function: Callable[..., Any], batch: int) -> dict[str, Any]:
        """Keyword arguments of a call of ``batch`` sequences."""
        given = self.format_options(function) | self.logits_option(device, function)
        if self.varlen:
            given["indices"] = device.torch.arange(batch, dtype=device.torch.int32, device=device.name)
        return given

    def prepare(self, device: Device) -> Callable[[int], None]:
        """Buffers for the largest batch, sliced at each call."""
        batch, pages = self.max_batch, KEYS // self.page_size
        q = self.operand(device, None, True, batch, self.next_n, self.heads)
        cache = self.operand(device, None, False, KEYS).pages(device.torch, self.page_size)
        weights = device.empty(batch * self.next_n, self.heads, dtype=self.weights or "float32")
        lengths = device.empty(batch, self.next_n, dtype="int32")
        table = device.empty(batch, pages, dtype="int32")
        schedule = device.empty(schedule_slots(device, self.next_n) + 1, 2, dtype="int32")
        function = self.function(device.deep_gemm)
        options = self.call_options(device, function, batch)
        indices = options.pop("indices", None)

        def call(size: int) -> None:
            query = self.arguments(q.data[:size], None if q.scales is None else q.scales[:size])
            some = options if indices is None else options | {"indices": indices[:size]}
            rows = weights[: size * self.next_n]
            self.check(device, function(query, cache, rows, lengths[:size], table[:size], schedule, KEYS, **some))

        return call

    def trial(self, device: Device, value: int, seed: int) -> Trial:
        """``value`` sequences of up to 1024 keys in shuffled pages; the schedule is DeepGEMM's own."""
        torch, inputs = device.torch, Inputs(device, seed)
        pages, rows = KEYS // self.page_size, value * self.next_n
        q = self.operand(device, inputs, True, value, self.next_n, self.heads)
        keys = self.operand(device, inputs, False, 4 * KEYS)
        weights = inputs.normal(rows, self.heads, dtype=self.weights or "float32")
        table = torch.tensor(inputs.integers(0, 4 * pages - 1, value * pages), dtype=torch.int32).view(value, pages)
        fewest = self.next_n + FEWEST_KEYS if self.weights else self.next_n
        lengths = torch.tensor(inputs.integers(fewest, KEYS, value), dtype=torch.int32)[:, None]
        lengths = (lengths - self.next_n + 1 + torch.arange(self.next_n, dtype=torch.int32)).contiguous()
        table, lengths = table.to(device.name), lengths.to(device.name)
        schedule = paged_schedule(device, lengths, self.page_size, self.varlen)
        function = self.function(device.deep_gemm)
        cache = keys.pages(torch, self.page_size)
        options = self.call_options(device, function, value)
        logits = function(self.arguments(*q.pair), cache, weights, lengths, table, schedule, KEYS, **options)
        self.check(device, logits)
        values = keys.values.view(4 * pages, self.page_size, -1)
        queries = q.values.view(value, self.next_n, self.heads, -1)
        expected = torch.cat(
            [
                expected_logits(
                    torch, queries[i], values[table[i].long()].flatten(0, 1), weights.view(value, -1, self.heads)[i]
                )
                for i in range(value)
            ]
        )
        valid = torch.arange(KEYS, device=device.name)[None] < lengths.view(rows, 1)
        return Trial((logits_output(device, logits, expected, valid, bool(self.weights)),))
