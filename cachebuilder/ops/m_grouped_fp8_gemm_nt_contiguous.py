"""``m_grouped_fp8_gemm_nt_contiguous``: FP8 expert layers over rows sorted by expert (prefill)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from cachebuilder.ops.base import FP8_BLOCK, Device, Fp8K, GroupedContiguousOp, N
from cachebuilder.ops.trial import Inputs, Trial, contiguous_output, dequantise, product_nt


class MGroupedFp8GemmNtContiguous(GroupedContiguousOp):
    """Expert weights [experts, n, k]; rows [M, k] sorted by expert, M a multiple of DeepGEMM's alignment."""

    op: Literal["m_grouped_fp8_gemm_nt_contiguous"]
    n: N
    k: Fp8K

    def prepare(self, device: Device) -> Callable[[int], None]:
        """Buffers for the largest number of rows, row-sliced at each call."""
        rows = max(self.points(device))
        a, sfa = device.fp8_rows(rows, self.k)
        b = device.fp8_blocks(self.experts, self.n, self.k)
        d = device.empty(rows, self.n, dtype="bfloat16")
        expert_of_row = device.empty(rows, dtype="int32")
        gemm, options = self.function(device.deep_gemm), self.options()

        def call(m: int) -> None:
            gemm((a[:m], sfa[:m]), b, d[:m], expert_of_row[:m], **options)

        return call

    def trial(self, device: Device, value: int, seed: int) -> Trial:
        """M = ``value``; each row's float32 product with its own expert's dequantised weight."""
        inputs = Inputs(device, seed)
        alignment = self.points(device).step
        expert_of_row = inputs.expert_rows(value, self.experts, alignment)
        (a, sfa), (b, sfb) = inputs.fp8_rows(value, self.k), inputs.fp8_blocks(self.experts, self.n, self.k)
        d, buffer = inputs.output(value, self.n, dtype="bfloat16")
        self.function(device.deep_gemm)((a, sfa), (b, sfb), d, expert_of_row, **self.options())

        def product(expert: int, rows: Any) -> Any:
            weight = dequantise(b[expert], sfb[expert], rows=FP8_BLOCK)
            return product_nt(device.torch, dequantise(a[rows], sfa[rows], rows=1), weight)

        return Trial((contiguous_output(device.torch, "d", buffer, expert_of_row, product),))
