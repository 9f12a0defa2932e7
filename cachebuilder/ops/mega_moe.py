"""Mega-MoE: dispatch, both expert GEMMs and combine in one kernel. What its ops share, and SM90's op.

The kernel works on a buffer of all ranks, on a node the symmetric memory of a process group. DeepGEMM itself sees only
the buffer's address at each rank, the number of ranks and its own, so a plan needs no group: one allocation stands for
every rank's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from types import ModuleType, SimpleNamespace
from typing import Annotated, Any, Literal, cast

from pydantic import Field, model_validator

from cachebuilder.ops.base import TokenOp
from cachebuilder.ops.device import Device
from cachebuilder.ops.scaled import FP8_MAX, Quantisation, empty, random
from cachebuilder.ops.seen import SeenCall, Sighting, require, tensor
from cachebuilder.ops.trial import Inputs, Trial, dense_output, product_nt


class MegaMoeOp(TokenOp):
    """One rank of ``ranks``; called with every number of tokens from 1 to ``max_tokens``.

    ``max_tokens`` also sizes the buffer (``num_max_tokens_per_rank``), which is a template argument of the kernel: it
    must be the engine's.
    """

    found_in = "sgl-deep-gemm 0.1.4 to 0.2.3.post2 and vLLM 0.33.0's copy"

    ranks: Annotated[int, Field(ge=1, le=1024, description="expert parallel ranks")]
    experts: Annotated[int, Field(ge=1, le=65536, description="experts of all ranks")]
    topk: Annotated[int, Field(ge=1, le=64, description="experts a token is routed to")]
    hidden: Annotated[int, Field(ge=128, le=1 << 16, multiple_of=128, description="hidden size")]
    intermediate: Annotated[int, Field(ge=128, le=1 << 16, multiple_of=128, description="an expert's inner size")]
    activation_clamp: Annotated[float | None, Field(gt=0, description="limit of the activation; left out: none")] = None

    @model_validator(mode="after")
    def _check_experts(self) -> MegaMoeOp:
        if self.experts % self.ranks:
            raise ValueError(f"wanted experts in equal parts for {self.ranks} ranks, found {self.experts}")
        return self

    @classmethod
    def buffer_fields(cls, buffer: Any) -> dict[str, Any]:
        """The fields that the buffer of a call holds, ``max_tokens`` with them. Raises `Inexpressible`."""
        require(isinstance(buffer, Mapping) and "ranks" in buffer, f"the buffer {buffer}")
        sizes = buffer["fields"]
        return {
            "ranks": buffer["ranks"],
            "experts": sizes["num_experts"],
            "topk": sizes["num_topk"],
            "hidden": sizes["hidden"],
            "intermediate": sizes["intermediate_hidden"],
            "max_tokens": sizes["num_max_tokens_per_rank"],
        }

    @property
    def local_experts(self) -> int:
        """Experts of this rank."""
        return self.experts // self.ranks

    def routing(self, device: Device, inputs: Inputs, tokens: int) -> tuple[Any, Any]:
        """Each token's experts, random and distinct, int64 [tokens, topk], and their weights, float32, likewise."""
        scores = inputs.normal(tokens, self.experts, dtype="float32")
        best, expert_ids = scores.topk(self.topk, dim=-1)
        return expert_ids, device.torch.softmax(best, -1)


def sm90_buffer(device: Device, op: MegaMoeOp) -> Any:
    """The buffer of SM90's kernels."""
    make = device.deep_gemm.get_symm_buffer_for_sm90_mega_moe
    return _without_group(device, op, lambda group: make(group, *_shape(op)))


def sm100_buffer(device: Device, op: MegaMoeOp, mma_type: str = "fp8xfp4", **options: Any) -> Any:
    """The buffer of SM100's kernels.

    Args:
        mma_type: DeepGEMM's word for the types of activations and weights. vLLM 0.33.0's copy has a separate buffer
            for NVFP4 (``deep_gemm/mega/nvfp4.py``).
        options: keyword arguments of the buffer.
    """
    make_nvfp4 = nvfp4_buffer(device.deep_gemm)
    if mma_type == "nvfp4xnvfp4" and make_nvfp4:
        options.pop("activation", None)  # it has no such argument: its activations have one size
        return _without_group(device, op, lambda group: make_nvfp4(group, *_shape(op), **options))
    make = device.deep_gemm.get_symm_buffer_for_mega_moe
    return _without_group(device, op, lambda group: make(group, *_shape(op), mma_type=mma_type, **options))


