"""Expert layers: rows sorted by expert (contiguous, for prefill) or a buffer for each expert (masked, for decode)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from cachebuilder.ops.base import Bf16K, Experts, Fp8K, N, OpBase, TokenOp
from cachebuilder.ops.device import Device, ceil_div, round_up
from cachebuilder.ops.scaled import Operands, ScaledOp
from cachebuilder.ops.seen import SeenCall, Sighting, Tensor, element_format, in_elements, require, tensor
from cachebuilder.ops.trial import Inputs, Trial, contiguous_output, masked_output

#: Arguments in the order of the functions (sgl-deep-gemm 0.2.3.post2 ``deep_gemm/__init__.py``, vLLM 0.33.0
#: ``vllm/third_party/deep_gemm/_C.py``).
_SCALED_OPTIONS = ("recipe", "recipe_a", "recipe_b", "compiled_dims", "disable_ue8m0_cast")
_PSUM_OPTIONS = ("use_psum_layout", "ensure_zero_padding", "expected_m_for_psum_layout")


class GroupedFp8Op(ScaledOp):
    """An expert layer in FP8 or FP4."""

    @classmethod
    def read_scaled(cls, given: Mapping[str, Any]) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """A and B in the op's own formats, and the fields of their scales. Raises `Inexpressible`."""
        a, b, fields = cls.scaled_fields(given, given["a"], given["b"])
        for operand, format in zip((a, b), cls.formats, strict=True):
            require(element_format(operand) == format, f"elements of {operand.dtype}")
        return in_elements(a), in_elements(b), fields

    def unsupported(self, major: int) -> str | None:
        """SM90 has 1 × 128 and 128 × 128 scales and K-major operands only."""
        if reason := super().unsupported(major):
            return reason
        if major == 9 and self.blocks != ((1, 128), (128, 128)):
            return "grouped FP8 on SM90 has 1 × 128 and 128 × 128 scales only"
        return None


