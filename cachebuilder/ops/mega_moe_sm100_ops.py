"""SM100's mega-MoE ops: each a whole MoE layer in one kernel; they differ in formats, activations and norms."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from cachebuilder.ops.attention import accepts
from cachebuilder.ops.device import Device
from cachebuilder.ops.mega_moe import nvfp4_buffer
from cachebuilder.ops.mega_moe_sm100 import QUANTISATIONS, Kind, Plain, Sm100MegaMoeOp, around_one, shared_rows
from cachebuilder.ops.scaled import Scaled, quantised
from cachebuilder.ops.seen import require
from cachebuilder.ops.trial import Inputs, Trial

#: sgl-deep-gemm's default of ``post_expert_norm_eps`` (0.2.3.post2, ``deep_gemm/mega/__init__.py``).
_EPSILON = 1e-6


class ActivatedMegaMoeOp(Sm100MegaMoeOp):
    """A layer with a choice of activations.

    They are SwiGLU; ``swigluoai``, GPT-OSS's, ``gate · sigmoid(1.702 · gate) · (up + 1)``; ``swiglustep``, where gate
    is limited after ``silu``; ``situ``, Kimi K3's, ``α · tanh(gate / α) · sigmoid(gate) · β · tanh(up / β)``. In
    sgl-deep-gemm's ``situ`` α is 4 and β 25. In vLLM 0.33.0's copy ``activation_alpha`` and ``activation_beta`` are its
    α and β (0: up as it is); for the other activations, ``gate · sigmoid(α · gate) · (up + β)``. From
    ``impls/sm100_fp8_fp4_mega_moe.cuh`` of sgl-deep-gemm 0.1.7 and 0.2.3.post2 and of vLLM 0.33.0's copy, and
    ``sm100_fp8_fp4_mega_moe_situ.cuh`` of the latter.
    """

    plain = (*Sm100MegaMoeOp.plain, "activation", "activation_alpha", "activation_beta")

    activation: str | None = None
    activation_alpha: Annotated[
        float | None, Field(ge=-1e6, le=1e6, description="of sigmoid's argument, or situ's first limit; left out: 1")
    ] = None
    activation_beta: Annotated[
        float | None, Field(ge=-1e6, le=1e6, description="added to up, or situ's second limit; left out: 0")
    ] = None

    def buffer_options(self, device: Device) -> dict[str, Any]:
        """Adds the activation, as engines give it."""
        return super().buffer_options(device) | ({"activation": self.activation} if self.activation else {})

    def activated(self, device: Device, gate_up: Any) -> Any:
        """The field ``activation`` of gate and up side by side, float32."""
        torch = device.torch
        takes_alpha = accepts(self.function(device.deep_gemm), "activation_alpha")
        if self.activation == "situ":
            gate, up = gate_up.bfloat16().float().chunk(2, -1)
            alpha, beta = (self.activation_alpha or 1.0, self.activation_beta) if takes_alpha else (4.0, 25.0)
            up = beta * torch.tanh(up / beta) if beta else up
            return alpha * torch.tanh(gate / alpha) * torch.sigmoid(gate) * up
        step = self.activation == "swiglustep"
        gate, up = self.limited(device, gate_up, gate_too=not step)
        alpha = 1.0 if self.activation_alpha is None else self.activation_alpha
        beta = self.activation_beta or 0.0
        if self.activation == "swigluoai":
            alpha, beta = 1.702, 1.0
        gated = gate * torch.sigmoid(alpha * gate)
        return (gated.clamp(max=self.activation_clamp) if step and self.activation_clamp else gated) * (up + beta)


class NormedMegaMoeOp(Sm100MegaMoeOp):
    """A layer that may normalise each expert's output by itself."""

    post_expert_norm: Annotated[
        Literal[True] | None, Field(description="each expert's output is RMS-normalised before the sum, with a gain")
    ] = None

    @model_validator(mode="after")
    def _check_norm(self) -> NormedMegaMoeOp:
        if self.shared_experts and self.post_expert_norm:
            raise ValueError("post_expert_norm goes without shared_experts")
        return self

    @classmethod
    def norm_fields(cls, given: Mapping[str, Any]) -> dict[str, Any]:
        """The norm, its epsilon unless it is the default, and whether it has no gain."""
        with_gain = given["post_expert_norm_gamma"] is not None
        if not (given["post_expert_norm"] or with_gain):
            return {}
        fields: dict[str, Any] = {"post_expert_norm": True}
        if "post_expert_norm_eps" in cls.model_fields and given["post_expert_norm_eps"] not in (None, _EPSILON):
            fields["post_expert_norm_eps"] = given["post_expert_norm_eps"]
        if not with_gain and given["post_expert_norm_weight"] is None:
            fields["post_expert_norm_weight"] = False
        return fields

    def takes(self, deep_gemm: ModuleType, function: Callable[..., Any], field: str) -> bool:
        """In vLLM 0.33.0's copy, a function that takes a gain has the norm."""
        by_gain = field == "post_expert_norm" and accepts(function, "post_expert_norm_gamma")
        return by_gain or super().takes(deep_gemm, function, field)

    def tensors(self, device: Device, inputs: Inputs | None) -> dict[str, Any]:
        """The norm's gain, and the arguments that turn the norm on."""
        options = super().tensors(device, inputs)
        if not self.post_expert_norm:
            return options
        options["post_expert_norm_eps"] = getattr(self, "post_expert_norm_eps", None) or _EPSILON
        gain = around_one(device, inputs, self.hidden)
        if accepts(self.function(device.deep_gemm), "post_expert_norm_gamma"):
            return options | {"post_expert_norm_gamma": gain}
        without = getattr(self, "post_expert_norm_weight", None) is False
        return options | {"post_expert_norm": True, "post_expert_norm_weight": None if without else gain}

    def combined(self, device: Device, options: dict[str, Any]) -> Callable[[Any, Any], Any] | None:
        """A routing weight is applied to the RMS norm of an expert's output.

        In vLLM 0.33.0's copy and with ``post_expert_norm_weight_first`` that is the norm of output times gain; else the
        norm of the output, times the gain (``impls/sm100_bf16_mega_moe.cuh`` of that copy and of sgl-deep-gemm
        0.2.3.post2, ``sm100_fp4_fp4_mega_moe.cuh`` and ``sm100_fp8_fp4_mega_moe.cuh``).
        """
        if not self.post_expert_norm:
            return super().combined(device, options)
        gain_first = "post_expert_norm_gamma" in options or options.get("post_expert_norm_weight_first", False)
        gain = options.get("post_expert_norm_gamma", options.get("post_expert_norm_weight"))
        gain, epsilon = 1.0 if gain is None else gain, options["post_expert_norm_eps"]

        def normed(output: Any, routing_weights: Any) -> Any:
            squares = (output * gain if gain_first else output).square().mean(-1, keepdim=True)
            return output * gain * (squares + epsilon).rsqrt() * routing_weights

        return normed


