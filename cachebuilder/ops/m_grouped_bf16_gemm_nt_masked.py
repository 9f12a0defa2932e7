"""``m_grouped_bf16_gemm_nt_masked``: BF16 expert layers over a fixed buffer for each expert (decode)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from cachebuilder.ops.base import Bf16K, Device, GroupedMaskedOp, N
from cachebuilder.ops.trial import Inputs, Trial, masked_output, product_nt


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

    def trial(self, device: Device, value: int, seed: int) -> Trial:
        """``expected_m`` = ``value``; each expert's valid rows times its weight, in float32."""
        inputs = Inputs(device, seed)
        counts = inputs.expert_counts(self.experts, value, self.max_m)
        a, b = inputs.normal(self.experts, self.max_m, self.k), inputs.normal(self.experts, self.n, self.k)
        d, buffer = inputs.output(self.experts, self.max_m, self.n, dtype="bfloat16")
        self.function(device.deep_gemm)(a, b, d, counts, value, **self.options())

        def product(expert: int, count: int) -> Any:
            return product_nt(device.torch, a[expert, :count], b[expert])

        return Trial((masked_output(device.torch, "d", buffer, counts, self.max_m, product),))
