"""``tf32_hc_prenorm_gemm``: hyper-connections' mixing weights, A · Bᵀ and the square sum of A's rows (DeepSeek-V4)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Literal

from pydantic import Field

from cachebuilder.ops.base import TokenOp
from cachebuilder.ops.device import Device, ceil_div
from cachebuilder.ops.trial import Inputs, Trial, dense_output, product_nt


class Tf32HcPrenormGemm(TokenOp):
    """A BF16 [M, k], B float32 [n, k]; K is split among SMs, and each number of splits is a kernel.

    Left out, the splits are the engines' own: SM count / ⌈M / 64⌉, at most ⌈k / 64⌉ / 4, at least 1, with the physical
    SM count (vLLM 0.33.0 ``kernels/mhc/tilelang_kernels.py``, ``compute_num_split``; SGLang 0.5.23
    ``kernels/ops/layernorm/mhc.py``, ``_compute_num_split_for_mhc_pre``).
    """

    op: Literal["tf32_hc_prenorm_gemm"]
    n: Annotated[int, Field(ge=8, le=64, multiple_of=8, description="mixing weights: 24 with 4 connections")]
    k: Annotated[int, Field(ge=64, le=1 << 20, multiple_of=64, description="connections · hidden size")]
    num_splits: Annotated[int | None, Field(ge=1, le=512, description="left out: the engines' formula")] = None

    def splits(self, device: Device, m: int) -> int:
        """Splits of K for M rows."""
        if self.num_splits is not None:
            return self.num_splits
        sms = device.torch.cuda.get_device_properties(0).multi_processor_count if device.name == "cuda" else 132
        return int(max(1, min(sms // ceil_div(m, 64), ceil_div(self.k, 64) // 4)))

    def prepare(self, device: Device) -> Callable[[int], None]:
        """Buffers for the largest M, sliced at each call."""
        largest = self.largest_m
        a = device.empty(largest, self.k, dtype="bfloat16")
        b = device.empty(self.n, self.k, dtype="float32")
        splits = {m: self.splits(device, m) for m in range(1, largest + 1)}
        rows = max(m * count for m, count in splits.items())
        d, squares = device.empty(rows, self.n, dtype="float32"), device.empty(rows, dtype="float32")
        function = self.function(device.deep_gemm)

        def call(m: int) -> None:
            count = splits[m]
            function(a[:m], b, d[: count * m].view(count, m, self.n), squares[: count * m].view(count, m), count)

        return call

    def trial(self, device: Device, value: int, seed: int) -> Trial:
        """M = ``value``; the sums over all splits, against float32."""
        torch, inputs = device.torch, Inputs(device, seed)
        count = self.splits(device, value)
        a, b = inputs.normal(value, self.k), inputs.normal(self.n, self.k, dtype="float32")
        d, buffer = inputs.output(count, value, self.n, dtype="float32")
        squares, square_buffer = inputs.output(count * value, 1, dtype="float32")
        self.function(device.deep_gemm)(a, b, d, squares.view(count, value), count)
        behind = (x[count * value :] for x in (buffer, square_buffer))
        wanted = product_nt(torch, a, b), a.float().square().sum(1, keepdim=True)
        sums = d.sum(0), squares.view(count, value, 1).sum(0)
        return Trial(
            tuple(
                dense_output(torch, name, torch.cat((total, rest)), expected)
                for name, total, rest, expected in zip(("d", "sqr_sum"), sums, behind, wanted, strict=True)
            )
        )