def nvfp4_buffer(deep_gemm: ModuleType) -> Callable[..., Any] | None:
    """The class of NVFP4's own buffer, which vLLM 0.33.0's copy has (``deep_gemm/mega/nvfp4.py``); None elsewhere."""
    return cast("Callable[..., Any] | None", getattr(deep_gemm, "NVFP4SymmBuffer", None))


def _shape(op: MegaMoeOp) -> tuple[int, ...]:
    return op.experts, op.largest_m, op.topk, op.hidden, op.intermediate


def _without_group(device: Device, op: MegaMoeOp, make: Callable[[Any], Any]) -> Any:
    """DeepGEMM's own buffer, made with plain memory instead of symmetric memory and an object instead of a group.

    DeepGEMM asks the group for its size and this rank's number, and symmetric memory for its address at every rank
    (sgl-deep-gemm 0.2.3.post2, ``deep_gemm/mega/__init__.py``, ``SymmBuffer``).

    Raises:
        ValueError: several ranks on a real GPU: their kernels would wait for each other in one buffer.
    """
    if op.ranks > 1 and not device.virtual:
        raise ValueError(f"wanted one rank on one GPU, found {op.ranks}: the other ranks' buffers are on other GPUs")
    symmetric: Any = import_module("torch.distributed._symmetric_memory")
    before = symmetric.empty, symmetric.rendezvous
    symmetric.empty = device.torch.empty
    symmetric.rendezvous = lambda memory, group: SimpleNamespace(buffer_ptrs=[memory.data_ptr()] * op.ranks)
    try:
        return make(SimpleNamespace(size=lambda: op.ranks, rank=lambda: 0, barrier=lambda: None))
    finally:
        symmetric.empty, symmetric.rendezvous = before


#: The largest relative error of a whole layer. Its kernel quantises the activations between the two GEMMs to FP8. Where
#: its sum differs from the reference's in the last bits, some activations round to the neighbouring value, 6 to 12 %
#: away: a difference of 3e-4 moves one in three hundred and costs 5e-3. On SM90, FP8 products are added in registers
#: that keep 14 bits. Up to 255 tokens they go to float32 after each 128 of K; from 256 on they stay there for all of K
#: (``kReuseAccumAsFinal`` of ``sm90_fp8_mega_moe.cuh``). At a hidden size of 7168 a CPU that truncates in the same way
#: is off by 1.2e-4 before the quantisation and 3e-3 after the layer, then by 2.3e-3 and 1.3e-2 (4e-3 and 1.4e-2 on an
#: H200); from a hidden size of 16384 on it would exceed this bound.
LAYER_TOLERANCE = 2e-2


@dataclass(frozen=True)
class ReferenceLayer:
    """A MoE layer in float32.

    From ``sm90_fp8_mega_moe.cuh`` of sgl-deep-gemm 0.1.5: a routing weight is applied to the activation before that is
    quantised, and each expert's output is rounded to BF16 before the sum.

    Attributes:
        gate_up: of one expert, [2 · intermediate, hidden], float32; gate comes first.
        down: of one expert, [hidden, intermediate].
        activated: the activation [rows, intermediate] of gate and up side by side.
        kept: activations [rows, intermediate] as the kernel keeps them between the GEMMs.
        combined: what outputs [rows, hidden] with their routing weights [rows, 1] add to the sum; None if the weights
            are applied to the activation.
        activation_scale: of one expert, what its activation is multiplied by before it is kept; None for no scale.
    """

    torch: ModuleType
    gate_up: Callable[[int], Any]
    down: Callable[[int], Any]
    activated: Callable[[Any], Any]
    kept: Callable[[Any], Any]
    combined: Callable[[Any, Any], Any] | None = None
    activation_scale: Callable[[int], Any] | None = None

    def output(self, x: Any, expert_ids: Any, routing_weights: Any) -> Any:
        """For each token the sum of its experts, [tokens, hidden].

        Args:
            x: [tokens, hidden], float32.
            expert_ids, routing_weights: [tokens, topk].
        """
        y = self.torch.zeros_like(x)
        for expert in expert_ids.unique().tolist():
            rows, slots = (expert_ids == expert).nonzero(as_tuple=True)
            weights = routing_weights[rows, slots, None]
            activation = self.activated(product_nt(self.torch, x[rows], self.gate_up(expert)))
            if self.activation_scale:
                activation = activation * self.activation_scale(expert)
            activation = self.kept(activation if self.combined else activation * weights)
            output = product_nt(self.torch, activation, self.down(expert)).bfloat16().float()
            y[rows] += self.combined(output, weights) if self.combined else output
        return y


