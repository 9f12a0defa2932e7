"""``get_paged_mqa_logits_metadata``: which SM takes which keys of which sequence in the paged logits."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable
from typing import Annotated, Literal

from pydantic import Field

from cachebuilder.ops.attention import Batch, NextN, PageSize, paged_schedule, schedule_slots
from cachebuilder.ops.base import Device, OpBase, ceil_div
from cachebuilder.ops.trial import Inputs, Output, Trial


class GetPagedMqaLogitsMetadata(OpBase):
    """Context lengths [batch, next_n]; called with every batch to ``max_batch``.

    On SM90 and SM120 each 32 sequences more are another kernel.
    """

    variable = "batch"

    op: Literal["get_paged_mqa_logits_metadata"]
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

    def prepare(self, device: Device) -> Callable[[int], None]:
        """Context lengths of the largest batch, sliced at each call."""
        lengths = device.empty(self.max_batch, self.next_n, dtype="int32")

        def call(batch: int) -> None:
            paged_schedule(device, lengths[:batch], self.page_size, self.varlen)

        return call

    def trial(self, device: Device, value: int, seed: int) -> Trial:
        """The schedule of ``value`` sequences, as SM90's kernel defines it.

        From ``include/deep_gemm/scheduler/sm90_paged_mqa_logits.cuh`` of sgl-deep-gemm 0.2.3.post2: keys in splits of
        256, all sequences' splits in a row, shared out evenly, the SMs with one more last.

        Raises:
            NotImplementedError: another arch than SM90, whose schedules are laid out differently.
        """
        if device.name == "cuda" and device.major != 9:
            raise NotImplementedError("no reference for Blackwell's schedules")
        inputs = Inputs(device, seed)
        lengths = device.torch.tensor(inputs.integers(1, 8192, value), dtype=device.torch.int32)
        repeated = lengths[:, None].expand(-1, self.next_n).contiguous().to(device.name)
        found = paged_schedule(device, repeated, self.page_size, self.varlen)
        expected = sm90_schedule(lengths.tolist(), schedule_slots(device, self.next_n), ceil_div(self.next_n, 2))
        rows = device.torch.tensor(expected, dtype=device.torch.float32, device=device.name)
        everything = device.torch.ones_like(rows, dtype=device.torch.bool)
        return Trial((Output("schedule", found, rows, everything, ~everything, tolerance=0.0),))


def sm90_schedule(lengths: list[int], slots: int, atoms: int) -> list[tuple[int, int]]:
    """For each SM, and behind the last: the first sequence (in units of up to two query rows) and split of its own."""
    splits = [ceil_div(length, 256) for length in lengths for _ in range(atoms)]
    begins = list(itertools.accumulate(splits, initial=0))
    each, rest = divmod(begins[-1], slots)
    schedule = []
    for slot in range(slots + 1):
        start = slot * each + max(0, slot - (slots - rest))
        at = min(bisect.bisect_right(begins, start) - 1, len(splits))
        schedule.append((at, start - begins[at]))
    return schedule
