"""Dense layers, D[M, N] = A · B: in BF16, and in FP8 or FP4 with block scales.

The two letters in a name say how A and B lie: ``n`` as it is, ``t`` transposed. ``nt``, with A [M, K] and B [N, K], is
the layout of a linear layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from cachebuilder.ops.base import Bf16K, Fp8K, N, TokenOp
from cachebuilder.ops.device import Device
from cachebuilder.ops.scaled import Format, Operands, ScaledOp
from cachebuilder.ops.seen import SeenCall, Sighting, Tensor, element_format, in_elements, require, tensor
from cachebuilder.ops.trial import Inputs, Trial, dense_output

Accumulate = Annotated[Literal[True] | None, Field(description="D += A·B: C is D itself")]


class DenseGemm(TokenOp):
    """A dense layer of weight [n, k], called with every M from 1 to ``max_tokens``."""

    layout: ClassVar[str] = "nt"
    #: The function's first arguments in order (sgl-deep-gemm 0.1.4 and 0.2.3.post2 ``deep_gemm/__init__.py``, vLLM
    #: 0.33.0 ``vllm/third_party/deep_gemm/_C.py``).
    parameters: ClassVar[tuple[str, ...]]
    #: M of a transposed A is a multiple of this, because its rows of M elements are multiples of 16 bytes (TMA).
    m_step: ClassVar[int]

    if TYPE_CHECKING:  # fields of the subclasses, which declare them in the order that dumps have
        n: int
        k: int
        out_dtype: str | None
        accumulate: bool | None

    def points(self, device: Device) -> range:
        """Every M, or with a transposed A every multiple of `m_step`."""
        if self.layout[0] == "t":
            return range(self.m_step, self.largest_m + 1, self.m_step)
        return super().points(device)

    def prepare(self, device: Device) -> Callable[[int], None]:
        """Buffers for the largest M, row-sliced at each call."""
        operands = Operands(self, device, (self.largest_m, self.k), (self.n, self.k))
        right = operands.right(self.layout)
        d = device.empty(self.largest_m, self.n, dtype=self.out_dtype or "bfloat16")
        gemm, options = self.function(device.deep_gemm), self.options()

        def call(m: int) -> None:
            out = d[:m]
            c = {"c": out} if self.accumulate else {}
            gemm(operands.left(self.layout, m), right, out, **c, **options)

        return call

    @classmethod
    def read_operands(cls, given: Mapping[str, Any]) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """A and B, and the fields that say how their elements are. Raises `Inexpressible`."""
        raise NotImplementedError

    @classmethod
    def sighting(cls, call: SeenCall) -> Sighting:
        """N and K from B, M from A."""
        given = call.by_name(*cls.parameters)
        a, b, fields = cls.read_operands(given)
        require(len(a.shape) == len(b.shape) == 2, "operands of other than two dimensions")
        m, k = a.shape if cls.layout[0] == "n" else a.shape[::-1]
        n = b.shape[0] if cls.layout[1] == "t" else b.shape[1]
        d = tensor(given["d"], 2, "bfloat16", "float32")
        if d.dtype != (cls.model_fields["out_dtype"].default or "bfloat16"):
            fields["out_dtype"] = d.dtype
        if given["c"] is not None:
            fields["accumulate"] = True
        return Sighting({"n": n, "k": k} | fields, m)

    def trial(self, device: Device, value: int, seed: int) -> Trial:
        """M = ``value``; float32 product of the operands' values, added to what D held if it accumulates."""
        inputs = Inputs(device, seed)
        operands = Operands(self, device, (value, self.k), (self.n, self.k), inputs)
        d, buffer = inputs.output(value, self.n, dtype=self.out_dtype or "bfloat16")
        expected = operands.product()
        c = {}
        if self.accumulate:
            d.copy_(inputs.normal(value, self.n, dtype="float32") * math.sqrt(self.k))
            expected += d.float()
            c = {"c": d}
        gemm = self.function(device.deep_gemm)
        gemm(operands.left(self.layout), operands.right(self.layout), d, **c, **self.options())
        return Trial((dense_output(device.torch, "d", buffer, expected),))

    def reference(self, device: Device) -> Callable[[int], None]:
        """The same product of BF16 operands by torch itself, which is cuBLASLt's."""
        a, b = (device.empty(rows, self.k, dtype="bfloat16").zero_() for rows in (self.largest_m, self.n))
        d = device.empty(self.largest_m, self.n, dtype="bfloat16")

        def call(m: int) -> None:
            device.torch.mm(a[:m], b.mT, out=d[:m])

        return call


