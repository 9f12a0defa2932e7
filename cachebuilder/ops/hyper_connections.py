"""Hyper-connections: their mixing weights (DeepSeek-V4), and everything between two layers (DeepSeek-V4.1)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import Field

from cachebuilder.ops.base import TokenOp
from cachebuilder.ops.device import Device, ceil_div
from cachebuilder.ops.seen import SeenCall, Sighting, require, tensor
from cachebuilder.ops.trial import Inputs, Trial, dense_output, product_nt


class Tf32HcPrenormGemm(TokenOp):
    """Mixing weights, A · Bᵀ, and the square sums of A's rows; A BF16 [M, k], B float32 [n, k].

    K is split among SMs, and each number of splits is a kernel. Left out, the splits are the engines' own:
    SM count / ⌈M / 64⌉, at most ⌈k / 64⌉ / 4, at least 1, with the physical SM count (vLLM 0.33.0
    ``kernels/mhc/tilelang_kernels.py``, ``compute_num_split``; SGLang 0.5.23 ``kernels/ops/layernorm/mhc.py``,
    ``_compute_num_split_for_mhc_pre``).
    """

    op: Literal["tf32_hc_prenorm_gemm"]
    n: Annotated[int, Field(ge=8, le=64, multiple_of=8, description="mixing weights: 24 with 4 connections")]
    k: Annotated[int, Field(ge=64, le=1 << 20, multiple_of=64, description="connections · hidden size")]
    num_splits: Annotated[int | None, Field(ge=1, le=512, description="left out: the engines' formula")] = None

    def splits(self, device: Device, m: int) -> int:
        """Splits of K for M rows."""
        if self.num_splits is not None:
            return self.num_splits
        sms = device.torch.cuda.get_device_properties(0).multi_processor_count if device.name == "cuda" else 132
        return _engines_splits(sms, m, self.k)

    @classmethod
    def sighting(cls, call: SeenCall) -> Sighting:
        """Sizes from A and B; the splits where they are not the engines' own."""
        given = call.by_name("a", "b", "d", "sqr_sum", "num_splits")
        m, k = tensor(given["a"], 2, "bfloat16").shape
        splits = given["num_splits"]
        require(splits is not None, "no splits")
        fields = {"n": tensor(given["b"], 2, "float32").shape[0], "k": k}
        return Sighting(fields | ({} if splits == _engines_splits(call.sm_count, m, k) else {"num_splits": splits}), m)

    def prepare(self, device: Device) -> Callable[[int], None]:
        """Buffers for the largest M, sliced at each call."""
        a = device.empty(self.largest_m, self.k, dtype="bfloat16")
        b = device.empty(self.n, self.k, dtype="float32")
        splits = {m: self.splits(device, m) for m in range(1, self.largest_m + 1)}
        rows = max(m * count for m, count in splits.items())
        d, squares = device.empty(rows, self.n, dtype="float32"), device.empty(rows, dtype="float32")
        function = self.function(device.deep_gemm)

        def call(m: int) -> None:
            count = splits[m]
            function(a[:m], b, d[: count * m].view(count, m, self.n), squares[: count * m].view(count, m), count)

        return call

    def trial(self, device: Device, value: int, seed: int) -> Trial:
        """M = ``value``; the sums over all splits, against float32."""
        torch, inputs = device.torch, Inputs(device, seed)
        count = self.splits(device, value)
        a, b = inputs.normal(value, self.k), inputs.normal(self.n, self.k, dtype="float32")
        d, d_buffer = inputs.output(count, value, self.n, dtype="float32")
        squares, squares_buffer = inputs.output(count * value, 1, dtype="float32")
        self.function(device.deep_gemm)(a, b, d, squares.view(count, value), count)

        def output(name: str, parts: Any, buffer: Any, expected: Any) -> Any:
            guard = buffer[count * value :]
            return dense_output(torch, name, torch.cat((parts.sum(0), guard)), expected)

        square_sums = a.float().square().sum(1, keepdim=True)
        return Trial(
            (
                output("d", d, d_buffer, product_nt(torch, a, b)),
                output("sqr_sum", squares.view(count, value, 1), squares_buffer, square_sums),
            )
        )


