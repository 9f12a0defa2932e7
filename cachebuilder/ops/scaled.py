"""FP8 and FP4 operands with block scales: the fields that choose them, the tensors, and their values in float32.

DeepGEMM calls the block that one scale covers a *recipe*: ``[rows of A, rows of B, columns of K]``, or a pair for
each operand.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from cachebuilder.ops.base import OpBase
from cachebuilder.ops.device import Device, ceil_div, round_up
from cachebuilder.ops.seen import Tensor, require
from cachebuilder.ops.trial import Inputs, product_nt

Size = Literal[1, 32, 128]
Format = Literal["fp8", "fp4"]
ScaleFormat = Literal["float32", "ue8m0", "e4m3"]

#: The largest finite value of float8_e4m3fn (OCP 8-bit Floating Point Specification 1.0, table 1).
FP8_MAX = 448.0
#: Non-negative values of FP4 (E2M1), by code; bit 3 is the sign. OCP Microscaling Formats specification 1.0, section
#: 5.3.3; two to a byte, the even column in the low half (sgl-deep-gemm 0.2.3.post2, ``utils/math.py``,
#: ``per_token_cast_to_fp4``).
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


@dataclass(frozen=True)
class Quantisation:
    """How float values become FP8 or FP4 elements with block scales.

    Attributes:
        rows, columns: the block that one scale covers.
        scales: ``float32``; ``ue8m0``, exponents; ``e4m3``, as NVFP4 has them. The last two are packed four to an
            int32, as SM100's kernels read them (DeepGEMM 2.6.1, ``csrc/jit_kernels/impls/smxx_layout.hpp``).
        fp4: elements are FP4, two to a byte; else FP8.
    """

    rows: int
    columns: int
    scales: ScaleFormat = "float32"
    fp4: bool = False

    @property
    def packed(self) -> bool:
        """Whether four scales share an int32."""
        return self.scales != "float32"


@dataclass(frozen=True)
class Scaled:
    """One quantised operand.

    Attributes:
        data: ``[…, MN, K]`` in FP8, ``[…, MN, K/2]`` bytes in FP4.
        scales: float32 ``[…, ⌈MN/rows⌉, ⌈K/columns⌉]``; packed: int32 ``[…, ⌈K/columns/4⌉, MN rounded up to 4]``.
    """

    data: Any
    scales: Any
    quantisation: Quantisation

    def pair(self, head: int | None = None) -> tuple[Any, Any]:
        """Data and scales as DeepGEMM takes them; with ``head``, as if allocated for that many rows."""
        mn = self.data.shape[-2] if head is None else head
        data = self.data if head is None else self.data[:head]
        if not self.quantisation.packed:
            return data, self.scales if head is None else self.scales[: ceil_div(head, self.quantisation.rows)]
        if head is None:
            return data, self.scales.mT[..., :mn, :]
        groups, aligned = self.scales.shape[-2], round_up(mn, 4)  # 16 bytes, as TMA requires
        return data, self.scales.view(-1)[: groups * aligned].view(groups, aligned).mT[:mn]

    def turned(self, head: int | None = None) -> tuple[Any, Any]:
        """The same transposed, ``[…, K, MN]``, as ``nn`` takes B and ``tn`` and ``tt`` take A."""
        data, scales = self.pair(head)
        return data.mT.contiguous(), scales.mT

    def values(self, torch: Any, *index: Any) -> Any:
        """float32 values of ``data[index]``; an index into MN needs blocks of one row."""
        data, scales = self.pair()
        data, scales = data[index] if index else data, scales[index] if index else scales
        if self.quantisation.packed:
            scales = unpack(torch, scales, self.quantisation.scales)
        if self.quantisation.fp4:
            data = from_fp4(torch, data)
        mn, k = data.shape[-2:]
        scales = scales.repeat_interleave(self.quantisation.rows, -2)[..., :mn, :]
        return data.float() * scales.repeat_interleave(self.quantisation.columns, -1)[..., :k]


def empty(device: Device, shape: tuple[int, ...], quantisation: Quantisation) -> Scaled:
    """An uninitialised operand of ``shape`` ``[…, MN, K]``."""
    *outer, mn, k = shape
    fp4, columns = quantisation.fp4, quantisation.columns
    data = device.empty(*outer, mn, k // 2 if fp4 else k, dtype="int8" if fp4 else "float8_e4m3fn")
    if quantisation.packed:
        scales = device.empty(*outer, ceil_div(k, 4 * columns), round_up(mn, 4), dtype="int32")
    else:
        scales = device.empty(*outer, ceil_div(mn, quantisation.rows), ceil_div(k, columns), dtype="float32")
    return Scaled(data, scales, quantisation)


def random(
    device: Device, inputs: Inputs, shape: tuple[int, ...], quantisation: Quantisation, deviation: float = 1.0
) -> Scaled:
    """An operand of normal values around 0 with standard deviation ``deviation``, quantised."""
    operand = empty(device, shape, quantisation)
    mn, k = shape[-2:]
    data, scales = (tensor.view(-1, *tensor.shape[-2:]) for tensor in (operand.data, operand.scales))
    kept = quantisation
    if device.power_of_two_scales and not kept.packed:
        kept = replace(kept, scales="ue8m0")
    for index in range(len(data)):  # one matrix at a time: float32 copies of all experts would not fit
        values = inputs.normal(mn, k, dtype="float32") * deviation
        data[index], matrix_scales = quantise(device.torch, values, kept)
        if quantisation.packed:
            matrix_scales = _pack(device.torch, matrix_scales, scales.shape[-1], quantisation.scales)
        scales[index] = matrix_scales
    return operand


def quantised(device: Device, values: Any, quantisation: Quantisation) -> Scaled:
    """float32 ``values`` [MN, K] as an operand with packed scales."""
    operand = empty(device, tuple(values.shape), quantisation)
    operand.data[:], scales = quantise(device.torch, values, quantisation)
    operand.scales[:] = _pack(device.torch, scales, operand.scales.shape[-1], quantisation.scales)
    return operand


def quantise(torch: Any, values: Any, quantisation: Quantisation) -> tuple[Any, Any]:
    """Data and float32 scales of ``values`` [MN, K]: each block's largest magnitude is the format's largest value.

    As DeepGEMM 2.6.1 ``deep_gemm/utils/math.py`` does it. UE8M0 scales are rounded up to a power of two, E4M3 ones to
    that format, as in vLLM 0.33.0's copy (``deep_gemm/utils/nvfp4.py``).
    """
    (mn, k), rows, columns = values.shape, quantisation.rows, quantisation.columns
    padded = values.new_zeros(round_up(mn, rows), round_up(k, columns))
    padded[:mn, :k] = values
    blocks = padded.view(padded.shape[0] // rows, rows, padded.shape[1] // columns, columns)
    scales = blocks.abs().amax((1, 3), keepdim=True).clamp(min=1e-4) / (E2M1[-1] if quantisation.fp4 else FP8_MAX)
    if quantisation.scales == "ue8m0":
        scales = scales.log2().ceil().exp2()
    if quantisation.scales == "e4m3":
        scales = scales.clamp(2**-9, FP8_MAX).to(torch.float8_e4m3fn).float()
    scaled = (blocks / scales).view_as(padded)[:mn, :k]
    if quantisation.fp4:
        data = to_fp4(torch, scaled)
    else:
        data = scaled.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn).contiguous()
    return data, scales.view(blocks.shape[0], blocks.shape[2])


def requantised(torch: Any, values: Any, quantisation: Quantisation) -> Any:
    """float32 ``values`` [rows, K] quantised in blocks of one row, and back."""
    data, scales = quantise(torch, values, quantisation)
    elements = from_fp4(torch, data) if quantisation.fp4 else data.float()
    return elements * scales.repeat_interleave(quantisation.columns, -1)


def as_near(torch: Any, values: Any, written: Any, nearest: Any) -> Any:
    """What a kernel should have ``written`` for ``values``: the ``nearest`` of its format, or another as near.

    Many BF16 values over a scale lie half way between two FP8 or FP4 values. With nvcc's fast math
    (``--use_fast_math`` in DeepJIT's flags) a scale's reciprocal may be some units of float32 off, so that those go to
    either side.

    Args:
        values, written, nearest: float32, divided by their scales.
    """
    # The kernel's division (2 units off), reciprocal (1) and product (½), and the two roundings behind ``values`` (½
    # each) are 4½ units of 2⁻²³, which count on both sides (PTX ISA 9.0, ``div.approx``, ``rcp.approx``).
    near = (written - values).abs() <= (nearest - values).abs() + 9 * 2**-23 * values.abs()
    return torch.where(near, written, nearest)


def to_fp4(torch: Any, values: Any) -> Any:
    """The nearest FP4 of ``values`` [MN, K], two to a byte; values beyond the largest become the largest."""
    middles = torch.tensor([(a + b) / 2 for a, b in itertools.pairwise(E2M1)], device=values.device)
    # A middle belongs to the code below it where that is even, else to the one above: PTX ``cvt.rn``.
    middles[1::2] = torch.nextafter(middles[1::2], torch.zeros_like(middles[1::2]))
    codes = torch.bucketize(values.abs().contiguous(), middles).to(torch.uint8) | ((values < 0).to(torch.uint8) << 3)
    return (codes[:, 0::2] | (codes[:, 1::2] << 4)).view(torch.int8)


def from_fp4(torch: Any, data: Any) -> Any:
    """float32 values of FP4 data, two to a byte."""
    table = torch.tensor([*E2M1, *(-value for value in E2M1)], device=data.device)
    codes = data.view(torch.uint8).int()
    return table[torch.stack((codes & 15, codes >> 4), -1).flatten(-2).long()]


def _pack(torch: Any, scales: Any, aligned: int, scale_format: ScaleFormat) -> Any:
    """float32 scales [MN, blocks], UE8M0 or E4M3, as int32 [⌈blocks/4⌉, ``aligned``], lowest byte first."""
    mn, blocks = scales.shape
    packed = torch.zeros(aligned, round_up(blocks, 4), dtype=torch.uint8, device=scales.device)
    if scale_format == "e4m3":
        packed[:mn, :blocks] = scales.to(torch.float8_e4m3fn).view(torch.uint8)
    else:
        packed[:mn, :blocks] = (scales.contiguous().view(torch.int32) >> 23).to(torch.uint8)
    return packed.view(torch.int32).mT


def unpack(torch: Any, words: Any, scale_format: ScaleFormat = "ue8m0") -> Any:
    """float32 values of scales that are packed four to an int32."""
    packed = words.clone(memory_format=torch.contiguous_format).view(torch.uint8)
    if scale_format == "e4m3":
        return packed.view(torch.float8_e4m3fn).float()
    return (packed.to(torch.int32) << 23).view(torch.float32)


class ScaledOp(OpBase):
    """An op whose operands have block scales, in DeepGEMM's own words.

    float32 scales are passed row-major, as the engines' own warm-ups do (vLLM 0.33.0
    ``model_executor/warmup/deep_gemm_warmup.py``, SGLang 0.5.23 ``deep_gemm_wrapper/compile_utils.py``): DeepGEMM then
    also asks for the kernel that brings them into TMA layout. Scales already in that layout (float32 on SM90, packed on
    Blackwell) select the same GEMM kernels and no other; a test checks this.

    Left out, the block is DeepGEMM's default: 1 × 128 for A and 128 × 128 for B with float32 scales, 1 × 128 for both
    with packed ones (DeepGEMM 2.6.1, ``csrc/utils/layout.hpp``, ``get_default_recipe``).
    """

    #: Element formats of A and B, unless the op has fields for them.
    formats: ClassVar[tuple[Format, Format]] = ("fp8", "fp8")

    recipe: Annotated[
        list[Size] | None,
        Field(min_length=3, max_length=3, description="a block's rows of A, rows of B, columns of K"),
    ] = None
    recipe_a: Annotated[
        list[Size] | None, Field(min_length=2, max_length=2, description="rows of A and columns of K in a block")
    ] = None
    recipe_b: Annotated[
        list[Size] | None, Field(min_length=2, max_length=2, description="rows of B and columns of K in a block")
    ] = None
    scales: Annotated[
        Literal["packed"] | None,
        Field(description="packed: UE8M0 exponents, four to an int32 (Blackwell); left out: float32"),
    ] = None
    disable_ue8m0_cast: Literal[True] | None = None

    @model_validator(mode="after")
    def _check_recipe(self) -> ScaledOp:
        if (self.recipe_a is None) != (self.recipe_b is None) or (self.recipe and self.recipe_a):
            raise ValueError("wanted recipe, or recipe_a and recipe_b, or none of them")
        if self.packed and (self.blocks[0][0], self.blocks[1][0]) != (1, 1):
            raise ValueError("packed scales are one for each row: wanted blocks of 1 row, as recipe_b: [1, 128]")
        return self

    @property
    def packed(self) -> bool:
        """Whether scales are packed UE8M0."""
        return self.scales == "packed"

    @property
    def blocks(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Rows and columns that one scale of A and one of B cover."""
        if self.recipe:
            rows_a, rows_b, columns = self.recipe
            return (rows_a, columns), (rows_b, columns)
        if self.recipe_a and self.recipe_b:
            return (self.recipe_a[0], self.recipe_a[1]), (self.recipe_b[0], self.recipe_b[1])
        return (1, 128), (1 if self.packed else 128, 128)

    @classmethod
    def scaled_fields(cls, given: Mapping[str, Any], a: Any, b: Any) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """A and B without their scales, and the fields that say how these are.

        Raises:
            Inexpressible: they are no pairs, or the two have scales of different types.
        """
        require(isinstance(a, tuple) and isinstance(b, tuple) and len(a) == len(b) == 2, "operands without scales")
        types = {a[1].dtype, b[1].dtype}
        require(types <= {"float32", "int32"}, f"scales of {a[1].dtype} and {b[1].dtype}")
        fields: dict[str, Any] = {
            name: list(given[name]) for name in ("recipe", "recipe_a", "recipe_b") if given.get(name)
        }
        # Where one operand's are packed already, DeepGEMM packs the other's: the op plans both, and the same GEMMs.
        if types == {"int32"}:
            fields["scales"] = "packed"
        if given.get("disable_ue8m0_cast"):
            fields["disable_ue8m0_cast"] = True
        if given.get("compiled_dims") is not None:
            fields["compiled_dims"] = given["compiled_dims"]
        return a[0], b[0], fields

    def options(self) -> dict[str, Any]:
        """DeepGEMM's keyword arguments that the manifest sets."""
        options: dict[str, Any] = {
            name: tuple(block) for name in ("recipe", "recipe_a", "recipe_b") if (block := getattr(self, name))
        }
        if self.disable_ue8m0_cast:
            options["disable_ue8m0_cast"] = True
        return super().options() | options

    def unsupported(self, major: int) -> str | None:
        """Packed scales and FP4 exist from SM100 on."""
        if major == 9 and self.packed:
            return "packed UE8M0 scales are Blackwell's (SM100, SM120); on SM90 scales are float32"
        if major == 9 and "fp4" in self.formats:
            return "FP4 operands are Blackwell's (SM100, SM120)"
        return super().unsupported(major)

    def operand(self, device: Device, inputs: Inputs | None, which: int, *shape: int) -> Scaled:
        """A (``which`` 0) or B (1) of ``shape`` ``[…, MN, K]``, random; uninitialised without ``inputs``."""
        rows, columns = self.blocks[which]
        scales: ScaleFormat = "ue8m0" if self.packed else "float32"
        quantisation = Quantisation(rows, columns, scales, fp4=self.formats[which] == "fp4")
        if inputs is None:
            return empty(device, shape, quantisation)
        return random(device, inputs, shape, quantisation)