class Bf16Gemm(DenseGemm):
    """A dense BF16 layer; D is BF16 or, as SGLang's router asks for it, float32. Kernels accumulate in float32."""

    @classmethod
    def read_operands(cls, given: Mapping[str, Any]) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """BF16 has no scales and so no fields for them."""
        a, b = (tensor(given[name], 2, "bfloat16") for name in "ab")
        return a, b, {} if given["compiled_dims"] is None else {"compiled_dims": given["compiled_dims"]}

    m_step = 8
    parameters = ("a", "b", "d", "c", "compiled_dims")

    n: N
    k: Bf16K
    out_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    accumulate: Accumulate = None


class Bf16GemmNt(Bf16Gemm):
    """D[M, N] = A[M, K] · B[N, K]ᵀ in BF16: a linear layer of weight [n, k]."""

    op: Literal["bf16_gemm_nt"]


class Bf16GemmNn(Bf16Gemm):
    """D[M, N] = A[M, K] · B[K, N] in BF16, as SGLang's batch-invariant mode calls it."""

    layout = "nn"

    op: Literal["bf16_gemm_nn"]


class Bf16GemmTn(Bf16Gemm):
    """D[M, N] = A[K, M]ᵀ · B[K, N] in BF16."""

    layout = "tn"

    op: Literal["bf16_gemm_tn"]


class Bf16GemmTt(Bf16Gemm):
    """D[M, N] = A[K, M]ᵀ · B[N, K]ᵀ in BF16."""

    layout = "tt"

    op: Literal["bf16_gemm_tt"]


class ScaledGemm(ScaledOp, DenseGemm):
    """A dense layer in FP8 or FP4 with block scales."""

    @classmethod
    def read_operands(cls, given: Mapping[str, Any]) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """FP8 operands and the fields of their scales."""
        a, b, fields = cls.scaled_fields(given, given["a"], given["b"])
        require(a.dtype == b.dtype == "float8_e4m3fn", f"elements of {a.dtype} and {b.dtype}")
        return a, b, fields

    m_step = 16
    parameters = ("a", "b", "d", "c", "recipe", "recipe_a", "recipe_b", "compiled_dims", "disable_ue8m0_cast")

    n: N
    k: Fp8K
    out_dtype: Annotated[Literal["float32"] | None, Field(description="left out: BF16")] = None
    accumulate: Accumulate = None

    def unsupported(self, major: int) -> str | None:
        """On SM90, 1 × 128 scales for B go with accumulation into float32 only, other blocks with BF16 only."""
        if reason := super().unsupported(major):
            return reason
        if major == 9 and (self.blocks[1][0] == 1) != bool(self.accumulate and self.out_dtype):
            return "on SM90, accumulation in float32 goes with recipe [1, 1, 128] and nothing else does"
        return None

    def points(self, device: Device) -> range:
        """SM90's accumulating kernel is called from M = 33 on.

        For fewer rows, every DeepGEMM from 0.1.7 to vLLM 0.33.0's 2.8.1 asks for block sizes that its own source
        refuses to compile (``sm90_fp8_gemm_1d1d.cuh``, "Invalid block size").
        """
        if self.accumulate and device.major == 9 and self.layout[0] == "n":
            return range(33, self.largest_m + 1)
        return super().points(device)


class Fp8GemmNt(ScaledGemm):
    """D[M, N] = A[M, K] · B[N, K]ᵀ in FP8 with block scales: a linear layer of weight [n, k]."""

    op: Literal["fp8_gemm_nt"]


class Fp8GemmNn(ScaledGemm):
    """D[M, N] = A[M, K] · B[K, N] in FP8, as in training's backward passes."""

    layout = "nn"
    majors = (10, 12)

    op: Literal["fp8_gemm_nn"]


class Fp8GemmTn(ScaledGemm):
    """D[M, N] = A[K, M]ᵀ · B[K, N] in FP8, as in training's backward passes."""

    layout = "tn"
    majors = (10, 12)

    op: Literal["fp8_gemm_tn"]


class Fp8GemmTt(ScaledGemm):
    """D[M, N] = A[K, M]ᵀ · B[N, K]ᵀ in FP8, as in training's backward passes."""

    layout = "tt"
    majors = (10, 12)

    op: Literal["fp8_gemm_tt"]


