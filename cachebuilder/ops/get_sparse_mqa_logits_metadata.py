"""``get_sparse_mqa_logits_metadata``: the schedule of `fp8_fp4_sparse_mqa_logits`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from cachebuilder.ops.base import TokenOp
from cachebuilder.ops.device import Device
from cachebuilder.ops.sparse_attention import RowsOp
from cachebuilder.ops.trial import Inputs, Trial


class GetSparseMqaLogitsMetadata(RowsOp, TokenOp):
    """Called with every number of rows to ``max_tokens``; the number of blocks is a template argument."""

    variable = "rows"

    op: Literal["get_sparse_mqa_logits_metadata"]

    def prepare(self, device: Device) -> Callable[[int], None]:
        """Bounds and blocks of the most rows, sliced at each call."""
        starts, ends = self.bounds(device, None, self.largest_m)
        chosen = self.chosen(device, None, self.largest_m)

        def call(m: int) -> None:
            self.schedule(device, starts[:m], ends[:m], chosen[:m])

        return call

    def trial(self, device: Device, value: int, seed: int) -> Trial:
        """``value`` rows with random blocks."""
        inputs = Inputs(device, seed)
        starts, ends = self.bounds(device, inputs, value)
        chosen = self.chosen(device, inputs, value)
        schedule = self.schedule(device, starts, ends, chosen)
        first_keys = self.position(device, chosen, starts)[:, :: self.block]
        return self.schedule_trial(device, schedule, first_keys, ends - starts)