class NormedActivatedMegaMoeOp(NormedMegaMoeOp, ActivatedMegaMoeOp):
    """A layer with both, and with sgl-deep-gemm's variants of the norm and of the weights' layout."""

    plain = (*ActivatedMegaMoeOp.plain, "post_expert_norm_weight_first", "weight_layout")

    post_expert_norm_eps: Annotated[
        float | None, Field(gt=0, le=1, description="left out: 1e-6; selects no kernel in vLLM's copy")
    ] = None
    post_expert_norm_weight: Annotated[Literal[False] | None, Field(description="false: a norm without a gain")] = None
    post_expert_norm_weight_first: Annotated[
        Literal[True] | None, Field(description="the norm is that of the output times the gain")
    ] = None
    weight_layout: Annotated[
        Literal["trtllm"] | None, Field(description="of the experts' weights; left out: DeepGEMM's own")
    ] = None

    @model_validator(mode="after")
    def _check_variants(self) -> NormedActivatedMegaMoeOp:
        for name in ("post_expert_norm_eps", "post_expert_norm_weight", "post_expert_norm_weight_first"):
            if getattr(self, name) is not None and not self.post_expert_norm:
                raise ValueError(f"{name} goes with post_expert_norm")
        if self.shared_experts and self.weight_layout:
            raise ValueError("weight_layout goes without shared_experts")
        return self

    def trial(self, device: Device, value: int, seed: int) -> Trial:
        """``value`` tokens, one rank.

        Raises:
            NotImplementedError: weights in TensorRT-LLM's layout, whose shuffles are FlashInfer's, not DeepGEMM's.
        """
        if self.weight_layout:
            raise NotImplementedError(f"no reference for weights of {self.weight_layout}")
        return super().trial(device, value, seed)


