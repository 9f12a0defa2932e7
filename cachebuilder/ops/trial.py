"""One call of an op on random inputs, and the result in higher precision that a real GPU's result is compared with.

Inputs are quantised as the engines quantise them. The expected result is computed in float32 from the quantised values,
so the difference is the kernel's own error. Outputs are filled with NaN before the call, which shows every element that
the kernel should have written and did not, or should have left alone and did not.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from cachebuilder.ops.device import Device, round_up

#: Rows allocated behind every output: no kernel's tile is taller, so a tile that overruns the output ends in them.
GUARD_ROWS = 256
#: The largest relative error accepted. BF16 output alone costs 1.7e-3 (uniform rounding to 8 bits of significand);
#: 5e-3 also allows for the tensor cores' shorter FP8 accumulation, and for no wrong element.
TOLERANCE = 5e-3
#: One row's error may be this many times `TOLERANCE`: a row has few elements, and norms of few elements scatter.
ROW_FACTOR = 4


@dataclass(frozen=True)
class Output:
    """One tensor that DeepGEMM wrote, and what it should hold.

    Attributes:
        name: the argument's name in DeepGEMM's signature.
        actual: the tensor after the call with the `GUARD_ROWS` behind it; NaN before the call.
        expected: float32, of the same shape; any value where nothing is expected.
        written: bool, broadcastable to the shape: elements that must be as expected.
        untouched: bool, broadcastable to the shape: elements that must still be NaN. Elements in neither mask, such as
            the padding rows of an expert's last block, may hold anything.
        tolerance: the largest relative error accepted.
    """

    name: str
    actual: Any
    expected: Any
    written: Any
    untouched: Any
    tolerance: float = TOLERANCE

    def relative_error(self) -> float:
        """‖actual − expected‖ / ‖expected‖ over the written elements (Frobenius norm); NaN if one of them is NaN."""
        difference, expected = self._compared()
        return _ratio(difference.norm().item(), expected.norm().item())

    def worst_row_error(self) -> float:
        """The largest such ratio of a single row; NaN if an element is NaN."""
        difference, expected = (x.flatten(0, -2).norm(dim=-1) for x in self._compared())
        ratios = difference / expected.clamp(min=1e-30)
        return float(ratios.max().item()) if ratios.numel() else 0.0

    def touched(self) -> int:
        """How many elements were written that must not be written."""
        return int((~self.actual.isnan() & self.untouched).sum().item())

    def problem(self) -> str | None:
        """What is wrong with this output, in one sentence; None if it is right."""
        if count := self.touched():
            return f"{self.name}: {count} elements were written that must not be"
        whole, row = self.relative_error(), self.worst_row_error()
        if not whole <= self.tolerance:  # true for NaN
            return f"{self.name}: relative error {whole:.2e}, wanted at most {self.tolerance:.0e}"
        if not row <= ROW_FACTOR * self.tolerance:
            return f"{self.name}: relative error {row:.2e} in one row, wanted at most {ROW_FACTOR * self.tolerance:.0e}"
        return None

    def _compared(self) -> tuple[Any, Any]:
        skipped = ~self.written
        return (self.actual.float() - self.expected).masked_fill(skipped, 0), self.expected.masked_fill(skipped, 0)


def _ratio(difference: float, norm: float) -> float:
    if norm == 0:
        return 0.0 if difference == 0 else math.inf
    return difference / norm


@dataclass(frozen=True)
class Trial:
    """All outputs of one call."""

    outputs: tuple[Output, ...]

    def relative_error(self) -> float:
        """The largest of the outputs' errors; NaN if one is NaN."""
        errors = [output.relative_error() for output in self.outputs]
        return math.nan if any(map(math.isnan, errors)) else max(errors)

    def problems(self) -> list[str]:
        """One sentence for each wrong output; empty if all are right."""
        return [problem for output in self.outputs if (problem := output.problem())]


