"""What SM100's mega-MoE ops share: the fields that select their kernel, their operands and their reference."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from cachebuilder.ops.attention import accepts
from cachebuilder.ops.device import Device, round_up
from cachebuilder.ops.mega_moe import LAYER_TOLERANCE, MegaMoeOp, ReferenceLayer, sm100_buffer
from cachebuilder.ops.scaled import Quantisation, Scaled, empty, random, requantised
from cachebuilder.ops.seen import SeenCall, Sighting, require, tensor
from cachebuilder.ops.trial import TOLERANCE, Inputs, Trial, dense_output, product_nt

#: What SM100's kernels read.
Kind = Literal["fp8", "fp4", "nvfp4", "bf16"]
#: FP8 or FP4 with packed UE8M0 scales for 1 × 32, and FP4 with packed E4M3 scales for 1 × 16. BF16 has none.
QUANTISATIONS: dict[Kind, Quantisation] = {
    "fp8": Quantisation(1, 32, "ue8m0"),
    "fp4": Quantisation(1, 32, "ue8m0", fp4=True),
    "nvfp4": Quantisation(1, 16, "e4m3", fp4=True),
}


@dataclass(frozen=True)
class Plain:
    """An operand without block scales, with the methods of `Scaled`."""

    data: Any

    def pair(self) -> Any:
        """As DeepGEMM takes it."""
        return self.data

    def values(self, torch: ModuleType, *index: Any) -> Any:
        """float32 values of ``data[index]``."""
        return (self.data[index] if index else self.data).float()


def operand(device: Device, inputs: Inputs | None, kind: Kind, deviation: float, *shape: int) -> Scaled | Plain:
    """Activations or weights ``[…, MN, K]``: random with ``deviation`` around 0, uninitialised without ``inputs``."""
    if kind != "bf16":
        if inputs is None:
            return empty(device, shape, QUANTISATIONS[kind])
        return random(device, inputs, shape, QUANTISATIONS[kind], deviation)
    data = device.empty(*shape, dtype="bfloat16")
    if inputs is not None:
        for matrix in data.view(-1, *shape[-2:]):  # one at a time: float32 copies of all experts would not fit
            matrix.copy_(inputs.normal(*matrix.shape, dtype="float32") * deviation)
    return Plain(data)


def around_one(device: Device, inputs: Inputs | None, *shape: int) -> Any:
    """Random scales float32, positive; uninitialised without ``inputs``."""
    return (inputs.normal(*shape, dtype="float32") / 4).exp() if inputs else device.empty(*shape, dtype="float32")


#: The copies that take an argument, by the field that gives it; every known copy takes an unlisted one.
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


#: DeepGEMM's own values of fields that are left out.
_DEFAULTS = {"activation": "swiglu", "fast_math": True, "weight_layout": "megamoe"}
#: Keyword arguments of the norm; the last is that of vLLM 0.33.0's copy.
NORM_ARGUMENTS = (
    "post_expert_norm", "post_expert_norm_weight", "post_expert_norm_eps", "post_expert_norm_gamma",
)  # fmt: skip


class Sm100MegaMoeOp(MegaMoeOp):
    """A layer on SM100. Its reference is from the kernels' sources and has not been checked on such a card.

    What a routing weight is applied to, that gate and up are rounded to BF16 before they are limited, and that a shared
    expert's output goes into the sum as it is: ``impls/sm100_bf16_mega_moe.cuh`` and ``sm100_fp8_fp4_mega_moe.cuh`` of
    sgl-deep-gemm 0.1.7 and 0.2.3.post2 and of vLLM 0.33.0's copy.
    """

    majors = (10,)
    #: Kinds of activations, before each GEMM, and of weights.
    kinds: ClassVar[tuple[Kind, Kind]]
    #: DeepGEMM's word for the buffer's types.
    buffer_type: ClassVar[str]
    #: Fields that are keyword arguments of the call as they are.
    plain: ClassVar[tuple[str, ...]] = ("fast_math",)
    #: Fields that are true where a tensor is given by that name.
    by_tensor: ClassVar[tuple[str, ...]] = ()

    shared_experts: Annotated[
        int | None, Field(ge=1, le=64, description="experts of the same size that every token goes to")
    ] = None
    fast_math: Annotated[Literal[False] | None, Field(description="left out: approximate exp and division")] = None

    @classmethod
    def sighting(cls, call: SeenCall) -> Sighting:
        """All sizes from the buffer, the tokens from y; each argument that selects a kernel has a field of its name.

        Raises:
            Inexpressible: a fifth argument by position, whose meaning differs between the copies.
        """
        first = ("y", "l1_weights", "l2_weights", "sym_buffer")
        without_field = ("shared_l1_weights", "shared_l2_weights", "cumulative_local_expert_recv_stats", "recipe")
        given = call.by_name(*first, "activation_clamp", *cls.plain, *cls.by_tensor, *NORM_ARGUMENTS, *without_field)
        require(len(call.arguments) <= len(first), "a fifth argument by position")
        buffer = given["sym_buffer"]
        fields = cls.buffer_fields(buffer) | cls.mma_fields(buffer["fields"].get("mma_type"))
        for name in ("activation_clamp", *cls.plain):
            if given[name] not in (None, _DEFAULTS.get(name, False)):
                fields[name] = given[name]
        fields |= {name: True for name in cls.by_tensor if given[name] is not None}
        if given["shared_l1_weights"] is not None:
            fields["shared_experts"] = buffer["fields"]["num_shared_experts"]
        return Sighting(fields | cls.norm_fields(given), tensor(given["y"], 2, "bfloat16").shape[0])

    @classmethod
    def norm_fields(cls, given: Mapping[str, Any]) -> dict[str, Any]:
        """The fields for the norm of an expert's output. Raises `Inexpressible`."""
        require(not any(given[name] for name in NORM_ARGUMENTS), "a norm of the experts' outputs")
        return {}

    @classmethod
    def mma_fields(cls, mma_type: str | None) -> dict[str, Any]:
        """The field for the buffer's types; None where the copy's buffer does not say them. Raises `Inexpressible`."""
        require(mma_type in (None, cls.buffer_type), f"a buffer of {mma_type}")
        return {}

    def function(self, deep_gemm: ModuleType) -> Callable[..., Any]:
        """DeepGEMM's function. Raises LookupError also if it does not take what a field gives."""
        function = super().function(deep_gemm)
        for field, copies in _TAKEN_BY.items():
            if getattr(self, field, None) is not None and not self.takes(deep_gemm, function, field):
                raise LookupError(f"{self.op} with {field} (found in {copies})")
        return function

    def takes(self, deep_gemm: ModuleType, function: Callable[..., Any], field: str) -> bool:
        """Whether DeepGEMM's function takes what ``field`` gives."""
        return accepts(function, field)

    def shared_kind(self, device: Device) -> Kind:
        """Of the shared experts' activations and weights."""
        return self.kinds[0]

    def buffer(self, device: Device) -> Any:
        """DeepGEMM's own buffer."""
        return sm100_buffer(device, self, self.buffer_type, **self.buffer_options(device))

    def buffer_options(self, device: Device) -> dict[str, Any]:
        """Keyword arguments of the buffer."""
        return {"num_shared_experts": self.shared_experts} if self.shared_experts else {}

    def scalars(self) -> dict[str, Any]:
        """Keyword arguments of the call that the manifest sets."""
        fields = {name: getattr(self, name) for name in self.plain}
        return {"activation_clamp": self.activation_clamp} | {k: v for k, v in fields.items() if v is not None}

    def tensors(self, device: Device, inputs: Inputs | None) -> dict[str, Any]:
        """Keyword arguments of the call that are tensors, random or uninitialised, without the shared experts'."""
        return {}

    def by_token(self, device: Device) -> dict[str, Any]:
        """Keyword arguments of the call that have a row for each token."""
        return {}

    def activated(self, device: Device, gate_up: Any) -> Any:
        """The activation of gate and up side by side, float32."""
        gate, up = self.limited(device, gate_up)
        return device.torch.nn.functional.silu(gate) * up

    def limited(self, device: Device, gate_up: Any, gate_too: bool = True) -> tuple[Any, Any]:
        """Gate and up, rounded to BF16 and then limited; the limit is rounded to BF16 as well."""
        gate, up = gate_up.bfloat16().float().chunk(2, -1)
        if self.activation_clamp is None:
            return gate, up
        limit = float(device.torch.tensor(self.activation_clamp, dtype=device.torch.bfloat16))
        return gate.clamp(max=limit) if gate_too else gate, up.clamp(-limit, limit)

    def combined(self, device: Device, options: dict[str, Any]) -> Callable[[Any, Any], Any] | None:
        """`ReferenceLayer.combined`, for the keyword arguments of the call."""
        return None

    def token_scales(self, device: Device, inputs: Inputs, buffer: Any, tokens: int) -> Any:
        """What the first GEMM's sum of each token is multiplied by; written into ``buffer`` as well."""
        return 1.0

    def weights(self, device: Device, inputs: Inputs | None) -> tuple[Scaled | Plain, Scaled | Plain]:
        """This rank's experts' gate and up, and down."""
        kind, local, inner, hidden = self.kinds[1], self.local_experts, self.intermediate, self.hidden
        first = operand(device, inputs, kind, 2 * hidden**-0.25, local, 2 * inner, hidden)
        return first, operand(device, inputs, kind, 1.0, local, hidden, inner)

    def shared_weights(self, device: Device, inputs: Inputs | None) -> tuple[Scaled | Plain, Scaled | Plain]:
        """The shared experts', side by side as one expert."""
        assert self.shared_experts is not None
        kind, inner, hidden = self.shared_kind(device), self.shared_experts * self.intermediate, self.hidden
        first = operand(device, inputs, kind, 2 * hidden**-0.25, 2 * inner, hidden)
        return first, operand(device, inputs, kind, 1.0, hidden, inner)

    def prepare(self, device: Device) -> Callable[[int], None]:
        """The buffer, this rank's weights, and an output for the most tokens."""
        buffer = self.buffer(device)
        first, second = (weight.pair() for weight in self.weights(device, None))
        y = device.empty(self.largest_m, self.hidden, dtype="bfloat16")
        function, options, rows = self.function(device.deep_gemm), self.scalars(), self.by_token(device)
        options |= self.tensors(device, None)
        if self.shared_experts:
            shared = self.shared_weights(device, None)
            options |= {f"shared_l{number}_weights": weight.pair() for number, weight in enumerate(shared, 1)}

        def call(m: int) -> None:
            sliced = {name: row[:m] for name, row in rows.items()}
            function(y[:m], first, second, buffer, **options, **sliced)

        return call

    def shared_trial(
        self, device: Device, inputs: Inputs, buffer: Any, x: Scaled | Plain, tokens: int
    ) -> tuple[dict[str, Any], Any]:
        """The keyword arguments that hold the shared experts, and what these give for activations ``x``."""
        torch, kind = device.torch, self.shared_kind(device)
        first, second = self.shared_weights(device, inputs)
        l1, l2 = _transformed(device, kind, first.pair(), second.pair())
        options = {"shared_l1_weights": l1, "shared_l2_weights": l2}
        values = self.shared_inputs(device, buffer, x, tokens, options)
        activation = _kept(torch, kind, self.activated(device, product_nt(torch, values, first.values(torch))))
        return options, product_nt(torch, activation, second.values(torch)).bfloat16().float()

    def shared_inputs(
        self, device: Device, buffer: Any, x: Scaled | Plain, tokens: int, options: dict[str, Any]
    ) -> Any:
        """The shared experts' activations in float32: the others', whose scales are here in a layout of their own."""
        if isinstance(x, Scaled):
            buffer.shared_l1_acts_sf[shared_rows(device, self, buffer, tokens)] = x.pair()[1]
        return x.values(device.torch)

    def trial(self, device: Device, value: int, seed: int) -> Trial:
        """``value`` tokens, one rank.

        Raises:
            NotImplementedError: outputs are sent in FP8 (``DG_USE_FP8_COMBINE`` of sgl-deep-gemm).
        """
        if os.environ.get("DG_USE_FP8_COMBINE", "0") != "0":
            raise NotImplementedError("no reference for DG_USE_FP8_COMBINE")
        torch, inputs, kind = device.torch, Inputs(device, seed), self.kinds[0]
        buffer = self.buffer(device)
        # Gate and up have deviation 4: some exceed a clamp of 7 or 10, and all fit NVFP4's scales, which end at 448.
        x = operand(device, inputs, kind, 2 * self.hidden**-0.25, value, self.hidden)
        first, second = self.weights(device, inputs)
        expert_ids, routing_weights = self.routing(device, inputs, value)
        buffer.x.view(x.data.dtype)[:value] = x.data
        if isinstance(x, Scaled):
            buffer.x_sf[:value] = x.pair()[1]
        buffer.topk_idx[:value], buffer.topk_weights[:value] = expert_ids, routing_weights
        y, y_buffer = inputs.output(value, self.hidden, dtype="bfloat16")
        options, shared_output = self.scalars() | self.tensors(device, inputs), 0.0
        token_scales = self.token_scales(device, inputs, buffer, value)
        if self.shared_experts:
            shared, shared_output = self.shared_trial(device, inputs, buffer, x, value)
            options |= shared
        weights = _transformed(device, kind, first.pair(), second.pair())
        self.function(device.deep_gemm)(y, *weights, buffer, **options)
        act_scales = options.get("l2_act_scales")
        layer = ReferenceLayer(
            torch,
            gate_up=lambda expert: _times(first.values(torch, expert), options.get("l1_alphas"), expert),
            down=lambda expert: _times(second.values(torch, expert), options.get("l2_alphas"), expert),
            activated=lambda gate_up: self.activated(device, gate_up),
            kept=lambda activation: _kept(torch, kind, activation),
            combined=self.combined(device, options),
            activation_scale=None if act_scales is None else lambda expert: act_scales[expert],
        )
        expected = layer.output(x.values(torch) * token_scales, expert_ids, routing_weights) + shared_output
        tolerance = TOLERANCE if kind == "bf16" else LAYER_TOLERANCE
        return Trial((replace(dense_output(torch, "y", y_buffer, expected), tolerance=tolerance),))


