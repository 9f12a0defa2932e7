"""What the ops over experts share: rows sorted by expert (contiguous) or a buffer for each expert (masked)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from cachebuilder.ops.base import Bf16K, Fp8K, GroupedContiguousOp, GroupedMaskedOp, N
from cachebuilder.ops.device import Device, ceil_div
from cachebuilder.ops.scaled import ScaledOp
from cachebuilder.ops.trial import Inputs, Trial, contiguous_output, masked_output, product_nt


class Operands:
    """A of ``rows`` and B of all experts, in one precision; the four families differ in nothing else."""

    def __init__(self, op: Any, device: Device, rows: tuple[int, ...], inputs: Inputs | None = None) -> None:
        shapes = (*rows, op.k), (op.experts, op.n, op.k)
        self._torch = device.torch
        self._scaled = isinstance(op, ScaledOp)
        self.a: Any
        self.b: Any
        if isinstance(op, ScaledOp):
            make = [
                op.random(device, inputs, i, *s) if inputs else op.empty(device, i, *s) for i, s in enumerate(shapes)
            ]
        else:
            make = [inputs.normal(*s) if inputs else device.empty(*s, dtype="bfloat16") for s in shapes]
        self.a, self.b = make

    def left(self, head: int | None = None) -> Any:
        """A as DeepGEMM takes it; its first ``head`` rows only."""
        if self._scaled:
            return self.a.pair(head)
        return self.a if head is None else self.a[:head]

    def right(self, layout: str) -> Any:
        """B as DeepGEMM takes it: ``nt`` [experts, n, k], ``nn`` [experts, k, n]."""
        if self._scaled:
            return self.b.pair() if layout == "nt" else self.b.turned()
        return self.b if layout == "nt" else self.b.mT.contiguous()

    def product(self, rows: Any, expert: int) -> Any:
        """float32 product of A's ``rows`` (an index, or an expert and its rows) and ``expert``'s weight."""
        if not self._scaled:
            return product_nt(self._torch, self.a[rows], self.b[expert])
        return product_nt(self._torch, self.a.values(self._torch, *_tuple(rows)), self.b.values(self._torch, expert))


def _tuple(index: Any) -> tuple[Any, ...]:
    return index if isinstance(index, tuple) else (index,)


class ContiguousGemm(GroupedContiguousOp):
    """Expert weights [experts, n, k]; rows [M, k] sorted by expert, M a multiple of DeepGEMM's alignment."""

    layout: ClassVar[str] = "nt"

    n: N
    psum: Annotated[
        Literal[True] | None, Field(description="each expert's end instead of each row's expert (use_psum_layout)")
    ] = None
    expected_m: Annotated[
        int | None, Field(ge=1, description="psum only: rows of an expert, told to the heuristic")
    ] = None
    zero_padding: Annotated[
        Literal[False] | None, Field(description="psum only: false leaves padding rows alone (ensure_zero_padding)")
    ] = None
    alignment: Annotated[
        Literal["per-call"] | None,
        Field(description="per-call: the engine sets the alignment by the rows of each call; left out: the default"),
    ] = None

    @model_validator(mode="after")
    def _check_psum(self) -> ContiguousGemm:
        if not self.psum and (self.expected_m is not None or self.zero_padding is not None):
            raise ValueError("expected_m and zero_padding go with psum: true")
        return self

    def options(self) -> dict[str, Any]:
        """DeepGEMM's keyword arguments that the manifest sets."""
        given: dict[str, Any] = {"use_psum_layout": True} if self.psum else {}
        if self.expected_m is not None:
            given["expected_m_for_psum_layout"] = self.expected_m
        if self.zero_padding is not None:
            given["ensure_zero_padding"] = self.zero_padding
        return super().options() | given

    def alignments(self, device: Device) -> dict[int, int]:
        """Every alignment that a call may set, and the most rows with it.

        An engine asks for the alignment of ⌈tokens · topk / experts⌉ rows an expert and takes it where it is not above
        the default (vLLM 0.33.0, ``fused_moe/deep_gemm_utils.py``, ``compute_aligned_M_and_alignment``; SGLang 0.5.23,
        ``deep_gemm_wrapper/entrypoint.py``, ``get_contiguous_layout_alignment``).
        """
        default = device.deep_gemm.get_mk_alignment_for_contiguous_layout()
        if self.alignment is None:
            return {default: self.largest_rows(default)}
        theory = device.deep_gemm.get_theoretical_mk_alignment_for_contiguous_layout
        found: dict[int, int] = {}
        for tokens in range(1, self.largest_m + 1):
            alignment = min(theory(ceil_div(tokens * self.topk, self.experts)), default)
            found[alignment] = max(found.get(alignment, 0), self.rows_of(tokens, alignment))
        return found

    def points(self, device: Device) -> range:
        """Multiples of the smallest alignment up to the most rows."""
        alignments = self.alignments(device)
        step = min(alignments)
        return range(step, max(alignments.values()) + 1, step)

    def prepare(self, device: Device) -> Callable[[int], None]:
        """Buffers for the largest number of rows, row-sliced at each call."""
        alignments = self.alignments(device)
        rows = max(self.points(device))
        operands = Operands(self, device, (rows,))
        right = operands.right(self.layout)
        d = device.empty(rows, self.n, dtype="bfloat16")
        groups = device.empty(self.experts if self.psum else rows, dtype="int32")
        gemm, options = self.function(device.deep_gemm), self.options()

        def call(m: int) -> None:
            gemm(operands.left(m), right, d[:m], groups if self.psum else groups[:m], **options)

        if self.alignment is None:
            return call
        set_alignment = device.deep_gemm.set_mk_alignment_for_contiguous_layout
        default = device.deep_gemm.get_mk_alignment_for_contiguous_layout()

        def call_each(m: int) -> None:
            try:
                for alignment, most in alignments.items():
                    if m % alignment == 0 and m <= most:
                        set_alignment(alignment)
                        call(m)
            finally:
                set_alignment(default)

        return call_each

    def trial(self, device: Device, value: int, seed: int) -> Trial:
        """M = ``value``, at the default alignment; each row's float32 product with its own expert's weight."""
        inputs = Inputs(device, seed)
        alignment = device.deep_gemm.get_mk_alignment_for_contiguous_layout()
        value = max(value // alignment, 1) * alignment
        expert_of_row = inputs.expert_rows(value, self.experts, alignment)
        groups = _ends(device, expert_of_row, self.experts, alignment) if self.psum else expert_of_row
        operands = Operands(self, device, (value,), inputs)
        d, buffer = inputs.output(value, self.n, dtype="bfloat16")
        gemm = self.function(device.deep_gemm)
        gemm(operands.left(), operands.right(self.layout), d, groups, **self.options())

        def product(expert: int, rows: Any) -> Any:
            return operands.product(rows, expert)

        return Trial((contiguous_output(device.torch, "d", buffer, expert_of_row, product),))


def _ends(device: Device, expert_of_row: Any, experts: int, alignment: int) -> Any:
    """int32 [experts]: where each expert's valid rows end; one without rows ends where the one before it does."""
    ends, end = [], 0
    for expert in range(experts):
        rows = (expert_of_row == expert).nonzero().flatten()
        end = int(rows[-1].item()) + 1 if len(rows) else ceil_div(end, alignment) * alignment
        ends.append(end)
    return device.torch.tensor(ends, dtype=device.torch.int32, device=device.name)


class GroupedFp8Op(ScaledOp):
    """What expert layers in FP8 share."""

    def unsupported(self, major: int) -> str | None:
        """SM90 knows 1 × 128 and 128 × 128 scales and K-major operands only."""
        if reason := super().unsupported(major):
            return reason
        if major == 9 and self.blocks != ((1, 128), (128, 128)):
            return "grouped FP8 on SM90 has 1 × 128 and 128 × 128 scales only"
        return None


class ContiguousFp8Gemm(GroupedFp8Op, ContiguousGemm):
    """FP8 expert layers over rows sorted by expert."""

    k: Fp8K


class ContiguousBf16Gemm(ContiguousGemm):
    """BF16 expert layers over rows sorted by expert."""

    k: Bf16K


class MaskedGemm(GroupedMaskedOp):
    """Rows [experts, max_m, k], weights [experts, n, k]; ``expected_m`` from 1 to ``max_m``."""

    n: N

    def prepare(self, device: Device) -> Callable[[int], None]:
        """The full buffers: only ``expected_m`` changes from call to call."""
        operands = Operands(self, device, (self.experts, self.max_m))
        left, right = operands.left(), operands.right("nt")
        d = device.empty(self.experts, self.max_m, self.n, dtype="bfloat16")
        rows = device.empty(self.experts, dtype="int32")
        gemm, options = self.function(device.deep_gemm), self.options()

        def call(expected_m: int) -> None:
            gemm(left, right, d, rows, expected_m, **options)

        return call

    def trial(self, device: Device, value: int, seed: int) -> Trial:
        """``expected_m`` = ``value``; each expert's valid rows times its weight, in float32."""
        inputs = Inputs(device, seed)
        counts = inputs.expert_counts(self.experts, value, self.max_m)
        operands = Operands(self, device, (self.experts, self.max_m), inputs)
        d, buffer = inputs.output(self.experts, self.max_m, self.n, dtype="bfloat16")
        gemm = self.function(device.deep_gemm)
        gemm(operands.left(), operands.right("nt"), d, counts, value, **self.options())

        def product(expert: int, count: int) -> Any:
            return operands.product(expert, expert)[:count]

        return Trial((masked_output(device.torch, "d", buffer, counts, self.max_m, product),))


class MaskedFp8Gemm(GroupedFp8Op, MaskedGemm):
    """FP8 expert layers over a fixed buffer for each expert."""

    k: Fp8K


class MaskedBf16Gemm(MaskedGemm):
    """BF16 expert layers over a fixed buffer for each expert."""

    k: Bf16K