class Bf16MegaMoe(NormedActivatedMegaMoeOp):
    """A whole MoE layer in one kernel, BF16, on SM100; vLLM 0.33.0 ``fused_moe/deep_gemm_mega_moe.py`` calls it."""

    found_in = "sgl-deep-gemm 0.1.4 to 0.2.5 and vLLM 0.33.0's copy"
    kinds = ("bf16", "bf16")
    buffer_type = "bf16xbf16"

    op: Literal["bf16_mega_moe"]
    activation: Annotated[Literal["swiglustep"] | None, Field(description="left out: swiglu; vLLM's copy's")] = None


class Fp8Fp4MegaMoe(ActivatedMegaMoeOp):
    """A whole MoE layer in one kernel, FP8 activations and FP4 weights, or others of 8 and 4 bits, on SM100.

    Expert weights have packed 1 × 32 scales, as SGLang 0.5.23 ``layers/moe/mega_moe.py`` calls it. Shared experts are
    in FP8 with such scales, in FP4 with ``mxf4xmxf4``.
    """

    op: Literal["fp8_fp4_mega_moe"]
    mma_type: Annotated[
        Literal["fp8xfp8", "mxf4xmxf4"] | None,
        Field(
            description="activations and weights, in DeepGEMM's words; left out: fp8xfp4. fp8xfp8 is not in "
            "sgl-deep-gemm 0.1.7, mxf4xmxf4 not in vLLM's copy"
        ),
    ] = None
    activation: Annotated[
        Literal["swigluoai", "swiglustep", "situ"] | None,
        Field(description="left out: swiglu; swigluoai is sgl-deep-gemm's, swiglustep vLLM's copy's"),
    ] = None

    @classmethod
    def mma_fields(cls, mma_type: str | None) -> dict[str, Any]:
        """The field ``mma_type``; NVFP4 is another op's."""
        require(mma_type in (None, "fp8xfp4", "fp8xfp8", "mxf4xmxf4"), f"a buffer of {mma_type}")
        return {} if mma_type in (None, "fp8xfp4") else {"mma_type": mma_type}

    @property
    def kinds(self) -> tuple[Kind, Kind]:  # type: ignore[override]
        """Those of ``mma_type``."""
        return ("fp4" if self.mma_type == "mxf4xmxf4" else "fp8"), ("fp8" if self.mma_type == "fp8xfp8" else "fp4")

    @property
    def buffer_type(self) -> str:  # type: ignore[override]
        """The field ``mma_type``."""
        return self.mma_type or "fp8xfp4"

    def trial(self, device: Device, value: int, seed: int) -> Trial:
        """``value`` tokens, one rank.

        Raises:
            NotImplementedError: shared experts in FP4: no engine lays out their scales.
        """
        if self.shared_experts and self.mma_type == "mxf4xmxf4":
            raise NotImplementedError("no reference for shared experts in FP4")
        return super().trial(device, value, seed)