def _engines_splits(sm_count: int, m: int, k: int) -> int:
    """The number of splits that vLLM and SGLang choose (`Tf32HcPrenormGemm`)."""
    return max(1, min(sm_count // ceil_div(m, 64), ceil_div(k, 64) // 4))


_CONNECTIONS, _ITERATIONS, _EPSILON = 4, 20, 1e-6
#: Mixing weights of one token: for the next layer's input, for its output, and between connections.
_MIXES = _CONNECTIONS * (2 + _CONNECTIONS)


class MegaMhc(TokenOp):
    """Everything between two layers in one kernel; called with every M, as vLLM 0.33.0 ``mega_mhc.py`` calls it.

    x is [M, hidden], the residual [M, 4, hidden].
    """

    majors = (10,)
    found_in = "sgl-deep-gemm 0.2.3.post2 and vLLM 0.33.0's copy"

    op: Literal["mega_mhc"]
    hidden: Annotated[int, Field(ge=1024, le=1 << 16, multiple_of=1024, description="hidden size")]

    @classmethod
    def sighting(cls, call: SeenCall) -> Sighting:
        """M and the hidden size from x; the output is BF16 only, as vLLM 0.33.0's."""
        require(len(call.arguments) == 21 and call.options.keys() == {"y_bf16"}, "other arguments than vLLM's")
        m, hidden = tensor(call.arguments[0], 2, "bfloat16").shape
        connections, iterations = call.arguments[8], call.arguments[13]
        require((connections, iterations) == (_CONNECTIONS, _ITERATIONS), f"{connections} connections, {iterations}")
        return Sighting({"hidden": hidden}, m)

    def prepare(self, device: Device) -> Callable[[int], None]:
        """Buffers for the largest M, row-sliced at each call."""
        connections, hidden = _CONNECTIONS, self.hidden

        def rows(*shape: int, dtype: str = "float32") -> Any:
            return device.empty(self.largest_m, *shape, dtype=dtype)

        x, residual = rows(hidden, dtype="bfloat16"), rows(connections, hidden, dtype="bfloat16")
        previous, post, mix = rows(connections, 1), rows(connections, 1), rows(connections, connections)
        new_residual, y = rows(connections, hidden, dtype="bfloat16"), rows(hidden, dtype="bfloat16")
        new_previous, new_post, new_mix = rows(connections, 1), rows(connections, 1), rows(connections, connections)
        weight = device.empty(_MIXES, connections * hidden, dtype="float32")
        scales, bases = device.empty(3, dtype="float32"), device.empty(_MIXES, dtype="float32")
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

        From ``impls/sm100_mega_mhc.cuh`` and ``epilogue/sm100_mega_mhc.cuh`` of sgl-deep-gemm 0.2.3.post2: a new
        connection o is x · post[o] + Σ residual[i] · mix[i, o] in BF16, and y is the RMS norm of these connections,
        mixed by the previous layer's weights. The next layer's 24 mixing weights are products of all connections with a
        weight, over the connections' RMS, scaled and shifted. The first four and the next four go through a sigmoid;
        `_balanced` makes the matrix of the other sixteen doubly stochastic.
        """
        torch, inputs, connections, hidden = device.torch, Inputs(device, seed), _CONNECTIONS, self.hidden
        x, residual = inputs.normal(value, hidden), inputs.normal(value, connections, hidden)
        previous, post = (inputs.normal(value, connections, 1, dtype="float32").sigmoid() for _ in range(2))
        mix = inputs.normal(value, connections, connections, dtype="float32").softmax(-1)
        # TF32 has more bits than BF16, so these weights are exact in it.
        weight = inputs.normal(_MIXES, connections * hidden, dtype="float32") * (connections * hidden) ** -0.5
        weight = weight.bfloat16()
        scales, bases = 1 + inputs.normal(3, dtype="float32") / 4, inputs.normal(_MIXES, dtype="float32") / 4
        norm = inputs.normal(hidden)
        widths = {"new_residual": connections * hidden, "y": hidden, "new_prev_mix": connections,
                  "new_post_mix": connections, "new_comb_res_mix": connections**2}  # fmt: skip
        outputs = {
            name: inputs.output(value, width, dtype="bfloat16" if width >= hidden else "float32")
            for name, width in widths.items()
        }
        self.function(device.deep_gemm)(
            x, residual, previous, post, mix, weight.float(), scales, bases,
            connections, _EPSILON, _EPSILON, 2.0, _EPSILON, _ITERATIONS, norm, _EPSILON, 1.0,
            outputs["new_residual"][0].view(value, connections, hidden), outputs["new_prev_mix"][0][..., None],
            outputs["new_post_mix"][0][..., None],
            outputs["new_comb_res_mix"][0].view(value, connections, connections),
            y_bf16=outputs["y"][0],
        )  # fmt: skip
        new = x.float()[:, None] * post
        for source in range(connections):
            new += residual[:, source, None].float() * mix[:, source, :, None]
        new = new.bfloat16().float()
        mixed = (new * previous).sum(1).bfloat16().float()
        y = mixed * (mixed.square().mean(-1, keepdim=True) + _EPSILON).rsqrt() * norm.float()
        flat = new.flatten(1)
        products = product_nt(torch, flat, weight) * (flat.square().mean(-1, keepdim=True) + _EPSILON).rsqrt()
        products = products * scales.repeat_interleave(torch.tensor([4, 4, 16], device=device.name)) + bases
        to_input, from_output, between = products.split([connections, connections, connections**2], -1)
        expected = {
            "new_residual": flat, "y": y,
            "new_prev_mix": to_input.sigmoid() + _EPSILON, "new_post_mix": from_output.sigmoid() * 2.0,
            "new_comb_res_mix": _balanced(between.unflatten(-1, (connections, connections))).flatten(1),
        }  # fmt: skip
        return Trial(tuple(dense_output(torch, name, buffer, expected[name]) for name, (_, buffer) in outputs.items()))


def _balanced(logits: Any) -> Any:
    """Matrices […, 4, 4] whose rows and columns sum to about one: a softmax of rows, then rows and columns in turn."""
    matrices = logits.softmax(-1) + _EPSILON
    matrices = matrices / (matrices.sum(-2, keepdim=True) + _EPSILON)
    for _ in range(1, _ITERATIONS):
        matrices = matrices / (matrices.sum(-1, keepdim=True) + _EPSILON)
        matrices = matrices / (matrices.sum(-2, keepdim=True) + _EPSILON)
    return matrices