class Fp8Fp4GemmNt(ScaledGemm):
    """D[M, N] = A[M, K] · B[N, K]ᵀ with FP8 activations and FP4 weight, as in MXFP4 layers.

    Either may have the other's format.
    """

    majors = (10, 12)

    op: Literal["fp8_fp4_gemm_nt"]
    a_format: Annotated[Literal["fp4"] | None, Field(description="left out: FP8")] = None
    b_format: Annotated[Literal["fp8"] | None, Field(description="left out: FP4")] = None

    @classmethod
    def read_operands(cls, given: Mapping[str, Any]) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """Operands of either format, and the fields for it and for their scales."""
        a, b, fields = cls.scaled_fields(given, given["a"], given["b"])
        formats = {"a_format": "fp4"} if element_format(a) == "fp4" else {}
        formats |= {"b_format": "fp8"} if element_format(b) == "fp8" else {}
        return in_elements(a), in_elements(b), formats | fields

    @property
    def formats(self) -> tuple[Format, Format]:  # type: ignore[override]
        """Element formats of A and B."""
        return self.a_format or "fp8", self.b_format or "fp4"


class Fp8GemmNtSkipHeadMid(ScaledOp, TokenOp):
    """A dense FP8 layer of weight [n, k] that leaves a gap in each head of its output.

    Each head's ``left + right`` columns are written around ``mid`` columns that stay as they are.
    """

    found_in = "sgl-deep-gemm 0.1.4 to 0.2.3.post2 and vLLM 0.25.0's copy"

    op: Literal["fp8_gemm_nt_skip_head_mid"]
    n: N
    k: Fp8K
    left: Annotated[int, Field(ge=8, multiple_of=8, description="columns before the gap")]
    mid: Annotated[int, Field(ge=8, multiple_of=8, description="columns of the gap")]
    right: Annotated[int, Field(ge=8, multiple_of=8, description="columns behind the gap")]

    @model_validator(mode="after")
    def _check_heads(self) -> Fp8GemmNtSkipHeadMid:
        if self.n % (self.left + self.right):
            raise ValueError(f"wanted n in whole heads of left + right = {self.left + self.right}, found {self.n}")
        return self

    @classmethod
    def sighting(cls, call: SeenCall) -> Sighting:
        """N and K from B, M from A, and the splits of a head."""
        given = call.by_name("a", "b", "d", "head_splits", "recipe", "compiled_dims", "disable_ue8m0_cast")
        a, b, fields = cls.scaled_fields(given, given["a"], given["b"])
        n, k = tensor(b, 2, "float8_e4m3fn").shape
        left, mid, right = given["head_splits"]
        sizes = {"n": n, "k": k, "left": left, "mid": mid, "right": right}
        return Sighting(sizes | fields, tensor(a, 2, "float8_e4m3fn").shape[0])

    @property
    def head_splits(self) -> tuple[int, int, int]:
        """Columns of a head, as DeepGEMM takes them."""
        return self.left, self.mid, self.right

    @property
    def out_columns(self) -> int:
        """Columns of D: the n that are written, and the gaps."""
        return self.n // (self.left + self.right) * sum(self.head_splits)

    def prepare(self, device: Device) -> Callable[[int], None]:
        """Buffers for the largest M, row-sliced at each call."""
        operands = Operands(self, device, (self.largest_m, self.k), (self.n, self.k))
        d = device.empty(self.largest_m, self.out_columns, dtype="bfloat16")
        gemm, options = self.function(device.deep_gemm), self.options()

        def call(m: int) -> None:
            gemm(operands.left(rows=m), operands.right(), d[:m], self.head_splits, **options)

        return call

    def trial(self, device: Device, value: int, seed: int) -> Trial:
        """M = ``value``; the float32 product in the written columns, NaN left in the gaps."""
        torch, inputs = device.torch, Inputs(device, seed)
        operands = Operands(self, device, (value, self.k), (self.n, self.k), inputs)
        d, buffer = inputs.output(value, self.out_columns, dtype="bfloat16")
        self.function(device.deep_gemm)(operands.left(), operands.right(), d, self.head_splits, **self.options())
        column = torch.arange(self.out_columns, device=device.name)[None] % sum(self.head_splits)
        gap = (column >= self.left) & (column < self.left + self.mid)
        expected = torch.zeros(value, self.out_columns, device=device.name)
        expected[:, ~gap[0]] = operands.product()
        whole = dense_output(torch, "d", buffer, expected)
        return Trial((replace(whole, written=whole.written & ~gap, untouched=whole.untouched | gap),))