class Nvfp4MegaMoe(NormedActivatedMegaMoeOp):
    """A whole MoE layer in one kernel, NVFP4 activations and weights, on SM100.

    Expert weights are FP4 with an E4M3 scale for each 1 × 16, as in vLLM 0.33.0 ``fused_moe/deep_gemm_mega_moe.py``,
    which always gives ``use_x_scales``. SGLang 0.5.23 ``layers/moe/mega_moe.py`` also gives ``l1_alphas``,
    ``l2_alphas`` and ``l2_act_scales``, and calls the function ``fp8_fp4_mega_moe``: it is the same kernel.
    """

    found_in = "sgl-deep-gemm 0.1.7 to 0.2.5 and vLLM 0.33.0's copy"
    kinds = ("nvfp4", "nvfp4")
    buffer_type = "nvfp4xnvfp4"
    plain = (*NormedActivatedMegaMoeOp.plain, "use_x_scales")
    by_tensor = ("l1_alphas", "l2_alphas", "l2_act_scales")

    op: Literal["nvfp4_mega_moe"]
    activation: Annotated[
        Literal["swigluoai", "swiglustep"] | None,
        Field(description="left out: swiglu; swigluoai is sgl-deep-gemm's, swiglustep vLLM's copy's"),
    ] = None
    use_x_scales: Annotated[Literal[True] | None, Field(description="each token also has a float32 scale")] = None
    l1_alphas: Annotated[Literal[True] | None, Field(description="each expert's gate and up have scales")] = None
    l2_alphas: Annotated[Literal[True] | None, Field(description="each expert's output has a scale")] = None
    l2_act_scales: Annotated[
        Literal[True] | None, Field(description="each expert's activations between the GEMMs have a scale")
    ] = None
    shared_dtype: Annotated[
        Literal["bfloat16"] | None, Field(description="of the shared experts in vLLM's copy; left out: FP8")
    ] = None

    @model_validator(mode="after")
    def _check_shared(self) -> Nvfp4MegaMoe:
        if self.shared_dtype and not self.shared_experts:
            raise ValueError("shared_dtype goes with shared_experts")
        return self

    def takes(self, deep_gemm: ModuleType, function: Callable[..., Any], field: str) -> bool:
        """The shared experts' type is an argument of the buffer."""
        if field == "shared_dtype":
            return nvfp4_buffer(deep_gemm) is not None
        return super().takes(deep_gemm, function, field)

    def shared_kind(self, device: Device) -> Kind:
        """FP8 or BF16 in vLLM 0.33.0's copy (``deep_gemm/mega/nvfp4.py``), NVFP4 in sgl-deep-gemm."""
        if nvfp4_buffer(device.deep_gemm) is None:
            return "nvfp4"
        return "bf16" if self.shared_dtype else "fp8"

    def buffer_options(self, device: Device) -> dict[str, Any]:
        """Adds the shared experts' type."""
        options = {"shared_dtype": device.torch.bfloat16} if self.shared_dtype else {}
        return super().buffer_options(device) | options

    def weights(self, device: Device, inputs: Inputs | None) -> tuple[Scaled | Plain, Scaled | Plain]:
        """TensorRT-LLM's scales are in rows (SGLang 0.5.23 ``muse_spark/muse_spark_megamoe.py``)."""
        weights = super().weights(device, inputs)
        if self.weight_layout is None:
            return weights
        first, second = (
            Plain((data, device.empty(*scales.shape, dtype="int32"))) for data, scales in (w.pair() for w in weights)
        )
        return first, second

    def tensors(self, device: Device, inputs: Inputs | None) -> dict[str, Any]:
        """Adds the scales of this rank's experts; gate and up have one each."""
        options, local = super().tensors(device, inputs), self.local_experts
        shapes = {"l1_alphas": (local, 2), "l2_alphas": (local,), "l2_act_scales": (local,)}
        return options | {k: around_one(device, inputs, *shape) for k, shape in shapes.items() if getattr(self, k)}

    def token_scales(self, device: Device, inputs: Inputs, buffer: Any, tokens: int) -> Any:
        """Each token's scale, if it has one."""
        if not self.use_x_scales:
            return 1.0
        scales = around_one(device, inputs, tokens)
        buffer.x_scales[:tokens] = scales
        return scales[:, None]

    def combined(self, device: Device, options: dict[str, Any]) -> Callable[[Any, Any], Any] | None:
        """Where a routing weight is applied, without a norm, depends on the copy.

        sgl-deep-gemm applies it to the activation (``impls/sm100_fp8_fp4_mega_moe.cuh``), vLLM 0.33.0's copy to the
        output (``impls/sm100_nvfp4_mega_moe.cuh``).
        """
        if self.post_expert_norm or nvfp4_buffer(device.deep_gemm) is None:
            return super().combined(device, options)
        return lambda output, routing_weights: output * routing_weights

    def shared_inputs(
        self, device: Device, buffer: Any, x: Scaled | Plain, tokens: int, options: dict[str, Any]
    ) -> Any:
        """Values of ``x`` in the shared experts' own type; a token's scale is not applied to them."""
        torch, values = device.torch, x.values(device.torch)
        if self.shared_dtype:
            buffer.shared_l1_acts[:tokens] = values.bfloat16()
            return values.bfloat16().float()
        activations = quantised(device, values, QUANTISATIONS["fp8"])
        buffer.shared_l1_acts.view(activations.data.dtype)[:tokens] = activations.data
        buffer.shared_l1_acts_sf[shared_rows(device, self, buffer, tokens)] = activations.pair()[1]
        return activations.values(torch)

    def trial(self, device: Device, value: int, seed: int) -> Trial:
        """``value`` tokens, one rank.

        Raises:
            NotImplementedError: shared experts in NVFP4, sgl-deep-gemm's: no engine lays out their scales.
        """
        if self.shared_experts and self.shared_kind(device) == "nvfp4":
            raise NotImplementedError("no reference for shared experts in NVFP4")
        return super().trial(device, value, seed)


