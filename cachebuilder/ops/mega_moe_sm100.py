"""What SM100's mega-MoE ops share: the fields that select their kernel, their operands and their reference."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from cachebuilder.ops.attention import accepts
from cachebuilder.ops.device import Device, round_up
from cachebuilder.ops.mega_moe import LAYER_TOLERANCE, MegaMoeOp, layer, sm100_buffer
from cachebuilder.ops.scaled import Scaled, random, requantised
from cachebuilder.ops.trial import TOLERANCE, Inputs, Trial, dense_output, product_nt

#: What SM100's kernels read: FP8 or FP4 with packed UE8M0 scales for 1 × 32, FP4 with packed E4M3 for 1 × 16, or BF16.
Kind = Literal["fp8", "fp4", "nvfp4", "bf16"]


@dataclass(frozen=True)
class Plain:
    """An operand without scales, as `Scaled` is one with them."""

    data: Any

    def pair(self) -> Any:
        """As DeepGEMM takes it."""
        return self.data

    def values(self, torch: ModuleType, *index: Any) -> Any:
        """float32 values of ``data[index]``."""
        return (self.data[index] if index else self.data).float()


def operand(device: Device, inputs: Inputs | None, kind: Kind, deviation: float, *shape: int) -> Scaled | Plain:
    """Random activations or weights ``[…, MN, K]``; uninitialised without ``inputs``."""
    columns = 16 if kind == "nvfp4" else 32
    if inputs is None:
        return Plain(_empty(device, kind, columns, *shape))
    if kind == "bf16":
        mn, k = shape[-2:]
        data = device.empty(*shape, dtype="bfloat16")
        for matrix in data.view(-1, mn, k):  # one at a time: float32 copies of all experts would not fit
            matrix.copy_(inputs.normal(mn, k, dtype="float32") * deviation)
        return Plain(data)
    return random(device, inputs, shape, (1, columns), True, kind != "fp8", nvfp4=kind == "nvfp4", deviation=deviation)


def _empty(device: Device, kind: Kind, columns: int, *shape: int) -> Any:
    """``[…, MN, K]`` and, but for BF16, a scale for each 1 × ``columns``, four to an int32."""
    *before, mn, k = shape
    if kind == "bf16":
        return device.empty(*shape, dtype="bfloat16")
    data = (
        device.empty(*shape, dtype="float8_e4m3fn")
        if kind == "fp8"
        else device.empty(*before, mn, k // 2, dtype="int8")
    )
    return data, device.empty(*before, k // (4 * columns), mn, dtype="int32").mT


def around_one(device: Device, inputs: Inputs | None, *shape: int) -> Any:
    """Random scales float32, positive; uninitialised without ``inputs``."""
    return (inputs.normal(*shape, dtype="float32") / 4).exp() if inputs else device.empty(*shape, dtype="float32")


#: The copies that take an argument, by the field that gives it: of those not listed, all that are known.
_TAKEN_BY = {
    "activation_alpha": "vLLM 0.33.0's copy",
    "activation_beta": "vLLM 0.33.0's copy",
    "shared_dtype": "vLLM 0.33.0's copy",
    "l1_alphas": "sgl-deep-gemm 0.1.7 to 0.2.5; in vLLM 0.33.0's copy they select no kernel",
    "l2_alphas": "sgl-deep-gemm 0.1.7 to 0.2.5; in vLLM 0.33.0's copy they select no kernel",
    "l2_act_scales": "sgl-deep-gemm 0.1.7 to 0.2.5; in vLLM 0.33.0's copy they select no kernel",
    "weight_layout": "sgl-deep-gemm 0.2.3.post2 and 0.2.5",
    "post_expert_norm": "sgl-deep-gemm 0.2.3.post2 and 0.2.5, and bf16_mega_moe of vLLM 0.33.0's copy",
    "post_expert_norm_weight": "sgl-deep-gemm 0.2.3.post2 and 0.2.5",
    "post_expert_norm_weight_first": "sgl-deep-gemm 0.2.3.post2 and 0.2.5",
}
#: sgl-deep-gemm's default of ``post_expert_norm_eps`` (0.2.3.post2, ``deep_gemm/mega/__init__.py``).
_EPSILON = 1e-6


class Sm100MegaMoeOp(MegaMoeOp):
    """A layer on SM100; the reference is from its kernels' sources and was held to no such card yet.

    What a routing weight is applied to, that gate and up are rounded to BF16 before they are limited, and that a shared
    expert's output goes into the sum as it is: ``impls/sm100_bf16_mega_moe.cuh`` and ``sm100_fp8_fp4_mega_moe.cuh`` of
    sgl-deep-gemm 0.1.7 and 0.2.3.post2 and of vLLM 0.33.0's copy.
    """

    majors = (10,)
    #: Fields that are keyword arguments of the call as they are.
    plain: ClassVar[tuple[str, ...]] = ("fast_math",)

    shared_experts: Annotated[
        int | None, Field(ge=1, le=64, description="experts of the same size that every token goes to")
    ] = None
    fast_math: Annotated[Literal[False] | None, Field(description="left out: approximate exp and division")] = None

    def function(self, deep_gemm: ModuleType) -> Callable[..., Any]:
        """DeepGEMM's function. Raises LookupError also where it does not take what a field gives."""
        function = super().function(deep_gemm)
        for field, copies in _TAKEN_BY.items():
            if getattr(self, field, None) is not None and not self.takes(deep_gemm, function, field):
                raise LookupError(f"{self.op} with {field} (found in {copies})")
        return function

    def takes(self, deep_gemm: ModuleType, function: Callable[..., Any], field: str) -> bool:
        """Whether DeepGEMM's function takes what ``field`` gives."""
        return accepts(function, field)

    def kinds(self) -> tuple[Kind, Kind]:
        """Of activations, before each GEMM, and of weights."""
        raise NotImplementedError

    def shared_kind(self, device: Device) -> Kind:
        """Of the shared experts' activations and weights."""
        return self.kinds()[0]

    @property
    def buffer_type(self) -> str:
        """DeepGEMM's word for the buffer's types."""
        raise NotImplementedError

    def buffer(self, device: Device) -> Any:
        """DeepGEMM's own buffer."""
        return sm100_buffer(device, self, self.buffer_type, **self.buffer_options(device))

    def buffer_options(self, device: Device) -> dict[str, Any]:
        """Keyword arguments of the buffer."""
        return {"num_shared_experts": self.shared_experts} if self.shared_experts else {}

    def scalars(self) -> dict[str, Any]:
        """Keyword arguments of the call that the manifest sets."""
        set_here = {name: getattr(self, name) for name in self.plain}
        return {"activation_clamp": self.activation_clamp} | {k: v for k, v in set_here.items() if v is not None}

    def tensors(self, device: Device, inputs: Inputs | None) -> dict[str, Any]:
        """More keyword arguments of the call, random or uninitialised, but for the shared experts'."""
        return {}

    def by_token(self, device: Device) -> dict[str, Any]:
        """Keyword arguments of the call that have a row for each token."""
        return {}

    def activated(self, device: Device, both: Any) -> Any:
        """The activation of gate and up side by side, float32, which are BF16 before they are limited."""
        gate, up = self.limited(device, both)
        return device.torch.nn.functional.silu(gate) * up

    def limited(self, device: Device, both: Any, gate_too: bool = True) -> tuple[Any, Any]:
        """Gate and up in BF16, and so is their limit."""
        gate, up = both.bfloat16().float().chunk(2, -1)
        if self.activation_clamp is None:
            return gate, up
        limit = float(device.torch.tensor(self.activation_clamp, dtype=device.torch.bfloat16))
        return gate.clamp(max=limit) if gate_too else gate, up.clamp(-limit, limit)

    def combined(self, device: Device, options: dict[str, Any]) -> Callable[[Any, Any], Any] | None:
        """What `layer` says of it, for the keyword arguments of the call."""
        return None

    def scaled_by(self, device: Device, inputs: Inputs, there: Any, tokens: int) -> Any:
        """What the first GEMM's sum of each token is multiplied by, which is in the buffer, too."""
        return 1.0

    def weights(self, device: Device, inputs: Inputs | None) -> tuple[Scaled | Plain, Scaled | Plain]:
        """This rank's experts'."""
        kind, local, inner, hidden = self.kinds()[1], self.local_experts, self.intermediate, self.hidden
        first = operand(device, inputs, kind, 2 * hidden**-0.25, local, 2 * inner, hidden)
        return first, operand(device, inputs, kind, 1.0, local, hidden, inner)

    def shared_weights(self, device: Device, inputs: Inputs | None) -> tuple[Scaled | Plain, Scaled | Plain]:
        """The shared experts', side by side as one."""
        assert self.shared_experts is not None
        kind, inner, hidden = self.shared_kind(device), self.shared_experts * self.intermediate, self.hidden
        first = operand(device, inputs, kind, 2 * hidden**-0.25, 2 * inner, hidden)
        return first, operand(device, inputs, kind, 1.0, hidden, inner)

    def prepare(self, device: Device) -> Callable[[int], None]:
        """The buffer, this rank's weights, and an output for the most tokens."""
        there = self.buffer(device)
        first, second = (weight.pair() for weight in self.weights(device, None))
        y = device.empty(self.largest_m, self.hidden, dtype="bfloat16")
        function, options, rows = self.function(device.deep_gemm), self.scalars(), self.by_token(device)
        options |= self.tensors(device, None)
        if self.shared_experts:
            shared = self.shared_weights(device, None)
            options |= {f"shared_l{number}_weights": weight.pair() for number, weight in enumerate(shared, 1)}

        def call(m: int) -> None:
            given = {name: row[:m] for name, row in rows.items()}
            function(y[:m], first, second, there, **options, **given)

        return call

    def shared_trial(self, device: Device, inputs: Inputs, there: Any, x: Scaled | Plain, tokens: int) -> Any:
        """What the shared experts give for activations ``x``, and the keyword arguments that have them."""
        torch, kind = device.torch, self.shared_kind(device)
        first, second = self.shared_weights(device, inputs)
        given = _transformed(device, kind, first.pair(), second.pair())
        options = {"shared_l1_weights": given[0], "shared_l2_weights": given[1]}
        values = self.shared_inputs(device, there, x, tokens, options)
        activation = _kept(torch, kind, self.activated(device, product_nt(torch, values, first.values(torch))))
        return options, product_nt(torch, activation, second.values(torch)).bfloat16().float()

    def shared_inputs(self, device: Device, there: Any, x: Scaled | Plain, tokens: int, options: dict[str, Any]) -> Any:
        """The shared experts' activations in float32, which are the others', with scales in a layout of their own."""
        if isinstance(x, Scaled):
            there.shared_l1_acts_sf[shared_rows(device, self, there, tokens)] = x.pair()[1]
        return x.values(device.torch)

    def trial(self, device: Device, value: int, seed: int) -> Trial:
        """``value`` tokens, one rank.

        Raises:
            NotImplementedError: outputs are sent in FP8 (``DG_USE_FP8_COMBINE`` of sgl-deep-gemm).
        """
        if os.environ.get("DG_USE_FP8_COMBINE", "0") != "0":
            raise NotImplementedError("no reference for DG_USE_FP8_COMBINE")
        torch, inputs, hidden = device.torch, Inputs(device, seed), self.hidden
        kind, there = self.kinds()[0], self.buffer(device)
        # Gate and up of deviation 4: some beyond a clamp of 7 or 10, and within NVFP4's scales, which end at 448.
        x = operand(device, inputs, kind, 2 * hidden**-0.25, value, hidden)
        first, second = self.weights(device, inputs)
        chosen, weights = self.routing(device, inputs, value)
        there.x.view(x.data.dtype)[:value] = x.data
        if isinstance(x, Scaled):
            there.x_sf[:value] = x.pair()[1]
        there.topk_idx[:value], there.topk_weights[:value] = chosen, weights
        y, buffer = inputs.output(value, hidden, dtype="bfloat16")
        options, more = self.scalars() | self.tensors(device, inputs), 0.0
        scales = self.scaled_by(device, inputs, there, value)
        if self.shared_experts:
            shared, more = self.shared_trial(device, inputs, there, x, value)
            options |= shared
        given = _transformed(device, kind, first.pair(), second.pair())
        self.function(device.deep_gemm)(y, *given, there, **options)
        gate_up, down, outer = (options.get(name) for name in ("l1_alphas", "l2_alphas", "l2_act_scales"))
        expected = layer(
            torch, self, x.values(torch) * scales, chosen, weights,
            lambda expert: _times(first.values(torch, expert), gate_up, expert),
            lambda expert: _times(second.values(torch, expert), down, expert),
            lambda activation: _kept(torch, kind, activation),
            lambda both: self.activated(device, both), self.combined(device, options),
            lambda expert: 1.0 if outer is None else outer[expert],
        )  # fmt: skip
        tolerance = TOLERANCE if kind == "bf16" else LAYER_TOLERANCE
        return Trial((replace(dense_output(torch, "y", buffer, expected + more), tolerance=tolerance),))


