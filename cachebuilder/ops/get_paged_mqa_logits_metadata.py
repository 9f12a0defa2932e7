"""``get_paged_mqa_logits_metadata``: which SM takes which keys of which sequence in the paged logits."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import Field

from cachebuilder.ops.attention import Batch, NextN, PageSize, paged_schedule, schedule_slots
from cachebuilder.ops.base import OpBase
from cachebuilder.ops.device import Device, ceil_div
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
        """The schedule of ``value`` sequences, as SM90's and SM120's kernels define it; SM100's is one of several right
        ones, which depends on the copy, and is held to what makes it right.

        From ``include/deep_gemm/scheduler/sm90_paged_mqa_logits.cuh`` and ``sm120_paged_mqa_logits.cuh`` of
        sgl-deep-gemm 0.2.3.post2: keys in splits of 256 or 128, all sequences' splits in a row, shared out evenly, the
        SMs with one more last.
        """
        torch, inputs = device.torch, Inputs(device, seed)
        lengths = torch.tensor(inputs.integers(1, 8192, value), dtype=torch.int32)
        repeated = lengths[:, None].expand(-1, self.next_n).contiguous().to(device.name)
        found = paged_schedule(device, repeated, self.page_size, self.varlen).cpu()
        if device.major == 10:
            found = in_order(torch, found, lengths, self.next_n)
            rows = torch.ones_like(found)
        else:
            atoms = ceil_div(self.next_n, 2)
            if device.major == 9 and self.next_n == 4 and int(found[-1, 0]) == value:
                atoms = 1  # vLLM 0.33.0's copy: one unit for a pair of SMs
            slots, split = schedule_slots(device, self.next_n), 128 if device.major == 12 else 256
            expected = sm90_schedule(lengths.tolist(), slots, atoms, split)
            rows = torch.tensor(expected, dtype=torch.float32)
        everything = torch.ones_like(rows, dtype=torch.bool)
        return Trial((Output("schedule", found, rows, everything, ~everything, tolerance=0.0),))


def sm90_schedule(lengths: list[int], slots: int, atoms: int, split: int = 256) -> list[tuple[int, int]]:
    """For each SM, and behind the last: the first sequence (in units of up to two query rows) and split of its own."""
    splits = [ceil_div(length, split) for length in lengths for _ in range(atoms)]
    begins = list(itertools.accumulate(splits, initial=0))
    each, rest = divmod(begins[-1], slots)
    schedule = []
    for slot in range(slots + 1):
        start = slot * each + max(0, slot - (slots - rest))
        at = min(bisect.bisect_right(begins, start) - 1, len(splits))
        schedule.append((at, start - begins[at]))
    return schedule


def in_order(torch: Any, schedule: Any, lengths: Any, next_n: int) -> Any:
    """float32 [SMs + 1, 1], 1 where an SM's first query row and split are right for SM100.

    They are if the row is a sequence's first, which has that split, and the SM before begins no later; the first SM
    begins with the first row, and what is behind the last SM is behind the last row. A split is 256 keys in
    sgl-deep-gemm 0.1.7 and 0.2.3.post2, 384 in vLLM 0.33.0's copy (``scheduler/sm100_paged_mqa_logits.cuh``).
    """
    row, split = schedule.long().unbind(1)
    behind = len(lengths) * next_n
    splits = torch.cat((-(-lengths.long() // 256), torch.ones(1, dtype=torch.int64)))
    right = (row >= 0) & (row <= behind) & (row % next_n == 0) & (split >= 0)
    right &= split < splits[(row // next_n).clamp(0, len(lengths))]
    place = row * (1 << 20) + split
    right[1:] &= place.diff() >= 0
    right[0] &= place[0] == 0
    right[-1] &= row[-1] == behind
    return right[:, None].float()