class Fp4Fp4MegaMoe(NormedMegaMoeOp):
    """A whole MoE layer in one kernel, NVFP4 experts and BF16 shared ones, on SM100.

    Expert weights are FP4 with an E4M3 scale for each 1 × 16, as in vLLM 0.33.0
    ``models/muse_spark/nvidia/mega_moe.py``. The expert scales that vLLM gives with them (``l1_alphas``, ``l2_alphas``,
    ``a2_scales``) and the norm's epsilon are arguments of the kernel and select none (vLLM 0.33.0's copy,
    ``impls/sm100_fp4_fp4_mega_moe.cuh``).
    """

    found_in = "vLLM 0.33.0's copy"
    kinds = ("nvfp4", "nvfp4")
    buffer_type = "fp4xfp4"

    op: Literal["fp4_fp4_mega_moe"]
    hidden: Annotated[int, Field(ge=256, le=1 << 16, multiple_of=256, description="hidden size")]
    intermediate: Annotated[int, Field(ge=256, le=1 << 16, multiple_of=256, description="an expert's inner size")]

    def shared_kind(self, device: Device) -> Kind:
        """BF16."""
        return "bf16"

    def by_token(self, device: Device) -> dict[str, Any]:
        """The shared experts' activations, BF16."""
        return {"x_bf16": device.empty(self.largest_m, self.hidden, dtype="bfloat16")} if self.shared_experts else {}

    def shared_inputs(
        self, device: Device, buffer: Any, x: Scaled | Plain, tokens: int, options: dict[str, Any]
    ) -> Any:
        """The others' in BF16."""
        options["x_bf16"] = x.values(device.torch).bfloat16()
        return options["x_bf16"].float()

    def combined(self, device: Device, options: dict[str, Any]) -> Callable[[Any, Any], Any]:
        """A routing weight is applied to an expert's output, BF16 before and after, or to its RMS norm.

        vLLM 0.33.0's copy, ``impls/sm100_fp4_fp4_mega_moe.cuh``.
        """
        return super().combined(device, options) or (
            lambda output, routing_weights: (output * routing_weights).bfloat16().float()
        )
