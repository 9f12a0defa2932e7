"""``mega_mhc``: hyper-connections between two layers in one kernel (DeepSeek-V4.1)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import Field

from cachebuilder.ops.base import Device, TokenOp


class MegaMhc(TokenOp):
    """x [M, hidden], residual [M, 4, hidden]; called with every M, as vLLM 0.33.0 ``mega_mhc.py`` calls it."""

    majors = (10,)
    found_in = "sgl-deep-gemm 0.2.3.post2 and vLLM 0.33.0's copy"

    op: Literal["mega_mhc"]
    hidden: Annotated[int, Field(ge=1024, le=1 << 16, multiple_of=1024, description="hidden size")]

    def prepare(self, device: Device) -> Callable[[int], None]:
        """Buffers for the largest M, row-sliced at each call."""
        connections, hidden = 4, self.hidden
        mixes = connections * (2 + connections)

        def rows(*shape: int, dtype: str = "float32") -> Any:
            return device.empty(self.largest_m, *shape, dtype=dtype)

        x, residual = rows(hidden, dtype="bfloat16"), rows(connections, hidden, dtype="bfloat16")
        previous, post, mix = rows(connections, 1), rows(connections, 1), rows(connections, connections)
        new_residual, y = rows(connections, hidden, dtype="bfloat16"), rows(hidden, dtype="bfloat16")
        new_previous, new_post, new_mix = rows(connections, 1), rows(connections, 1), rows(connections, connections)
        weight = device.empty(mixes, connections * hidden, dtype="float32")
        scales, bases = device.empty(3, dtype="float32"), device.empty(mixes, dtype="float32")
        norm = device.empty(hidden, dtype="bfloat16")
        function = self.function(device.deep_gemm)

        def call(m: int) -> None:
            function(
                x[:m], residual[:m], previous[:m], post[:m], mix[:m], weight, scales, bases,
                connections, 1e-6, 1e-6, 1.0, 1e-6, 20, norm, 1e-6, 1.0,
                new_residual[:m], new_previous[:m], new_post[:m], new_mix[:m], y_bf16=y[:m],
            )  # fmt: skip

        return call
