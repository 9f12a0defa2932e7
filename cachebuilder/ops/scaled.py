"""FP8 and FP4 operands with block scales: the fields that say which, the tensors, and their values in float32.

DeepGEMM calls the block that one scale covers a *recipe*: ``[rows of A, rows of B, columns of K]``, or a pair for
each operand.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from cachebuilder.ops.base import Fp8K, N, OpBase, TokenOp
from cachebuilder.ops.device import Device, ceil_div, round_up
from cachebuilder.ops.trial import Inputs, Trial, bf16_product, dense_output, product_nt

Size = Literal[1, 32, 128]
Format = Literal["fp8", "fp4"]

#: The largest finite value of float8_e4m3fn (OCP 8-bit Floating Point Specification 1.0, table 1).
FP8_MAX = 448.0
#: Non-negative values of FP4 (E2M1), by code; bit 3 is the sign. OCP Microscaling Formats specification 1.0, section
#: 5.3.3; two to a byte, the even column in the low half (sgl-deep-gemm 0.2.3.post2, ``utils/math.py``,
#: ``per_token_cast_to_fp4``).
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


@dataclass(frozen=True)
class Scaled:
    """One operand: ``[…, MN, K]`` in FP8 (FP4: ``[…, MN, K/2]`` bytes) and its scales.

    Attributes:
        scales: float32 ``[…, ⌈MN/rows⌉, ⌈K/columns⌉]``; packed: int32 ``[…, ⌈K/columns/4⌉, MN rounded up to 4]``.
        rows, columns: the block one scale covers.
        packed: four UE8M0 exponents to an int32, as SM100's kernels read them (DeepGEMM 2.6.1,
            ``csrc/jit_kernels/impls/smxx_layout.hpp``).
        nvfp4: the four are E4M3 values.

    """

    data: Any
    scales: Any
    rows: int
    columns: int
    packed: bool
    nvfp4: bool = False

    def pair(self, head: int | None = None) -> tuple[Any, Any]:
        """Data and scales as DeepGEMM takes them; of the first ``head`` rows only, as if allocated for these."""
        mn = self.data.shape[-2] if head is None else head
        data = self.data if head is None else self.data[:head]
        if not self.packed:
            return data, self.scales if head is None else self.scales[: ceil_div(head, self.rows)]
        if head is None:
            return data, self.scales.mT[..., :mn, :]
        groups, aligned = self.scales.shape[-2], round_up(mn, 4)  # 16 bytes, as TMA wants
        return data, self.scales.view(-1)[: groups * aligned].view(groups, aligned).mT[:mn]

    def turned(self, head: int | None = None) -> tuple[Any, Any]:
        """The same with K as the rows, as the ``n`` of ``nn`` and the ``t`` of ``tt`` take them: ``[…, K, MN]``."""
        data, scales = self.pair(head)
        return data.mT.contiguous(), scales.mT

    def values(self, torch: Any, *index: Any) -> Any:
        """float32 values of ``data[index]``; an index into MN needs blocks of one row."""
        data, scales = self.pair()
        data, scales = data[index] if index else data, scales[index] if index else scales
        if self.packed:
            scales = unpack(torch, scales, self.nvfp4)
        if data.dtype == torch.int8:
            data = from_fp4(torch, data)
        mn, k = data.shape[-2:]
        scales = scales.repeat_interleave(self.rows, -2)[..., :mn, :].repeat_interleave(self.columns, -1)[..., :k]
        return data.float() * scales


def empty(device: Device, shape: tuple[int, ...], block: tuple[int, int], packed: bool, fp4: bool = False) -> Scaled:
    """An uninitialised operand of ``shape`` ``[…, MN, K]``."""
    *outer, mn, k = shape
    rows, columns = block
    data = device.empty(*outer, mn, k // 2 if fp4 else k, dtype="int8" if fp4 else "float8_e4m3fn")
    if packed:
        scales = device.empty(*outer, ceil_div(k, 4 * columns), round_up(mn, 4), dtype="int32")
    else:
        scales = device.empty(*outer, ceil_div(mn, rows), ceil_div(k, columns), dtype="float32")
    return Scaled(data, scales, rows, columns, packed)


def random(
    device: Device,
    inputs: Inputs,
    shape: tuple[int, ...],
    block: tuple[int, int],
    packed: bool,
    fp4: bool = False,
    nvfp4: bool = False,
    deviation: float = 1.0,
) -> Scaled:
    """An operand of normal values, quantised.

    Args:
        nvfp4: scales are E4M3, packed; ``fp4`` and a block of 1 × 16 go with it.
        deviation: of the values, from 0.
    """
    torch = device.torch
    operand = replace(empty(device, shape, block, packed, fp4), nvfp4=nvfp4)
    mn, k = shape[-2:]
    data, scales = operand.data.view(-1, *operand.data.shape[-2:]), operand.scales.view(-1, *operand.scales.shape[-2:])
    power_of_two = (packed or device.power_of_two_scales) and not nvfp4
    for index in range(len(data)):  # one matrix at a time: float32 copies of all experts would not fit
        values = inputs.normal(mn, k, dtype="float32") * deviation
        data[index], one = quantise(torch, values, block, power_of_two, fp4, nvfp4)
        scales[index] = _pack(torch, one, operand.scales.shape[-1], nvfp4) if packed else one
    return operand


def packed(device: Device, values: Any, columns: int) -> Scaled:
    """float32 ``values`` [MN, K] in FP8 with packed UE8M0 scales for 1 × ``columns``."""
    operand = empty(device, tuple(values.shape), (1, columns), True)
    operand.data[:], scales = quantise(device.torch, values, (1, columns), True, False)
    operand.scales[:] = _pack(device.torch, scales, operand.scales.shape[-1], False)
    return operand


def quantise(
    torch: Any, values: Any, block: tuple[int, int], power_of_two: bool, fp4: bool, nvfp4: bool = False
) -> tuple[Any, Any]:
    """Data and float32 scales of ``values`` [MN, K]: each block's largest magnitude is the format's largest value.

    As DeepGEMM 2.6.1 ``deep_gemm/utils/math.py`` does it; scales rounded up to a power of two where only the exponent
    is kept. NVFP4's are rounded to E4M3, as vLLM 0.33.0's copy does it (``deep_gemm/utils/nvfp4.py``).
    """
    (mn, k), (rows, columns) = values.shape, block
    padded = values.new_zeros(round_up(mn, rows), round_up(k, columns))
    padded[:mn, :k] = values
    blocks = padded.view(padded.shape[0] // rows, rows, padded.shape[1] // columns, columns)
    scales = blocks.abs().amax((1, 3), keepdim=True).clamp(min=1e-4) / (E2M1[-1] if fp4 else FP8_MAX)
    if power_of_two:
        scales = scales.log2().ceil().exp2()
    if nvfp4:
        scales = scales.clamp(2**-9, FP8_MAX).to(torch.float8_e4m3fn).float()
    scaled = (blocks / scales).view_as(padded)[:mn, :k]
    data = to_fp4(torch, scaled) if fp4 else scaled.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn).contiguous()
    return data, scales.view(blocks.shape[0], blocks.shape[2])


def as_near(torch: Any, values: Any, written: Any, nearest: Any) -> Any:
    """What a kernel must have ``written`` for ``values``: the ``nearest`` of its format, or another that is as near.

    Of BF16 values over a scale many lie half way between two FP8 or FP4 values. With nvcc's fast math
    (``--use_fast_math`` in DeepJIT's flags) a scale's reciprocal may be some units of float32 off, which takes those to
    either side.

    Args:
        values: float32, over their scales, as are the two others.
    """
    # The kernel's division (2 units off), reciprocal (1) and product (½), the two roundings behind ``values`` (½ each):
    # 4½ units of 2⁻²³, seen from both sides (PTX ISA 9.0, ``div.approx``, ``rcp.approx``).
    near = (written - values).abs() <= (nearest - values).abs() + 9 * 2**-23 * values.abs()
    return torch.where(near, written, nearest)


def requantised(torch: Any, values: Any, columns: int, fp4: bool = False, nvfp4: bool = False) -> Any:
    """float32 ``values`` [rows, K] quantised and back; a scale for each 1 × ``columns``, a power of two or NVFP4's."""
    data, scales = quantise(torch, values, (1, columns), not nvfp4, fp4, nvfp4)
    return (from_fp4(torch, data) if fp4 else data.float()) * scales.repeat_interleave(columns, -1)


def to_fp4(torch: Any, values: Any) -> Any:
    """The nearest FP4 of ``values`` [MN, K], two to a byte; what is beyond the largest becomes the largest."""
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


def _pack(torch: Any, scales: Any, aligned: int, nvfp4: bool) -> Any:
    """float32 scales [MN, blocks] as int32 [⌈blocks/4⌉, ``aligned``], lowest byte first: powers of two as exponents,
    NVFP4's as E4M3.
    """
    mn, blocks = scales.shape
    packed = torch.zeros(aligned, round_up(blocks, 4), dtype=torch.uint8, device=scales.device)
    if nvfp4:
        packed[:mn, :blocks] = scales.to(torch.float8_e4m3fn).view(torch.uint8)
    else:
        packed[:mn, :blocks] = (scales.contiguous().view(torch.int32) >> 23).to(torch.uint8)
    return packed.view(torch.int32).mT


def unpack(torch: Any, scales: Any, nvfp4: bool = False) -> Any:
    """float32 values of UE8M0 exponents, four to an int32; of E4M3 values for ``nvfp4``."""
    packed = scales.clone(memory_format=torch.contiguous_format).view(torch.uint8)
    if nvfp4:
        return packed.view(torch.float8_e4m3fn).float()
    return (packed.to(torch.int32) << 23).view(torch.float32)


class ScaledOp(OpBase):
    """An op whose operands have block scales, in DeepGEMM's own words.

    float32 scales are passed row-major, as the engines' own warm-ups do (vLLM 0.33.0
    ``model_executor/warmup/deep_gemm_warmup.py``, SGLang 0.5.23 ``deep_gemm_wrapper/compile_utils.py``): DeepGEMM then
    also asks for the kernel that brings them into TMA layout. Scales that are in that layout already (float32 on SM90,
    packed on Blackwell) select the same GEMM kernels and no other: a test says so.

    Left out, the block is DeepGEMM's default: 1 × 128 for A and 128 × 128 for B with float32 scales, 1 × 128 for both
    with packed ones (DeepGEMM 2.6.1, ``csrc/utils/layout.hpp``, ``get_default_recipe``).
    """

    #: Element formats of A and B where the op has no fields for them.
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
        """Rows and columns that a scale of A and one of B covers."""
        if self.recipe:
            rows_a, rows_b, columns = self.recipe
            return (rows_a, columns), (rows_b, columns)
        if self.recipe_a and self.recipe_b:
            return (self.recipe_a[0], self.recipe_a[1]), (self.recipe_b[0], self.recipe_b[1])
        return (1, 128), (1 if self.packed else 128, 128)

    def options(self) -> dict[str, Any]:
        """DeepGEMM's keyword arguments that the manifest sets."""
        given: dict[str, Any] = {
            name: tuple(value) for name in ("recipe", "recipe_a", "recipe_b") if (value := getattr(self, name))
        }
        if self.disable_ue8m0_cast:
            given["disable_ue8m0_cast"] = True
        return super().options() | given

    def unsupported(self, major: int) -> str | None:
        """Packed scales and FP4 exist from SM100 on."""
        if major == 9 and self.packed:
            return "packed UE8M0 scales are Blackwell's (SM100, SM120); on SM90 scales are float32"
        if major == 9 and "fp4" in self.formats:
            return "FP4 operands are Blackwell's (SM100, SM120)"
        return super().unsupported(major)

    def empty(self, device: Device, which: int, *shape: int) -> Scaled:
        """Operand A (``which`` 0) or B (1) of ``shape`` ``[…, MN, K]``."""
        return empty(device, shape, self.blocks[which], self.packed, self.formats[which] == "fp4")

    def random(self, device: Device, inputs: Inputs, which: int, *shape: int) -> Scaled:
        """The same, of random values."""
        return random(device, inputs, shape, self.blocks[which], self.packed, self.formats[which] == "fp4")


class ScaledGemm(ScaledOp, TokenOp):
    """A dense layer of weight [n, k], called with every M from 1 to ``max_tokens``."""

    #: n: as it stands, t: transposed; A, then B. ``nt`` is the layout of a linear layer.
    layout: ClassVar[str] = "nt"

    n: N
    k: Fp8K
    out_dtype: Annotated[Literal["float32"] | None, Field(description="left out: BF16")] = None
    accumulate: Annotated[Literal[True] | None, Field(description="D += A·B, as C given at the same address")] = None

    def unsupported(self, major: int) -> str | None:
        """On SM90, 1 × 128 scales for B go with accumulation into float32 only, other blocks with BF16 only."""
        if reason := super().unsupported(major):
            return reason
        if major == 9 and (self.blocks[1][0] == 1) != bool(self.accumulate and self.out_dtype):
            return "on SM90, accumulation in float32 goes with recipe [1, 1, 128] and nothing else does"
        return None

    def points(self, device: Device) -> range:
        """Every M; of a transposed A every 16th, the multiples that its rows of M bytes must be (TMA row stride).

        SM90's accumulating kernel from 33 rows on: for fewer, every DeepGEMM from 0.1.7 to vLLM 0.33.0's 2.8.1 asks for
        block sizes that its own source refuses to compile (``sm90_fp8_gemm_1d1d.cuh``, "Invalid block size").
        """
        if self.layout[0] == "t":
            return range(16, self.largest_m + 1, 16)
        first = 33 if self.accumulate and device.major == 9 else 1
        return range(first, self.largest_m + 1)

    def prepare(self, device: Device) -> Callable[[int], None]:
        """Buffers for the largest M, row-sliced at each call."""
        a, b = self.empty(device, 0, self.largest_m, self.k), self.empty(device, 1, self.n, self.k)
        weight = b.pair() if self.layout[1] == "t" else b.turned()
        d = device.empty(self.largest_m, self.n, dtype=self.out_dtype or "bfloat16")
        gemm, options = self.function(device.deep_gemm), self.options()

        def call(m: int) -> None:
            out = d[:m]
            c = {"c": out} if self.accumulate else {}
            gemm(a.pair(m) if self.layout[0] == "n" else a.turned(m), weight, out, **c, **options)

        return call

    def trial(self, device: Device, value: int, seed: int) -> Trial:
        """M = ``value``; float32 product of the dequantised operands, added to what D held if it accumulates."""
        inputs = Inputs(device, seed)
        a = self.random(device, inputs, 0, value, self.k)
        b = self.random(device, inputs, 1, self.n, self.k)
        d, buffer = inputs.output(value, self.n, dtype=self.out_dtype or "bfloat16")
        expected = product_nt(device.torch, a.values(device.torch), b.values(device.torch))
        c = {}
        if self.accumulate:
            d.copy_(inputs.normal(value, self.n, dtype="float32") * math.sqrt(self.k))
            expected += d.float()
            c = {"c": d}
        gemm = self.function(device.deep_gemm)
        gemm(
            a.pair() if self.layout[0] == "n" else a.turned(),
            b.pair() if self.layout[1] == "t" else b.turned(),
            d,
            **c,
            **self.options(),
        )
        return Trial((dense_output(device.torch, "d", buffer, expected),))

    def reference(self, device: Device) -> Callable[[int], None]:
        """The same product of BF16 operands."""
        return bf16_product(device, self.largest_m, self.n, self.k)
