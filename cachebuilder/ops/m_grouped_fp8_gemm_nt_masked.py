"""``m_grouped_fp8_gemm_nt_masked``: FP8 expert layers over a fixed buffer for each expert (decode)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from cachebuilder.ops.base import FP8_BLOCK, Device, Fp8K, GroupedMaskedOp, N
from cachebuilder.ops.trial import Inputs, Trial, dequantise, masked_output, product_nt


class MGroupedFp8GemmNtMasked(GroupedMaskedOp):
    """Rows [experts, max_m, k], weights [experts, n, k]; ``expected_m`` from 1 to ``max_m``."""

    entry_points = ("m_grouped_fp8_gemm_nt_masked", "fp8_m_grouped_gemm_nt_masked")

    op: Literal["m_grouped_fp8_gemm_nt_masked"]
    n: N
    k: Fp8K

    def prepare(self, device: Device) -> Callable[[int], None]:
        """The full buffers: only ``expected_m`` changes from call to call."""
        a = device.fp8_rows(self.experts, self.max_m, self.k)
        b = device.fp8_blocks(self.experts, self.n, self.k)
        d = device.empty(self.experts, self.max_m, self.n, dtype="bfloat16")
        rows = device.empty(self.experts, dtype="int32")
        gemm, options = self.function(device.deep_gemm), self.options()

        def call(expected_m: int) -> None:
            gemm(a, b, d, rows, expected_m, **options)

        return call

    def trial(self, device: Device, value: int, seed: int) -> Trial:
        """``expected_m`` = ``value``; each expert's valid rows times its dequantised weight, in float32."""
        inputs = Inputs(device, seed)
        counts = inputs.expert_counts(self.experts, value, self.max_m)
        a, sfa = inputs.fp8_rows(self.experts, self.max_m, self.k)
        b, sfb = inputs.fp8_blocks(self.experts, self.n, self.k)
        d, buffer = inputs.output(self.experts, self.max_m, self.n, dtype="bfloat16")
        self.function(device.deep_gemm)((a, sfa), (b, sfb), d, counts, value, **self.options())

        def product(expert: int, count: int) -> Any:
            rows = dequantise(a[expert, :count], sfa[expert, :count], rows=1)
            return product_nt(device.torch, rows, dequantise(b[expert], sfb[expert], rows=FP8_BLOCK))

        return Trial((masked_output(device.torch, "d", buffer, counts, self.max_m, product),))
