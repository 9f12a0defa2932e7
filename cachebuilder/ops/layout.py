"""What the scale-factor transforms share: float32 scales in, the layout that DeepGEMM's GEMMs read out.

GEMM ops launch them too where they are given row-major scales; engines also call them by themselves, on weights when
they are loaded and on activations.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, cast

from pydantic import Field

from cachebuilder.ops import scaled
from cachebuilder.ops.base import TokenOp
from cachebuilder.ops.device import Device
from cachebuilder.ops.trial import Inputs, Output, Trial

if TYPE_CHECKING:
    from types import ModuleType


class LayoutOp(TokenOp):
    """Scales [M, ``columns``], of ``groups`` matrices where given; every M, or ``rows`` only."""

    columns: Annotated[int, Field(ge=1, le=1 << 16, description="scales of one row: K / 128 or K / 32")]
    groups: Annotated[int | None, Field(ge=1, le=4096, description="experts; left out: one matrix")] = None
    rows: Annotated[int | None, Field(ge=1, le=1 << 20, description="one number of rows only, as a weight has")] = None

    def function(self, deep_gemm: ModuleType) -> Callable[..., Any]:
        """The function, which is in ``deep_gemm.utils.layout``."""
        from importlib import import_module

        layout = import_module(f"{deep_gemm.__name__}.utils.layout")
        if function := getattr(layout, self.op, None) or getattr(deep_gemm, self.op, None):
            return cast("Callable[..., Any]", function)
        raise LookupError(self.op)

    def points(self, device: Device) -> range:
        """Every M from 1 to ``max_tokens``, or the one number of rows."""
        return range(self.rows, self.rows + 1) if self.rows else super().points(device)

    def scales(self, device: Device, m: int, inputs: Inputs | None = None) -> Any:
        """float32 scales, row-major; random ones are powers of two."""
        shape = (self.groups, m, self.columns) if self.groups else (m, self.columns)
        if inputs is None:
            return device.empty(*shape, dtype="float32")
        return inputs.normal(*shape, dtype="float32").round().exp2()

    def prepare(self, device: Device) -> Callable[[int], None]:
        """Scales for the largest M, row-sliced at each call of one matrix."""
        function = self.function(device.deep_gemm)
        largest = None if self.groups else self.scales(device, max(self.points(device)))

        def call(m: int) -> None:
            function(self.scales(device, m) if largest is None else largest[:m])

        return call

    def result(self, device: Device, values: Any) -> Any:
        """The transformed scales as float32 [groups ·] M × columns."""
        return values

    def trial(self, device: Device, value: int, seed: int) -> Trial:
        """M = ``value``; the same scales, exactly."""
        torch = device.torch
        scales = self.scales(device, value, Inputs(device, seed))
        found = self.result(device, self.function(device.deep_gemm)(scales))
        everything = torch.ones_like(scales, dtype=torch.bool)
        return Trial((Output("sf", found, scales, everything, ~everything, tolerance=0.0),))


def unpacked(device: Device, values: Any, columns: int) -> Any:
    """float32 scales of packed exponents int32 […, M, ⌈columns/4⌉]."""
    return scaled.unpack(device.torch, values)[..., :columns]