class Fp8MegaMoe(MegaMoeOp):
    """A whole MoE layer in one kernel, FP8, on SM90.

    Expert weights have 128 × 128 scales, as SGLang 0.5.23 ``layers/moe/mega_moe_sm90.py`` calls it.
    """

    majors = (9,)
    found_in = "sgl-deep-gemm 0.1.4 to 0.2.3.post2"

    op: Literal["fp8_mega_moe"]

    @classmethod
    def sighting(cls, call: SeenCall) -> Sighting:
        """All sizes from the buffer, the tokens from y."""
        names = ("y", "l1_weights", "l2_weights", "sym_buffer", "cumulative_local_expert_recv_stats", "recipe")
        given = call.by_name(*names, "activation", "activation_clamp", "fast_math")
        require(given["activation"] in (None, "swiglu"), f"the activation {given['activation']}")
        require(given["fast_math"] in (None, True), "fast_math off")
        fields = cls.buffer_fields(given["sym_buffer"])
        if given["activation_clamp"] is not None:
            fields["activation_clamp"] = given["activation_clamp"]
        return Sighting(fields, tensor(given["y"], 2, "bfloat16").shape[0])

    @property
    def weight_shapes(self) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
        """Gate and up of this rank's experts, and down."""
        local, inner, hidden = self.local_experts, self.intermediate, self.hidden
        return (local, 2 * inner, hidden), (local, hidden, inner)

    def prepare(self, device: Device) -> Callable[[int], None]:
        """The buffer, this rank's weights, and an output for the most tokens."""
        buffer = sm90_buffer(device, self)
        first, second = (empty(device, shape, Quantisation(128, 128)).pair() for shape in self.weight_shapes)
        y = device.empty(self.largest_m, self.hidden, dtype="bfloat16")
        function = self.function(device.deep_gemm)

        def call(m: int) -> None:
            function(y[:m], first, second, buffer, activation_clamp=self.activation_clamp)

        return call

    def trial(self, device: Device, value: int, seed: int) -> Trial:
        """``value`` tokens, one rank; activations between the GEMMs in FP8 with a float32 scale for each 1 × 64."""
        torch, inputs = device.torch, Inputs(device, seed)
        buffer = sm90_buffer(device, self)
        x = random(device, inputs, (value, self.hidden), Quantisation(1, 128))
        first, second = (random(device, inputs, shape, Quantisation(128, 128)) for shape in self.weight_shapes)
        expert_ids, routing_weights = self.routing(device, inputs, value)
        buffer.x.view(torch.float8_e4m3fn)[:value], buffer.x_sf[:value] = x.pair()
        buffer.topk_idx[:value], buffer.topk_weights[:value] = expert_ids, routing_weights
        y, y_buffer = inputs.output(value, self.hidden, dtype="bfloat16")
        weights = device.deep_gemm.transform_weights_for_mega_moe_sm90(first.pair(), second.pair())
        self.function(device.deep_gemm)(y, *weights, buffer, activation_clamp=self.activation_clamp)

        def activated(gate_up: Any) -> Any:
            """``silu(gate) · up``; gate is limited from above, up on both sides."""
            gate, up = gate_up.chunk(2, -1)
            if (limit := self.activation_clamp) is not None:
                gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
            return torch.nn.functional.silu(gate) * up

        def kept(activation: Any) -> Any:
            """Rows in FP8 and back."""
            groups = activation.unflatten(-1, (-1, 64))
            scales = groups.abs().amax(-1, keepdim=True).clamp(min=1e-10) / FP8_MAX
            return ((groups / scales).to(torch.float8_e4m3fn).float() * scales).flatten(-2)

        layer = ReferenceLayer(
            torch,
            gate_up=lambda expert: first.values(torch, expert),
            down=lambda expert: second.values(torch, expert),
            activated=activated,
            kept=kept,
        )
        expected = layer.output(x.values(torch), expert_ids, routing_weights)
        return Trial((replace(dense_output(torch, "y", y_buffer, expected), tolerance=LAYER_TOLERANCE),))
