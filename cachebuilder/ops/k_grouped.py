"""What the k-grouped ops share: one product for each expert over its own rows of K, the weight gradient of experts."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated, Any, ClassVar

from pydantic import Field

from cachebuilder.ops import scaled
from cachebuilder.ops.base import Experts, OpBase
from cachebuilder.ops.device import Device
from cachebuilder.ops.trial import Inputs, Trial, dense_output, product_nt

#: DeepGEMM's alignment of each expert's K (``get_mk_alignment_for_contiguous_layout``) where nobody sets it.
ALIGNMENT = 128


class KGroupedGemm(OpBase):
    """D [experts, m, n] += A_iᵀ · B_i in float32; called with every multiple of 128 to ``max_k`` as each expert's K."""

    variable: ClassVar[str] = "k"
    #: Whether A and B are [m, K] and [n, K] of each expert, one after another, or [all K, m] and [all K, n].
    k_major: ClassVar[bool] = False
    #: Whether A and B are FP8 with one scale for 1 × 128 of K.
    fp8: ClassVar[bool] = True

    experts: Experts
    m: Annotated[int, Field(ge=16, le=1 << 20, multiple_of=16, description="rows of each product")]
    n: Annotated[int, Field(ge=16, le=1 << 20, multiple_of=16, description="columns of each product")]
    max_k: Annotated[int, Field(ge=128, le=1 << 20, multiple_of=128, description="the largest K of one expert")]

    def points(self, device: Device) -> range:
        """Every multiple of 128 up to ``max_k``."""
        return range(ALIGNMENT, self.max_k + 1, ALIGNMENT)

    def operand(self, device: Device, inputs: Inputs | None, width: int, ks: list[int]) -> tuple[Any, list[Any]]:
        """A or B as DeepGEMM takes it, and each expert's float32 values [``width``, K_i] (none without ``inputs``)."""
        total = sum(ks)
        if not self.fp8:
            data = inputs.normal(total, width) if inputs else device.empty(total, width, dtype="bfloat16")
            return data, [part.mT.float() for part in data.split(ks)] if inputs else []
        if inputs is None:
            flat = device.empty(total * width, dtype="float8_e4m3fn")
            # Each row's scales one after another, as [all K / 128, width], whichever way the data lies.
            scales = device.empty(total // ALIGNMENT, width, dtype="float32")
            return self._pair(flat if self.k_major else flat.view(total, width), scales), []
        whole = scaled.random(device, inputs, (width, total), (1, ALIGNMENT), packed=False)
        data, scales = whole.pair()
        parts = data.split(ks, 1)
        flat = device.torch.cat([part.flatten() for part in parts]) if self.k_major else data.mT.contiguous()
        return self._pair(flat, scales.mT.contiguous()), list(whole.values(device.torch).split(ks, 1))

    def _pair(self, data: Any, scales: Any) -> tuple[Any, Any]:
        return data, scales.mT if self.k_major else scales

    def prepare(self, device: Device) -> Callable[[int], None]:
        """New operands at each call; D is C."""
        d = device.empty(self.experts, self.m, self.n, dtype="float32")
        layout = device.empty(self.experts, dtype="int32")
        function, options = self.function(device.deep_gemm), self.options()

        def call(k: int) -> None:
            ks = [k] * self.experts
            a, b = (self.operand(device, None, width, ks)[0] for width in (self.m, self.n))
            function(a, b, d, ks, layout, d, **options)

        return call

    def trial(self, device: Device, value: int, seed: int) -> Trial:
        """K of ``value`` to three halves of it for each expert; float32 products added to what D held."""
        inputs = Inputs(device, seed)
        most = max(1, value // ALIGNMENT)
        ks = [part * ALIGNMENT for part in inputs.integers(most, most + most // 2, self.experts)]
        (a, left), (b, right) = (self.operand(device, inputs, width, ks) for width in (self.m, self.n))
        d, buffer = inputs.output(self.experts, self.m, self.n, dtype="float32")
        d.copy_(inputs.normal(self.experts, self.m, self.n, dtype="float32") * math.sqrt(value))
        expected = d.clone()
        for expert in range(self.experts):
            expected[expert] += product_nt(device.torch, left[expert], right[expert])
        layout = device.torch.tensor(ks, dtype=device.torch.int32, device=device.name)
        self.function(device.deep_gemm)(a, b, d, ks, layout, d, **self.options())
        return Trial((dense_output(device.torch, "d", buffer, expected.flatten(0, 1)),))