class ContiguousGemm(TokenOp):
    """Expert weights [experts, n, k]; rows [M, k] sorted by expert, each expert's padded to DeepGEMM's alignment.

    M is the padded number of rows. The largest that vLLM asks for is
    ``round_up(M·topk + min(M·topk, experts)·(alignment − 1), alignment)`` with M = ``max_tokens``
    (vLLM 0.33.0, ``model_executor/layers/fused_moe/deep_gemm_utils.py``, ``compute_aligned_M``). With data
    parallelism M is dp_size · max_num_batched_tokens: give it as the op's own ``max_tokens``.
    """

    #: ``nn``: weights are passed as [experts, k, n].
    layout: ClassVar[str] = "nt"
    #: The function's arguments in order.
    parameters: ClassVar[tuple[str, ...]]
    maximum: ClassVar[str | None] = "max_rows"

    if TYPE_CHECKING:  # a field of the subclasses
        k: int

    experts: Experts
    topk: Annotated[int | None, Field(ge=1, le=256, description="experts a token is routed to")] = None
    n: N
    max_rows: Annotated[
        int | None, Field(ge=1, le=1 << 26, description="the largest padded M, instead of topk and max_tokens")
    ] = None
    psum: Annotated[
        Literal[True] | None, Field(description="each expert's end instead of each row's expert (use_psum_layout)")
    ] = None
    expected_m: Annotated[int | None, Field(ge=1, description="psum only: rows of an expert, for the heuristic")] = None
    zero_padding: Annotated[
        Literal[False] | None, Field(description="psum only: false leaves padding rows alone (ensure_zero_padding)")
    ] = None
    alignment: Annotated[
        Literal["per-call"] | None,
        Field(description="per-call: the engine sets the alignment by the rows of each call; left out: the default"),
    ] = None

    @model_validator(mode="after")
    def _check_psum(self) -> ContiguousGemm:
        if (self.topk is None) == (self.max_rows is None):
            raise ValueError("wanted topk or max_rows, and not both")
        if not self.psum and (self.expected_m is not None or self.zero_padding is not None):
            raise ValueError("expected_m and zero_padding go with psum: true")
        return self

    def options(self) -> dict[str, Any]:
        """DeepGEMM's keyword arguments that the manifest sets."""
        options: dict[str, Any] = {"use_psum_layout": True} if self.psum else {}
        if self.expected_m is not None:
            options["expected_m_for_psum_layout"] = self.expected_m
        if self.zero_padding is not None:
            options["ensure_zero_padding"] = self.zero_padding
        return super().options() | options

    @property
    def has_maximum(self) -> bool:
        """With ``max_rows``, no number of tokens is needed."""
        return self.max_rows is not None or super().has_maximum

    def rows_of(self, tokens: int, alignment: int) -> int:
        """The padded number of rows of ``tokens`` tokens in the worst case."""
        assert self.topk is not None, "max_rows stands for it"
        rows = tokens * self.topk
        return round_up(rows + min(rows, self.experts) * (alignment - 1), alignment)

    def alignments(self, device: Device) -> dict[int, int]:
        """Every alignment that a call may set, with the largest number of rows it is set for.

        An engine asks for the alignment of ⌈tokens · topk / experts⌉ rows an expert and takes it unless it exceeds the
        default (vLLM 0.33.0, ``fused_moe/deep_gemm_utils.py``, ``compute_aligned_M_and_alignment``; SGLang 0.5.23,
        ``deep_gemm_wrapper/entrypoint.py``, ``get_contiguous_layout_alignment``).
        """
        default = device.deep_gemm.get_mk_alignment_for_contiguous_layout()
        if self.alignment is None:
            return {default: self.max_rows or self.rows_of(self.largest_m, default)}
        theory = device.deep_gemm.get_theoretical_mk_alignment_for_contiguous_layout
        if self.max_rows is not None:  # the rows of an expert are not known: from 1 to more than any alignment
            return {min(theory(rows), default): self.max_rows for rows in range(1, 2 * default)}
        assert self.topk is not None, "max_rows stands for it"
        largest_rows: dict[int, int] = {}
        for tokens in range(1, self.largest_m + 1):
            alignment = min(theory(ceil_div(tokens * self.topk, self.experts)), default)
            largest_rows[alignment] = max(largest_rows.get(alignment, 0), self.rows_of(tokens, alignment))
        return largest_rows

    def points(self, device: Device) -> range:
        """Multiples of the smallest alignment, up to the largest number of rows."""
        alignments = self.alignments(device)
        step = min(alignments)
        return range(step, max(alignments.values()) + 1, step)

    def prepare(self, device: Device) -> Callable[[int], None]:
        """Buffers for the largest number of rows, row-sliced at each call."""
        alignments = self.alignments(device)
        rows = max(self.points(device))
        operands = Operands(self, device, (rows, self.k), (self.experts, self.n, self.k))
        right = operands.right(self.layout)
        d = device.empty(rows, self.n, dtype="bfloat16")
        groups = device.empty(self.experts if self.psum else rows, dtype="int32")
        gemm, options = self.function(device.deep_gemm), self.options()

        def call(m: int) -> None:
            gemm(operands.left(rows=m), right, d[:m], groups if self.psum else groups[:m], **options)

        if self.alignment is None:
            return call
        set_alignment = device.deep_gemm.set_mk_alignment_for_contiguous_layout
        default = device.deep_gemm.get_mk_alignment_for_contiguous_layout()

        def call_with_each_alignment(m: int) -> None:
            try:
                for alignment, largest_rows in alignments.items():
                    if m % alignment == 0 and m <= largest_rows:
                        set_alignment(alignment)
                        call(m)
            finally:
                set_alignment(default)

        return call_with_each_alignment

    @classmethod
    def read_operands(cls, given: Mapping[str, Any]) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """A and B, and the fields that say how their elements are. Raises `Inexpressible`."""
        raise NotImplementedError

    @classmethod
    def sighting(cls, call: SeenCall) -> Sighting:
        """Experts, N and K from B, the rows from A."""
        given = call.by_name(*cls.parameters)
        a, b, fields = cls.read_operands(given)
        require(len(a.shape) == 2 and len(b.shape) == 3, "operands of other than two and three dimensions")
        n, k = b.shape[1:] if cls.layout[1] == "t" else b.shape[:0:-1]
        if given["use_psum_layout"]:
            fields["psum"] = True
        if given["ensure_zero_padding"] is False:
            fields["zero_padding"] = False
        if given["expected_m_for_psum_layout"] is not None:
            fields["expected_m"] = given["expected_m_for_psum_layout"]
        return Sighting({"experts": b.shape[0], "n": n, "k": k} | fields, a.shape[0])

    def trial(self, device: Device, value: int, seed: int) -> Trial:
        """M = ``value``, at the default alignment; each row's float32 product with its own expert's weight."""
        inputs = Inputs(device, seed)
        alignment = device.deep_gemm.get_mk_alignment_for_contiguous_layout()
        m = max(value // alignment, 1) * alignment
        expert_of_row = inputs.expert_rows(m, self.experts, alignment)
        groups = _ends(device, expert_of_row, self.experts, alignment) if self.psum else expert_of_row
        operands = Operands(self, device, (m, self.k), (self.experts, self.n, self.k), inputs)
        d, buffer = inputs.output(m, self.n, dtype="bfloat16")
        gemm = self.function(device.deep_gemm)
        gemm(operands.left(), operands.right(self.layout), d, groups, **self.options())

        def product(expert: int, rows: Any) -> Any:
            return operands.product((rows,), (expert,))

        return Trial((contiguous_output(device.torch, "d", buffer, expert_of_row, product),))


def _ends(device: Device, expert_of_row: Any, experts: int, alignment: int) -> Any:
    """int32 [experts]: where each expert's valid rows end; an expert without rows ends where the one before it does."""
    ends, end = [], 0
    for expert in range(experts):
        rows = (expert_of_row == expert).nonzero().flatten()
        end = int(rows[-1].item()) + 1 if len(rows) else round_up(end, alignment)
        ends.append(end)
    return device.integers(ends)


class ContiguousFp8Gemm(GroupedFp8Op, ContiguousGemm):
    """FP8 expert layers over rows sorted by expert."""

    parameters = ("a", "b", "d", "grouped_layout", *_SCALED_OPTIONS, *_PSUM_OPTIONS)

    k: Fp8K

    @classmethod
    def read_operands(cls, given: Mapping[str, Any]) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """Operands and the fields of their scales."""
        return cls.read_scaled(given)


class ContiguousBf16Gemm(ContiguousGemm):
    """BF16 expert layers over rows sorted by expert."""

    parameters = ("a", "b", "d", "grouped_layout", "compiled_dims", *_PSUM_OPTIONS)

    k: Bf16K

    @classmethod
    def read_operands(cls, given: Mapping[str, Any]) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """BF16 has no scales and so no fields for them."""
        a, b = tensor(given["a"], 2, "bfloat16"), tensor(given["b"], 3, "bfloat16")
        return a, b, {} if given["compiled_dims"] is None else {"compiled_dims": given["compiled_dims"]}


class MGroupedFp8GemmNtContiguous(ContiguousFp8Gemm):
    """FP8 weights [experts, n, k]; rows [M, k] sorted by expert, M a multiple of DeepGEMM's alignment."""

    op: Literal["m_grouped_fp8_gemm_nt_contiguous"]


class MGroupedFp8GemmNnContiguous(ContiguousFp8Gemm):
    """FP8 weights [experts, k, n]; rows [M, k] sorted by expert."""

    layout = "nn"
    majors = (10, 12)

    op: Literal["m_grouped_fp8_gemm_nn_contiguous"]


class MGroupedFp8Fp4GemmNtContiguous(ContiguousFp8Gemm):
    """FP4 weights [experts, n, k]; FP8 rows [M, k] sorted by expert."""

    majors = (10, 12)
    formats = ("fp8", "fp4")
    also_called = ("m_grouped_fp8_gemm_nt_contiguous",)  # deep_gemm/__init__.py has one function for both

    op: Literal["m_grouped_fp8_fp4_gemm_nt_contiguous"]


class MGroupedBf16GemmNtContiguous(ContiguousBf16Gemm):
    """BF16 weights [experts, n, k]; rows [M, k] sorted by expert, M a multiple of DeepGEMM's alignment."""

    op: Literal["m_grouped_bf16_gemm_nt_contiguous"]


class MGroupedBf16GemmNnContiguous(ContiguousBf16Gemm):
    """BF16 weights [experts, k, n]; rows [M, k] sorted by expert."""

    layout = "nn"

    op: Literal["m_grouped_bf16_gemm_nn_contiguous"]


class MaskedGemm(OpBase):
    """Rows [experts, max_m, k], of which each expert has a count of valid ones; weights [experts, n, k].

    DeepGEMM's heuristic never sees the counts, only ``expected_m``, which the caller guesses: every value from 1 to
    ``max_m`` is swept.
    """

    variable: ClassVar[str] = "expected_m"

    if TYPE_CHECKING:  # a field of the subclasses
        k: int

    experts: Experts
    max_m: Annotated[int, Field(ge=1, le=1 << 20, description="rows reserved for each expert")]
    n: N

    @classmethod
    def masked(cls, a: Tensor, b: Tensor, fields: Mapping[str, Any]) -> Sighting:
        """The sizes of A [experts, max_m, k] and B [experts, n, k]. Raises `Inexpressible`."""
        require(len(a.shape) == len(b.shape) == 3, "operands of other than three dimensions")
        experts, max_m, k = a.shape
        return Sighting({"experts": experts, "max_m": max_m, "n": b.shape[1], "k": k, **fields}, None)

    def points(self, device: Device) -> range:
        """Every ``expected_m`` from 1 to ``max_m``."""
        return range(1, self.max_m + 1)

    def prepare(self, device: Device) -> Callable[[int], None]:
        """The full buffers: only ``expected_m`` changes from call to call."""
        operands = Operands(self, device, (self.experts, self.max_m, self.k), (self.experts, self.n, self.k))
        left, right = operands.left(), operands.right()
        d = device.empty(self.experts, self.max_m, self.n, dtype="bfloat16")
        counts = device.empty(self.experts, dtype="int32")
        gemm, options = self.function(device.deep_gemm), self.options()

        def call(expected_m: int) -> None:
            gemm(left, right, d, counts, expected_m, **options)

        return call

    def trial(self, device: Device, value: int, seed: int) -> Trial:
        """``expected_m`` = ``value``; each expert's valid rows times its weight, in float32."""
        inputs = Inputs(device, seed)
        counts = inputs.expert_counts(self.experts, value, self.max_m)
        operands = Operands(self, device, (self.experts, self.max_m, self.k), (self.experts, self.n, self.k), inputs)
        d, buffer = inputs.output(self.experts, self.max_m, self.n, dtype="bfloat16")
        gemm = self.function(device.deep_gemm)
        gemm(operands.left(), operands.right(), d, counts, value, **self.options())

        def product(expert: int, count: int) -> Any:
            return operands.product((expert,), (expert,))[:count]

        return Trial((masked_output(device.torch, "d", buffer, counts, self.max_m, product),))


class MaskedFp8Gemm(GroupedFp8Op, MaskedGemm):
    """Masked expert layers in FP8 or FP4."""

    @classmethod
    def sighting(cls, call: SeenCall) -> Sighting:
        """All sizes from the buffers; ``expected_m`` is swept."""
        given = call.by_name("a", "b", "d", "masked_m", "expected_m", *_SCALED_OPTIONS)
        a, b, fields = cls.read_scaled(given)
        return cls.masked(a, b, fields)


class MGroupedFp8GemmNtMasked(MaskedFp8Gemm):
    """FP8 rows [experts, max_m, k] and weights [experts, n, k]."""

    entry_points = ("m_grouped_fp8_gemm_nt_masked", "fp8_m_grouped_gemm_nt_masked")

    op: Literal["m_grouped_fp8_gemm_nt_masked"]
    k: Fp8K


class MGroupedFp8Fp4GemmNtMasked(MaskedFp8Gemm):
    """FP8 rows [experts, max_m, k], FP4 weights [experts, n, k]."""

    majors = (10, 12)
    formats = ("fp8", "fp4")
    also_called = ("m_grouped_fp8_gemm_nt_masked", "fp8_m_grouped_gemm_nt_masked")

    op: Literal["m_grouped_fp8_fp4_gemm_nt_masked"]
    k: Fp8K


class MGroupedBf16GemmNtMasked(MaskedGemm):
    """BF16 rows [experts, max_m, k] and weights [experts, n, k]."""

    entry_points = ("m_grouped_bf16_gemm_nt_masked", "bf16_m_grouped_gemm_nt_masked")

    op: Literal["m_grouped_bf16_gemm_nt_masked"]
    k: Bf16K

    @classmethod
    def sighting(cls, call: SeenCall) -> Sighting:
        """All sizes from the buffers; ``expected_m`` is swept."""
        given = call.by_name("a", "b", "d", "masked_m", "expected_m", "compiled_dims")
        fields = {} if given["compiled_dims"] is None else {"compiled_dims": given["compiled_dims"]}
        return cls.masked(tensor(given["a"], 3, "bfloat16"), tensor(given["b"], 3, "bfloat16"), fields)
