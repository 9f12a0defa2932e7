"""``get_sparse_mqa_logits_metadata``: the schedule of `fp8_fp4_sparse_mqa_logits`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from cachebuilder.ops.base import Device, TokenOp
from cachebuilder.ops.sparse_attention import RowsOp


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
