"""K-grouped GEMMs: one product for each expert over its own rows of K, which is the experts' weight gradient."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from cachebuilder.ops import scaled
from cachebuilder.ops.base import Experts, OpBase
from cachebuilder.ops.device import Device
from cachebuilder.ops.seen import SeenCall, Sighting, require, tensor
from cachebuilder.ops.trial import Inputs, Trial, dense_output, product_nt

#: DeepGEMM's alignment of each expert's K (``get_mk_alignment_for_contiguous_layout``), unless somebody sets another.
ALIGNMENT = 128


class KGroupedGemm(OpBase):
    """D [experts, m, n] += A_iᵀ · B_i in float32; each expert's K is every multiple of 128 up to ``max_k``."""

    variable: ClassVar[str] = "k"
    maximum: ClassVar[str | None] = "max_k"
    #: Whether A and B are each expert's [m, K] and [n, K], one after another, instead of [all K, m] and [all K, n].
    k_major: ClassVar[bool] = False
    #: Whether A and B are FP8 with one scale for 1 × 128 of K, instead of BF16.
    fp8: ClassVar[bool] = True

    experts: Experts
    m: Annotated[int, Field(ge=16, le=1 << 20, multiple_of=16, description="rows of each product")]
    n: Annotated[int, Field(ge=16, le=1 << 20, multiple_of=16, description="columns of each product")]
    max_k: Annotated[int, Field(ge=128, le=1 << 20, multiple_of=128, description="the largest K of one expert")]

    @classmethod
    def sighting(cls, call: SeenCall) -> Sighting:
        """Experts and sizes of the products from D, the largest K from the list of all."""
        names = ("a", "b", "d", "ks", "grouped_layout", "c")
        given = call.by_name(
            *names, *(("recipe",) if cls.fp8 else ()), "compiled_dims", "use_psum_layout", "use_padded_sf_layout"
        )
        require(not given["use_psum_layout"] and not given["use_padded_sf_layout"], "another layout")
        require(given.get("recipe") in (None, (1, 1, ALIGNMENT)), f"the recipe {given.get('recipe')}")
        experts, m, n = tensor(given["d"], 3, "float32").shape
        fields = {} if given["compiled_dims"] is None else {"compiled_dims": given["compiled_dims"]}
        return Sighting({"experts": experts, "m": m, "n": n} | fields, max(given["ks"]))

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
        whole = scaled.random(device, inputs, (width, total), scaled.Quantisation(1, ALIGNMENT))
        data, scales = whole.pair()
        parts = data.split(ks, 1)
        flat = device.torch.cat([part.flatten() for part in parts]) if self.k_major else data.mT.contiguous()
        return self._pair(flat, scales.mT.contiguous()), list(whole.values(device.torch).split(ks, 1))

    def _pair(self, data: Any, scales: Any) -> tuple[Any, Any]:
        return data, scales.mT if self.k_major else scales

    def prepare(self, device: Device) -> Callable[[int], None]:
        """New operands at each call; D is also C."""
        d = device.empty(self.experts, self.m, self.n, dtype="float32")
        layout = device.empty(self.experts, dtype="int32")
        function, options = self.function(device.deep_gemm), self.options()

        def call(k: int) -> None:
            ks = [k] * self.experts
            a, b = (self.operand(device, None, width, ks)[0] for width in (self.m, self.n))
            function(a, b, d, ks, layout, d, **options)

        return call

    def trial(self, device: Device, value: int, seed: int) -> Trial:
        """K of ``value`` to 1½ times ``value`` for each expert; float32 products added to what D held."""
        inputs = Inputs(device, seed)
        blocks = max(1, value // ALIGNMENT)
        ks = [count * ALIGNMENT for count in inputs.integers(blocks, blocks + blocks // 2, self.experts)]
        (a, left), (b, right) = (self.operand(device, inputs, width, ks) for width in (self.m, self.n))
        d, buffer = inputs.output(self.experts, self.m, self.n, dtype="float32")
        d.copy_(inputs.normal(self.experts, self.m, self.n, dtype="float32") * math.sqrt(value))
        expected = d.clone()
        for expert in range(self.experts):
            expected[expert] += product_nt(device.torch, left[expert], right[expert])
        self.function(device.deep_gemm)(a, b, d, ks, device.integers(ks), d, **self.options())
        return Trial((dense_output(device.torch, "d", buffer, expected.flatten(0, 1)),))


class KGroupedBf16GemmTnContiguous(KGroupedGemm):
    """The experts' weight gradient in BF16: A [all K, m] and B [all K, n]."""

    fp8 = False

    op: Literal["k_grouped_bf16_gemm_tn_contiguous"]


class KGroupedFp8GemmNtContiguous(KGroupedGemm):
    """The experts' weight gradient in FP8, SM90's form: each expert's A [m, K] and B [n, K], one after another."""

    k_major = True
    majors = (9, 12)

    op: Literal["k_grouped_fp8_gemm_nt_contiguous"]


class KGroupedFp8GemmTnContiguous(KGroupedGemm):
    """The experts' weight gradient in FP8, SM100's form: A [all K, m] and B [all K, n]."""

    majors = (10, 12)

    op: Literal["k_grouped_fp8_gemm_tn_contiguous"]
