"""``transform_sf_into_required_layout``: scales of any recipe into the layout that this arch's kernels read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import Field

from cachebuilder.ops.base import Fp8K, TokenOp
from cachebuilder.ops.device import Device, ceil_div
from cachebuilder.ops.layout import unpacked
from cachebuilder.ops.scaled import Size
from cachebuilder.ops.trial import Inputs, Output, Trial


class TransformSfIntoRequiredLayout(TokenOp):
    """Scales of an operand [M, k], or of ``groups`` of them, with one scale for ``recipe`` = [rows, columns]."""

    op: Literal["transform_sf_into_required_layout"]
    k: Fp8K
    recipe: Annotated[list[Size], Field(min_length=2, max_length=2, description="a block's rows and columns")]
    groups: Annotated[int | None, Field(ge=1, le=4096, description="experts; left out: one matrix")] = None
    rows: Annotated[int | None, Field(ge=1, le=1 << 20, description="one number of rows only, as a weight has")] = None

    def unsupported(self, major: int) -> str | None:
        """SM90 reads 1 × 128, 128 × 128 and, in some DeepGEMMs, 1 × 32."""
        if major == 9 and self.recipe not in ([1, 128], [128, 128], [1, 32]):
            return f"no layout for blocks of {self.recipe} on SM90"
        return super().unsupported(major)

    def points(self, device: Device) -> range:
        """Every M from 1 to ``max_tokens``, or the one number of rows."""
        return range(self.rows, self.rows + 1) if self.rows else super().points(device)

    def call(self, device: Device, m: int, scales: Any) -> Any:
        """The transformed scales. The recipe goes as ``(rows, 1, columns)``, which every DeepGEMM takes."""
        function, (rows, columns) = self.function(device.deep_gemm), self.recipe
        return function(scales, m, self.k, (rows, 1, columns), self.groups, True, False)

    def scales(self, device: Device, m: int, inputs: Inputs | None = None) -> Any:
        """float32 scales, row-major; random ones are powers of two."""
        rows, columns = self.recipe
        shape = (*([self.groups] if self.groups else []), ceil_div(m, rows), ceil_div(self.k, columns))
        if inputs is None:
            return device.empty(*shape, dtype="float32")
        return inputs.normal(*shape, dtype="float32").round().exp2()

    def prepare(self, device: Device) -> Callable[[int], None]:
        """New scales at each call: they are small."""

        def call(m: int) -> None:
            self.call(device, m, self.scales(device, m))

        return call

    def trial(self, device: Device, value: int, seed: int) -> Trial:
        """M = ``value``; the same scales exactly, repeated for each row where they are packed."""
        torch = device.torch
        scales = self.scales(device, value, Inputs(device, seed))
        found, expected = self.call(device, value, scales), scales
        if found.dtype == torch.int32:
            found = unpacked(device, found, scales.shape[-1])
            expected = scales.repeat_interleave(self.recipe[0], -2)[..., :value, :]
        everything = torch.ones_like(expected, dtype=torch.bool)
        return Trial((Output("sf", found, expected, everything, ~everything, tolerance=0.0),))
