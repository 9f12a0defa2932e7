"""``m_grouped_bf16_gemm_nt_contiguous``: BF16 expert layers over rows sorted by expert (prefill)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from cachebuilder.ops.base import Bf16K, Device, GroupedContiguousOp, N
from cachebuilder.ops.trial import Inputs, Trial, contiguous_output, product_nt


class MGroupedBf16GemmNtContiguous(GroupedContiguousOp):
    """Expert weights [experts, n, k]; rows [M, k] sorted by expert, M a multiple of DeepGEMM's alignment."""

    op: Literal["m_grouped_bf16_gemm_nt_contiguous"]
    n: N
    k: Bf16K

    def prepare(self, device: Device) -> Callable[[int], None]:
        """Buffers for the largest number of rows, row-sliced at each call."""
        rows = max(self.points(device))
        a = device.empty(rows, self.k, dtype="bfloat16")
        b = device.empty(self.experts, self.n, self.k, dtype="bfloat16")
        d = device.empty(rows, self.n, dtype="bfloat16")
        expert_of_row = device.empty(rows, dtype="int32")
        gemm, options = self.function(device.deep_gemm), self.options()

        def call(m: int) -> None:
            gemm(a[:m], b, d[:m], expert_of_row[:m], **options)

        return call

    def trial(self, device: Device, value: int, seed: int) -> Trial:
        """M = ``value``; each row's float32 product with its own expert's weight."""
        inputs = Inputs(device, seed)
        alignment = self.points(device).step
        expert_of_row = inputs.expert_rows(value, self.experts, alignment)
        a, b = inputs.normal(value, self.k), inputs.normal(self.experts, self.n, self.k)
        d, buffer = inputs.output(value, self.n, dtype="bfloat16")
        self.function(device.deep_gemm)(a, b, d, expert_of_row, **self.options())

        def product(expert: int, rows: Any) -> Any:
            return product_nt(device.torch, a[rows], b[expert])

        return Trial((contiguous_output(device.torch, "d", buffer, expert_of_row, product),))