class Operands:
    """A and B of a GEMM, quantised for a `ScaledOp`, else BF16; random, or uninitialised without ``inputs``.

    A is [rows, K] or [experts, rows, K], B [N, K] or [experts, N, K]. A ``layout`` has a letter for A and one for B:
    ``nt`` passes both as they are, ``t`` for A and ``n`` for B pass them transposed.
    """

    def __init__(
        self,
        op: OpBase,
        device: Device,
        a_shape: tuple[int, ...],
        b_shape: tuple[int, ...],
        inputs: Inputs | None = None,
    ) -> None:
        def make(which: int, shape: tuple[int, ...]) -> Any:
            if isinstance(op, ScaledOp):
                return op.operand(device, inputs, which, *shape)
            return inputs.normal(*shape) if inputs else device.empty(*shape, dtype="bfloat16")

        self._torch = device.torch
        self._scaled = isinstance(op, ScaledOp)
        self._a, self._b = make(0, a_shape), make(1, b_shape)

    def left(self, layout: str = "nt", rows: int | None = None) -> Any:
        """A as DeepGEMM takes it; with ``rows``, as if allocated for that many."""
        turned = layout[0] == "t"
        if self._scaled:
            return self._a.turned(rows) if turned else self._a.pair(rows)
        if not turned:
            return self._a if rows is None else self._a[:rows]
        k = self._a.shape[-1]
        return self._a.mT.contiguous() if rows is None else self._a.view(-1)[: rows * k].view(k, rows)

    def right(self, layout: str = "nt") -> Any:
        """B as DeepGEMM takes it."""
        turned = layout[1] == "n"
        if self._scaled:
            return self._b.turned() if turned else self._b.pair()
        return self._b.mT.contiguous() if turned else self._b

    def product(self, a_index: tuple[Any, ...] = (), b_index: tuple[Any, ...] = ()) -> Any:
        """float32 product of ``A[a_index]`` and ``B[b_index]``; the whole operands if left out."""
        if self._scaled:
            a, b = self._a.values(self._torch, *a_index), self._b.values(self._torch, *b_index)
        else:
            a, b = self._a[a_index], self._b[b_index]
        return product_nt(self._torch, a, b)
