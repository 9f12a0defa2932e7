"""``fp4_fp4_mega_moe``: a whole MoE layer in one kernel, NVFP4 experts and shared ones in BF16, on SM100."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from cachebuilder.ops.base import Device
from cachebuilder.ops.mega_moe import Kind, Sm100MegaMoeOp, operand, packed_weight, sm100_buffer, swiglu
from cachebuilder.ops.trial import Inputs, product_nt

_EPSILON = 1e-6


class Fp4Fp4MegaMoe(Sm100MegaMoeOp):
    """Expert weights in FP4 with an E4M3 scale for each 1 × 16; vLLM 0.33.0 ``models/muse_spark/nvidia/mega_moe.py``.

    The expert scales that vLLM gives beside them (``l1_alphas``, ``l2_alphas``, ``a2_scales``) and the norm's epsilon
    are arguments of the kernel and select none (vLLM 0.33.0's copy, ``impls/sm100_fp4_fp4_mega_moe.cuh``).
    """

    found_in = "vLLM 0.33.0's copy"

    op: Literal["fp4_fp4_mega_moe"]
    hidden: Annotated[int, Field(ge=256, le=1 << 16, multiple_of=256, description="hidden size")]
    intermediate: Annotated[int, Field(ge=256, le=1 << 16, multiple_of=256, description="an expert's inner size")]
    shared_experts: Annotated[
        int | None, Field(ge=1, le=64, description="experts of the same size that every token goes to, in BF16")
    ] = None
    post_expert_norm: Annotated[
        Literal[True] | None, Field(description="each expert's output is RMS-normalised before the sum")
    ] = None
    fast_math: Annotated[Literal[False] | None, Field(description="left out: approximate exp and division")] = None

    @model_validator(mode="after")
    def _check_norm(self) -> Fp4Fp4MegaMoe:
        if self.shared_experts and self.post_expert_norm:
            raise ValueError("post_expert_norm goes without shared_experts")
        return self

    def kinds(self) -> tuple[Kind, Kind]:
        """NVFP4 throughout."""
        return "nvfp4", "nvfp4"

    def buffer(self, device: Device) -> Any:
        """The buffer for NVFP4 and the shared experts."""
        return sm100_buffer(device, self, "fp4xfp4", self.shared_experts or 0)

    def extra(self, device: Device, inputs: Inputs, x: Any) -> tuple[dict[str, Any], Any]:
        """The norm's gain, or the shared experts' weights and x in BF16, and what these experts give."""
        torch, hidden = device.torch, self.hidden
        options: dict[str, Any] = {} if self.fast_math is None else {"fast_math": self.fast_math}
        if self.post_expert_norm:
            gain = 1 + inputs.normal(hidden, dtype="float32") / 4
            return options | {"post_expert_norm_gamma": gain, "post_expert_norm_eps": _EPSILON}, 0.0
        if not self.shared_experts:
            return options, 0.0
        inner = self.shared_experts * self.intermediate
        first = operand(device, inputs, "bf16", 2 * hidden**-0.25, 2 * inner, hidden)
        second = operand(device, inputs, "bf16", 1.0, hidden, inner)
        given = device.deep_gemm.transform_weights_for_mega_moe(first.pair(), second.pair())
        options |= {"shared_l1_weights": given[0], "shared_l2_weights": given[1], "x_bf16": x.bfloat16()}
        activation = swiglu(torch, self, product_nt(torch, x.bfloat16(), first.values(torch)), rounded=True)
        return options, product_nt(torch, activation.bfloat16(), second.values(torch)).bfloat16().float()

    def combined(self, device: Device, options: dict[str, Any]) -> Callable[[Any, Any], Any]:
        """A routing weight is applied to an expert's output, BF16 before and after, or to its RMS norm: that of the
        output times the gain (vLLM 0.33.0's copy, ``impls/sm100_fp4_fp4_mega_moe.cuh``).
        """
        if not self.post_expert_norm:
            return lambda output, share: (output * share).bfloat16().float()
        gain = options["post_expert_norm_gamma"]

        def normed(output: Any, share: Any) -> Any:
            row = output * gain
            return row * (row.square().mean(-1, keepdim=True) + _EPSILON).rsqrt() * share

        return normed

    def prepare(self, device: Device) -> Callable[[int], None]:
        """The buffer, this rank's weights, and an output for the most tokens."""
        there = self.buffer(device)
        first = packed_weight(device, self, 2 * self.intermediate, self.hidden, 16)
        second = packed_weight(device, self, self.hidden, self.intermediate, 16)
        y = device.empty(self.largest_m, self.hidden, dtype="bfloat16")
        options: dict[str, Any] = {"activation_clamp": self.activation_clamp}
        if self.fast_math is not None:
            options["fast_math"] = self.fast_math
        if self.post_expert_norm:
            options["post_expert_norm_gamma"] = device.empty(self.hidden, dtype="float32")
            options["post_expert_norm_eps"] = _EPSILON
        x = None
        if self.shared_experts:
            inner = self.shared_experts * self.intermediate
            options["shared_l1_weights"] = device.empty(2 * inner, self.hidden, dtype="bfloat16")
            options["shared_l2_weights"] = device.empty(self.hidden, inner, dtype="bfloat16")
            x = device.empty(self.largest_m, self.hidden, dtype="bfloat16")
        function = self.function(device.deep_gemm)

        def call(m: int) -> None:
            function(y[:m], first, second, there, x_bf16=None if x is None else x[:m], **options)

        return call