class Inputs:
    """Random inputs of one trial, the same for the same seed on the same device."""

    def __init__(self, device: Device, seed: int) -> None:
        self._device = device
        self._torch = device.torch
        self._generator = device.torch.Generator(device.name).manual_seed(seed)

    def normal(self, *shape: int, dtype: str = "bfloat16") -> Any:
        """Standard normal values."""
        values = self._device.empty(*shape, dtype="float32").normal_(generator=self._generator)
        return values.to(getattr(self._torch, dtype))

    def integers(self, low: int, high: int, count: int) -> list[int]:
        """``count`` integers from ``low`` to ``high``, both included."""
        values = self._device.empty(count, dtype="int64").random_(low, high + 1, generator=self._generator)
        return [int(value) for value in values.tolist()]

    def expert_rows(self, m: int, experts: int, alignment: int) -> Any:
        """int32 ``[M]``: the expert of each row, ascending, −1 for padding.

        Each expert's rows fill blocks of ``alignment`` rows, the last of which ends in padding; the last eighth of
        the blocks is padding only, as in vLLM's worst-case buffers (0.33.0, ``fused_moe/deep_gemm_utils.py``).
        """
        rows = self._torch.full((m,), -1, dtype=self._torch.int32)
        blocks = m // alignment
        owners = sorted(self.integers(0, experts - 1, blocks - blocks // 8))
        valid_rows = self.integers(1, alignment, len(owners))
        for block, owner in enumerate(owners):
            is_last = block + 1 == len(owners) or owners[block + 1] != owner
            rows[block * alignment : block * alignment + (valid_rows[block] if is_last else alignment)] = owner
        return rows.to(self._device.name)

    def expert_counts(self, experts: int, expected: int, largest: int) -> Any:
        """int32 ``[experts]``: valid rows of each, 0.7 to 1.3 times ``expected`` (as in DeepGEMM's tests); one is 0."""
        counts = [max(1, min(largest, expected * percent // 100)) for percent in self.integers(70, 130, experts)]
        if experts > 1:
            counts[self.integers(0, experts - 1, 1)[0]] = 0
        return self._torch.tensor(counts, dtype=self._torch.int32, device=self._device.name)

    def output(self, *shape: int, dtype: str) -> tuple[Any, Any]:
        """An output ``[…, M, N]`` full of NaN, and the buffer ``[rows + GUARD_ROWS, N]`` that begins with it."""
        *outer, n = shape
        rows = math.prod(outer)
        buffer = self._device.empty(rows + GUARD_ROWS, n, dtype=dtype).fill_(math.nan)
        return buffer[:rows].view(shape), buffer


def dense_output(torch: ModuleType, name: str, buffer: Any, expected: Any) -> Output:
    """The kernel writes all rows of ``expected`` [M, N], and none behind them in ``buffer`` [M + `GUARD_ROWS`, N]."""
    full, row = _behind(torch, buffer, expected)
    return Output(name, buffer, full, written=row < len(expected), untouched=row >= len(expected))


def contiguous_output(
    torch: ModuleType, name: str, buffer: Any, expert_of_row: Any, product: Callable[[int, Any], Any]
) -> Output:
    """The kernel writes rows that have an expert, and none behind the last row; padding rows may hold anything.

    Args:
        buffer: [M + `GUARD_ROWS`, N].
        expert_of_row: [M], −1 for padding.
        product: the expected rows of an expert, called with the expert and the rows' indices.
    """
    m = len(expert_of_row)
    expected = torch.zeros(m, buffer.shape[1], device=buffer.device)
    for expert in expert_of_row.unique().tolist():
        if expert >= 0:
            rows = (expert_of_row == expert).nonzero().flatten()
            expected[rows] = product(expert, rows)
    full, row = _behind(torch, buffer, expected)
    written = row < 0
    written[:m, 0] = expert_of_row >= 0
    return Output(name, buffer, full, written, untouched=row >= m)


def masked_output(
    torch: ModuleType, name: str, buffer: Any, counts: Any, max_m: int, product: Callable[[int, int], Any]
) -> Output:
    """The kernel writes each expert's valid rows, and no row behind the last tile that holds one of them.

    Args:
        buffer: [experts · ``max_m`` + `GUARD_ROWS`, N].
        counts: [experts], valid rows.
        product: the expected rows of an expert, called with the expert and the number of rows.
    """
    experts = len(counts)
    expected = torch.zeros(experts * max_m, buffer.shape[1], device=buffer.device)
    for expert, count in enumerate(counts.tolist()):
        expected[expert * max_m : expert * max_m + count] = product(expert, count)
    full, row = _behind(torch, buffer, expected)
    written, untouched = row < 0, row >= experts * max_m
    inside = row[:max_m, 0]
    for expert, count in enumerate(counts.tolist()):
        rows = slice(expert * max_m, (expert + 1) * max_m)
        written[rows, 0] = inside < count
        untouched[rows, 0] = inside >= round_up(count, GUARD_ROWS)
    return Output(name, buffer, full, written, untouched)


def _behind(torch: ModuleType, buffer: Any, expected: Any) -> tuple[Any, Any]:
    """``expected``, padded with zeroes to ``buffer``'s length, and the index of each row, [rows, 1]."""
    full = torch.zeros(buffer.shape, device=buffer.device, dtype=torch.float32)
    full[: len(expected)] = expected
    return full, torch.arange(len(buffer), device=buffer.device)[:, None]


def product_nt(torch: ModuleType, a: Any, b: Any) -> Any:
    """A · Bᵀ in float32 without TF32, whatever the operands' type."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        return a.float() @ b.float().mT
    finally:
        torch.set_float32_matmul_precision(before)
