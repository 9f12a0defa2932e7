"""``m_grouped_bf16_gemm_nt_masked``: BF16 expert layers over a fixed buffer for each expert (decode)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from cachebuilder.ops.base import Bf16K, Device, GroupedMaskedOp, N


class MGroupedBf16GemmNtMasked(GroupedMaskedOp):
    """Rows [experts, max_m, k], weights [experts, n, k]; ``expected_m`` from 1 to ``max_m``."""

    op: Literal["m_grouped_bf16_gemm_nt_masked"]
    n: N
    k: Bf16K

    def prepare(self, device: Device) -> Callable[[int], None]:
        """The full buffers: only ``expected_m`` changes from call to call."""
        a = device.empty(self.experts, self.max_m, self.k, dtype="bfloat16")
        b = device.empty(self.experts, self.n, self.k, dtype="bfloat16")
        d = device.empty(self.experts, self.max_m, self.n, dtype="bfloat16")
        rows = device.empty(self.experts, dtype="int32")
        gemm, options = self.function(device.deep_gemm), self.options()

        def call(expected_m: int) -> None:
            gemm(a, b, d, rows, expected_m, **options)

        return call