def _times(weights: Any, alphas: Any, expert: int) -> Any:
    """An expert's weights times its scale, or gate's and up's times theirs."""
    if alphas is None:
        return weights
    alpha = alphas[expert]
    return weights * (alpha.repeat_interleave(len(weights) // 2)[:, None] if alpha.ndim else alpha)


def shared_rows(device: Device, op: MegaMoeOp, buffer: Any, tokens: int) -> Any:
    """Rows of the shared experts' scales: pages of 128 for each block of M, each as UTCCP reads it.

    vLLM 0.33.0 ``fused_moe/prepare_megamoe.py``, ``_shared_sf_row``; SGLang 0.5.23 ``layers/moe/mega_moe.py`` gives its
    pre-dispatch the same block of M.
    """
    deep_gemm, kind = device.deep_gemm, buffer.mma_type
    shape = op.ranks, op.experts, buffer.num_max_tokens_per_rank, tokens, op.topk
    if kind == "nvfp4":
        block = int(deep_gemm.get_block_m_for_nvfp4_mega_moe(*shape))
    else:
        block = int(deep_gemm.get_block_m_for_mega_moe(*shape, kind))
    token = device.torch.arange(tokens, device=device.name)
    row = token % block
    return token // block * round_up(block, 128) + row // 128 * 128 + row % 32 * 4 + row % 128 // 32


def _transformed(device: Device, kind: Kind, first: Any, second: Any) -> Any:
    """Weights as the kernels read them; sgl-deep-gemm has another order for those with FP4 activations."""
    transform = device.deep_gemm.transform_weights_for_mega_moe
    mma_type = {"fp4": "mxf4xmxf4", "nvfp4": "nvfp4xnvfp4"}.get(kind)
    options = {"mma_type": mma_type} if mma_type and accepts(transform, "mma_type") else {}
    return transform(first, second, **options)


def _kept(torch: ModuleType, kind: Kind, activation: Any) -> Any:
    """Activations between the GEMMs, in the format of those before the first."""
    if kind == "bf16":
        return activation.bfloat16().float()
    return requantised(torch, activation, QUANTISATIONS[kind])