def _times(weights: Any, alphas: Any, expert: int) -> Any:
    """An expert's weights times its scale, or gate's and up's times theirs."""
    if alphas is None:
        return weights
    alpha = alphas[expert]
    return weights * (alpha.repeat_interleave(len(weights) // 2)[:, None] if alpha.ndim else alpha)


def shared_rows(device: Device, op: MegaMoeOp, there: Any, tokens: int) -> Any:
    """Rows of the shared experts' scales: pages of 128 for each block of M, each as UTCCP reads it.

    vLLM 0.33.0 ``fused_moe/prepare_megamoe.py``, ``_shared_sf_row``; SGLang 0.5.23 ``layers/moe/mega_moe.py`` gives its
    pre-dispatch the same block of M.
    """
    deep_gemm, kind = device.deep_gemm, there.mma_type
    shape = op.ranks, op.experts, there.num_max_tokens_per_rank, tokens, op.topk
    if kind == "nvfp4":
        block = int(deep_gemm.get_block_m_for_nvfp4_mega_moe(*shape))
    else:
        block = int(deep_gemm.get_block_m_for_mega_moe(*shape, kind))
    token = device.torch.arange(tokens, device=device.name)
    row = token % block
    return token // block * round_up(block, 128) + row // 128 * 128 + row % 32 * 4 + row % 128 // 32


class ActivatedMegaMoeOp(Sm100MegaMoeOp):
    """A layer with a choice of activations.

    They are SwiGLU; ``swigluoai``, GPT-OSS's, ``gate · sigmoid(1.702 · gate) · (up + 1)``; ``swiglustep``, where gate
    is limited after ``silu``; ``situ``, Kimi K3's, ``α · tanh(gate / α) · sigmoid(gate) · β · tanh(up / β)``. Of
    sgl-deep-gemm's ``situ`` α is 4 and β 25. In vLLM 0.33.0's copy ``activation_alpha`` and ``activation_beta`` are its
    α and β (0: up as it is), and for the others, ``gate · sigmoid(α · gate) · (up + β)``. As in
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
        """The activation, too, as engines give it."""
        return super().buffer_options(device) | ({"activation": self.activation} if self.activation else {})

    def activated(self, device: Device, both: Any) -> Any:
        """As ``activation`` says."""
        torch = device.torch
        chosen = accepts(self.function(device.deep_gemm), "activation_alpha")
        if self.activation == "situ":
            gate, up = both.bfloat16().float().chunk(2, -1)
            alpha, beta = (self.activation_alpha or 1.0, self.activation_beta) if chosen else (4.0, 25.0)
            up = beta * torch.tanh(up / beta) if beta else up
            return alpha * torch.tanh(gate / alpha) * torch.sigmoid(gate) * up
        step = self.activation == "swiglustep"
        gate, up = self.limited(device, both, gate_too=not step)
        alpha = 1.0 if self.activation_alpha is None else self.activation_alpha
        beta = self.activation_beta or 0.0
        if self.activation == "swigluoai":
            alpha, beta = 1.702, 1.0
        gated = gate * torch.sigmoid(alpha * gate)
        return (gated.clamp(max=self.activation_clamp) if step and self.activation_clamp else gated) * (up + beta)


class NormedMegaMoeOp(Sm100MegaMoeOp):
    """A layer whose experts may be normalised, each by itself."""

    post_expert_norm: Annotated[
        Literal[True] | None, Field(description="each expert's output is RMS-normalised before the sum, with a gain")
    ] = None

    @model_validator(mode="after")
    def _check_norm(self) -> NormedMegaMoeOp:
        if self.shared_experts and self.post_expert_norm:
            raise ValueError("post_expert_norm goes without shared_experts")
        return self

    def takes(self, deep_gemm: ModuleType, function: Callable[..., Any], field: str) -> bool:
        """The norm is there where a gain is, in vLLM 0.33.0's copy."""
        by_gain = field == "post_expert_norm" and accepts(function, "post_expert_norm_gamma")
        return by_gain or super().takes(deep_gemm, function, field)

    def tensors(self, device: Device, inputs: Inputs | None) -> dict[str, Any]:
        """The norm's gain, and what else asks for it."""
        given = super().tensors(device, inputs)
        if not self.post_expert_norm:
            return given
        given["post_expert_norm_eps"] = getattr(self, "post_expert_norm_eps", None) or _EPSILON
        gain = around_one(device, inputs, self.hidden)
        if accepts(self.function(device.deep_gemm), "post_expert_norm_gamma"):
            return given | {"post_expert_norm_gamma": gain}
        without = getattr(self, "post_expert_norm_weight", None) is False
        return given | {"post_expert_norm": True, "post_expert_norm_weight": None if without else gain}

    def combined(self, device: Device, options: dict[str, Any]) -> Callable[[Any, Any], Any] | None:
        """A routing weight is applied to the RMS norm of an expert's output.

        The norm is that of the output times the gain in vLLM 0.33.0's copy and with
        ``post_expert_norm_weight_first``, else that of the output, times the gain (``impls/sm100_bf16_mega_moe.cuh`` of
        that copy and of sgl-deep-gemm 0.2.3.post2, ``sm100_fp4_fp4_mega_moe.cuh`` and ``sm100_fp8_fp4_mega_moe.cuh``).
        """
        if not self.post_expert_norm:
            return super().combined(device, options)
        inside = "post_expert_norm_gamma" in options or options.get("post_expert_norm_weight_first", False)
        gain = options.get("post_expert_norm_gamma", options.get("post_expert_norm_weight"))
        gain, epsilon = 1.0 if gain is None else gain, options["post_expert_norm_eps"]

        def normed(output: Any, share: Any) -> Any:
            squares = (output * gain if inside else output).square().mean(-1, keepdim=True)
            return output * gain * (squares + epsilon).rsqrt() * share

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


def _transformed(device: Device, kind: Kind, first: Any, second: Any) -> Any:
    """Weights as the kernels read them; sgl-deep-gemm brings those for FP4 activations into another order."""
    transform = device.deep_gemm.transform_weights_for_mega_moe
    mma_type = {"fp4": "mxf4xmxf4", "nvfp4": "nvfp4xnvfp4"}.get(kind)
    given = {"mma_type": mma_type} if mma_type and accepts(transform, "mma_type") else {}
    return transform(first, second, **given)


def _kept(torch: ModuleType, kind: Kind, activation: Any) -> Any:
    """Activations between the GEMMs, of the kind that those before the first have."""
    if kind == "bf16":
        return activation.bfloat16().float()
    return requantised(torch, activation, 16 if kind == "nvfp4" else 32, kind != "fp8", kind == "nvfp4")
