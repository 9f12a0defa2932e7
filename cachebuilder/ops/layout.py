"""Transforms of scale factors: float32 scales in, the layout that DeepGEMM's GEMMs read out.

GEMM ops launch them too if they get row-major scales. Engines also call them directly: on weights when these are
loaded, and on activations.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

from pydantic import Field

from cachebuilder.ops.base import Fp8K, TokenOp
from cachebuilder.ops.device import Device, ceil_div
from cachebuilder.ops.scaled import Size, unpack
from cachebuilder.ops.seen import SeenCall, Sighting, Tensor, require
from cachebuilder.ops.trial import Inputs, Output, Trial

Groups = Annotated[int | None, Field(ge=1, le=4096, description="experts; left out: one matrix")]
Rows = Annotated[int | None, Field(ge=1, le=1 << 20, description="one number of rows only, as a weight has")]


class ScaleTransform(TokenOp):
    """Scales of an operand with M rows, or of ``groups`` of them; called with every M, or with ``rows`` only."""

    if TYPE_CHECKING:  # fields of the subclasses, which declare them in the order that dumps have
        groups: int | None
        rows: int | None

    @property
    def block_rows(self) -> int:
        """Rows of the operand that one scale covers."""
        return 1

    @property
    def scale_columns(self) -> int:
        """Scales of one row."""
        raise NotImplementedError

    def transformed(self, device: Device, m: int, scales: Any) -> Any:
        """Call DeepGEMM; returns what it makes of the ``scales`` of M rows."""
        raise NotImplementedError

    def points(self, device: Device) -> range:
        """Every M from 1 to ``max_tokens``, or the one number of rows."""
        return range(self.rows, self.rows + 1) if self.rows else super().points(device)

    def shape_of_scales(self, m: int) -> tuple[int, ...]:
        """``[groups,] ⌈M / block_rows⌉, scale_columns``."""
        return (*([self.groups] if self.groups else []), ceil_div(m, self.block_rows), self.scale_columns)

    def prepare(self, device: Device) -> Callable[[int], None]:
        """Scales for the largest M, row-sliced at each call; for several matrices, new scales at each call."""
        largest = (
            None if self.groups else device.empty(*self.shape_of_scales(max(self.points(device))), dtype="float32")
        )

        def call(m: int) -> None:
            shape = self.shape_of_scales(m)
            self.transformed(
                device, m, device.empty(*shape, dtype="float32") if largest is None else largest[: shape[0]]
            )

        return call

    def trial(self, device: Device, value: int, seed: int) -> Trial:
        """M = ``value``, scales that are powers of two; the same scales exactly, repeated for each row where packed."""
        torch = device.torch
        scales = Inputs(device, seed).normal(*self.shape_of_scales(value), dtype="float32").round().exp2()
        actual, expected = self.transformed(device, value, scales), scales
        if actual.dtype == torch.int32:
            actual = unpack(torch, actual)[..., : self.scale_columns]
            expected = scales.repeat_interleave(self.block_rows, -2)[..., :value, :]
        everything = torch.ones_like(expected, dtype=torch.bool)
        return Trial((Output("sf", actual, expected, everything, ~everything, tolerance=0.0),))


class TmaAlignedScales(ScaleTransform):
    """Scales [M, ``columns``], one for each row of the operand."""

    columns: Annotated[int, Field(ge=1, le=1 << 16, description="scales of one row: K / 128 or K / 32")]
    groups: Groups = None
    rows: Rows = None

    @property
    def scale_columns(self) -> int:
        """The field ``columns``."""
        return self.columns

    def function(self, deep_gemm: ModuleType) -> Callable[..., Any]:
        """The function, which is in ``deep_gemm.utils.layout``."""
        layout = import_module(f"{deep_gemm.__name__}.utils.layout")
        if function := getattr(layout, self.op, None) or getattr(deep_gemm, self.op, None):
            return cast("Callable[..., Any]", function)
        raise LookupError(self.op)

    @classmethod
    def sighting(cls, call: SeenCall) -> Sighting:
        """The number of rows that was seen: `rows` stays open, since an engine calls it for weights and for tokens."""
        [scales] = call.by_name("sf").values()
        require(isinstance(scales, Tensor) and len(scales.shape) in (2, 3), f"scales {scales}")
        *groups, rows, columns = scales.shape
        return Sighting({"columns": columns} | ({"groups": groups[0]} if groups else {}), rows)

    def transformed(self, device: Device, m: int, scales: Any) -> Any:
        """The transformed scales."""
        return self.function(device.deep_gemm)(scales)


class GetMnMajorTmaAlignedTensor(TmaAlignedScales):
    """float32 scales into the layout that SM90's kernels read: M-major and padded to 16 bytes."""

    op: Literal["get_mn_major_tma_aligned_tensor"]


class GetMnMajorTmaAlignedPackedUe8m0Tensor(TmaAlignedScales):
    """float32 scales into Blackwell's packed exponents: int32 [M, ⌈columns/4⌉] of four each."""

    op: Literal["get_mn_major_tma_aligned_packed_ue8m0_tensor"]


class TransformSfIntoRequiredLayout(ScaleTransform):
    """Scales of any recipe into the layout that this arch's kernels read.

    They belong to an operand [M, k], or to ``groups`` of them, with one scale for ``recipe`` = [rows, columns].
    """

    op: Literal["transform_sf_into_required_layout"]
    k: Fp8K
    recipe: Annotated[list[Size], Field(min_length=2, max_length=2, description="a block's rows and columns")]
    groups: Groups = None
    rows: Rows = None

    @property
    def block_rows(self) -> int:
        """The recipe's rows."""
        return self.recipe[0]

    @property
    def scale_columns(self) -> int:
        """Blocks in a row of K."""
        return ceil_div(self.k, self.recipe[1])

    def unsupported(self, major: int) -> str | None:
        """SM90 reads 1 × 128, 128 × 128 and, in some DeepGEMMs, 1 × 32."""
        if major == 9 and self.recipe not in ([1, 128], [128, 128], [1, 32]):
            return f"no layout for blocks of {self.recipe} on SM90"
        return super().unsupported(major)

    @classmethod
    def sighting(cls, call: SeenCall) -> Sighting:
        """The recipe's part for this operand, and the number of rows that was seen."""
        names = ("sf", "mn", "k", "recipe", "num_groups", "is_sfa", "disable_ue8m0_cast", "psum_layout")
        given = call.by_name(*names)
        recipe = given["recipe"]
        require(isinstance(recipe, tuple) and len(recipe) in (2, 3), f"the recipe {recipe}")
        require(not given["disable_ue8m0_cast"] and given["psum_layout"] is None, "disable_ue8m0_cast or psum_layout")
        rows = recipe[0] if len(recipe) == 2 or given["is_sfa"] else recipe[1]
        fields = {"k": given["k"], "recipe": [rows, recipe[-1]]}
        return Sighting(fields | ({"groups": given["num_groups"]} if given["num_groups"] else {}), given["mn"])

    def transformed(self, device: Device, m: int, scales: Any) -> Any:
        """The transformed scales. The recipe goes as ``(rows, 1, columns)``, which every DeepGEMM takes."""
        function, (rows, columns) = self.function(device.deep_gemm), self.recipe
        return function(scales, m, self.k, (rows, 1, columns), self.groups, True, False)
