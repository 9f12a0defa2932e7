"""``mega_mhc``: hyper-connections between two layers in one kernel (DeepSeek-V4.1)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import Field

from cachebuilder.ops.base import TokenOp
from cachebuilder.ops.device import Device
from cachebuilder.ops.trial import Inputs, Trial, dense_output, product_nt

_CONNECTIONS, _ITERATIONS, _EPSILON = 4, 20, 1e-6


class MegaMhc(TokenOp):
    """x [M, hidden], residual [M, 4, hidden]; called with every M, as vLLM 0.33.0 ``mega_mhc.py`` calls it."""

    majors = (10,)
    found_in = "sgl-deep-gemm 0.2.3.post2 and vLLM 0.33.0's copy"

    op: Literal["mega_mhc"]
    hidden: Annotated[int, Field(ge=1024, le=1 << 16, multiple_of=1024, description="hidden size")]

    def prepare(self, device: Device) -> Callable[[int], None]:
        """Buffers for the largest M, row-sliced at each call."""
        connections, hidden = _CONNECTIONS, self.hidden
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
                connections, _EPSILON, _EPSILON, 1.0, _EPSILON, _ITERATIONS, norm, _EPSILON, 1.0,
                new_residual[:m], new_previous[:m], new_post[:m], new_mix[:m], y_bf16=y[:m],
            )  # fmt: skip

        return call

    def trial(self, device: Device, value: int, seed: int) -> Trial:
        """M = ``value``; a shifted mix, the only kind that vLLM 0.33.0 calls.

        As ``impls/sm100_mega_mhc.cuh`` and ``epilogue/sm100_mega_mhc.cuh`` of sgl-deep-gemm 0.2.3.post2 have it: a new
        connection o is x · post[o] + Σ residual[i] · mix[i, o] in BF16, and y the RMS norm of these connections, mixed
        by the previous layer's weights. What the next layer mixes by are 24 products of all connections with weights,
        over the connections' RMS, scaled and shifted: the sigmoids of the first four and of the next four, and the rest
        as a matrix that `_balanced` makes doubly stochastic.
        """
        torch, inputs, connections, hidden = device.torch, Inputs(device, seed), _CONNECTIONS, self.hidden
        mixes = connections * (2 + connections)
        x, residual = inputs.normal(value, hidden), inputs.normal(value, connections, hidden)
        previous, post = (inputs.normal(value, connections, 1, dtype="float32").sigmoid() for _ in range(2))
        mix = inputs.normal(value, connections, connections, dtype="float32").softmax(-1)
        # TF32 has more bits than BF16: nothing of these weights is lost.
        weight = (
            inputs.normal(mixes, connections * hidden, dtype="float32") * (connections * hidden) ** -0.5
        ).bfloat16()
        scales, bases = 1 + inputs.normal(3, dtype="float32") / 4, inputs.normal(mixes, dtype="float32") / 4
        norm = inputs.normal(hidden)
        shapes = {"new_residual": connections * hidden, "y": hidden, "new_prev_mix": connections,
                  "new_post_mix": connections, "new_comb_res_mix": connections**2}  # fmt: skip
        into = {
            name: inputs.output(value, width, dtype="bfloat16" if width >= hidden else "float32")
            for name, width in shapes.items()
        }
        self.function(device.deep_gemm)(
            x, residual, previous, post, mix, weight.float(), scales, bases,
            connections, _EPSILON, _EPSILON, 2.0, _EPSILON, _ITERATIONS, norm, _EPSILON, 1.0,
            into["new_residual"][0].view(value, connections, hidden), into["new_prev_mix"][0][..., None],
            into["new_post_mix"][0][..., None], into["new_comb_res_mix"][0].view(value, connections, connections),
            y_bf16=into["y"][0],
        )  # fmt: skip
        new = x.float()[:, None] * post
        for one in range(connections):
            new += residual[:, one, None].float() * mix[:, one, :, None]
        new = new.bfloat16().float()
        mixed = (new * previous).sum(1).bfloat16().float()
        y = mixed * (mixed.square().mean(-1, keepdim=True) + _EPSILON).rsqrt() * norm.float()
        flat = new.flatten(1)
        products = product_nt(torch, flat, weight) * (flat.square().mean(-1, keepdim=True) + _EPSILON).rsqrt()
        products = products * scales.repeat_interleave(torch.tensor([4, 4, 16], device=device.name)) + bases
        prev, after, rest = products.split([connections, connections, connections**2], -1)
        wanted = {
            "new_residual": flat, "y": y,
            "new_prev_mix": prev.sigmoid() + _EPSILON, "new_post_mix": after.sigmoid() * 2.0,
            "new_comb_res_mix": _balanced(rest.unflatten(-1, (connections, connections))).flatten(1),
        }  # fmt: skip
        return Trial(tuple(dense_output(torch, name, buffer, wanted[name]) for name, (_, buffer) in into.items()))


def _balanced(logits: Any) -> Any:
    """Matrices […, 4, 4] whose rows and columns sum to about one: softmax of rows, then rows and columns by turns."""
    found = logits.softmax(-1) + _EPSILON
    found = found / (found.sum(-2, keepdim=True) + _EPSILON)
    for _ in range(1, _ITERATIONS):
        found = found / (found.sum(-1, keepdim=True) + _EPSILON)
        found = found / (found.sum(-2, keepdim=True) + _EPSILON)
    return found
