"""SM100's mega-MoE played by plain torch on the CPU: one token and one expert at a time, for played.py."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import torch

MOE = {"ranks": 1, "experts": 8, "topk": 2, "hidden": 256, "intermediate": 128, "max_tokens": 64}
#: The block of M of the kernels that are played.
BLOCK_M = 32


def fp4(data: Any) -> Any:
    """Values of FP4, two to a byte, the even one in the low half."""
    table = torch.tensor([0.0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])
    codes = data.contiguous().view(torch.uint8).long()
    return torch.stack((table[codes % 16], table[codes // 16]), -1).flatten(-2)


def blocks(data: Any, scales: Any) -> Any:
    """Values […, K] with packed scales: E4M3 for 16 columns, exponents for more."""
    elements = fp4(data) if data.dtype in (torch.int8, torch.uint8) else data.float()
    columns = elements.shape[-1] // (4 * scales.shape[-1])
    codes = scales.clone(memory_format=torch.contiguous_format).view(torch.uint8)
    factors = codes.view(torch.float8_e4m3fn).float() if columns == 16 else (codes.int() - 127).float().exp2()
    return elements * factors.repeat_interleave(columns, -1)


E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def nearest(value: float) -> float:
    """The E2M1 nearest to ``value``; of two as near, the one with the even code."""
    code = min(range(8), key=lambda code: (abs(E2M1[code] - abs(value)), code % 2))
    return math.copysign(E2M1[code], value)


def between(row: Any, kind: str) -> Any:
    """One token's activations between the GEMMs, as SM100's kernels keep them, group by group."""
    if kind == "bf16":
        return row.bfloat16().float()
    groups = []
    for group in row.split(16 if kind == "nvfp4" else 32):
        most = group.abs().max().item()
        if kind == "nvfp4":
            scale = torch.tensor(most / 6).to(torch.float8_e4m3fn).float().item()
        else:
            scale = 2.0 ** math.ceil(math.log2(most / (448 if kind == "fp8" else 6)))
        if kind == "fp8":
            groups.append((group / scale).to(torch.float8_e4m3fn).float() * scale)
        else:
            groups.append(torch.tensor([nearest(value) * scale for value in (group / scale).tolist()]))
    return torch.cat(groups)


def gated(gate_up: Any, limit: float, name: str = "swiglu", alpha: float = 1.0, beta: float = 0.0) -> Any:
    """One token's gate and up as SM100's kernels join them."""
    gate, up = gate_up.bfloat16().float().chunk(2)
    if name == "situ":
        up = up if beta == 0 else beta * (2 / (1 + (-2 / beta * up).exp()) - 1)
        return alpha * (2 / (1 + (-2 / alpha * gate).exp()) - 1) / (1 + (-gate).exp()) * up
    up = up.clamp(-limit, limit)
    gate = gate if name == "swiglustep" else gate.clamp(max=limit)
    gate = gate / (1 + (-alpha * gate).exp())
    return (gate.clamp(max=limit) if name == "swiglustep" else gate) * (up + beta)


def sm100_layer(kind: str, weigh: str = "activation") -> Any:
    """A layer as vLLM's copy is called, NVFP4 with a buffer of its own; ``weigh`` says what a routing weight applies to."""

    def play(
        y: Any, first: Any, second: Any, buffer: Any, activation_clamp: float | None = None,
        activation: str = "swiglu", activation_alpha: float = 1.0, activation_beta: float = 0.0,
        shared_l1_weights: Any = None, shared_l2_weights: Any = None, x_bf16: Any = None,
        post_expert_norm_gamma: Any = None, post_expert_norm_eps: float = 0.0, fast_math: bool = True,
        use_x_scales: bool = False, norm: Any = None, alphas: Any = (None, None, None),
    ) -> None:  # fmt: skip
        limit = activation_clamp or math.inf
        bf16 = kind == "bf16"
        xs = buffer.x.float() if bf16 else blocks(buffer.x, buffer.x_sf)
        if use_x_scales:
            xs = buffer.x_scales[:, None] * xs
        first, second = (w.float() if bf16 else blocks(*w) for w in (first, second))
        if post_expert_norm_gamma is not None:
            norm = lambda out: (out * post_expert_norm_gamma, out * post_expert_norm_gamma)  # noqa: E731
        for token in range(len(y)):
            total = torch.zeros(y.shape[1])
            for expert, weight in zip(
                buffer.topk_idx[token].tolist(), buffer.topk_weights[token].tolist(), strict=True
            ):
                gate_up = first[expert] @ xs[token]
                if alphas[0] is not None:
                    gate_up = torch.cat(
                        [half * alpha for half, alpha in zip(gate_up.chunk(2), alphas[0][expert], strict=True)]
                    )
                row = gated(gate_up, limit, activation, activation_alpha, activation_beta)
                row = row * (weight if weigh == "activation" and not norm else 1)
                row = row if alphas[2] is None else row * alphas[2][expert]
                out = second[expert] @ between(row, kind)
                out = (out if alphas[1] is None else out * alphas[1][expert]).bfloat16().float()
                if norm:
                    inside, out = norm(out)
                    total += out * weight / ((inside * inside).mean() + post_expert_norm_eps).sqrt()
                elif weigh == "rounded":
                    total += (out * weight).bfloat16()
                else:
                    total += out * (weight if weigh == "sum" else 1)
            if shared_l1_weights is not None:
                total += shared(buffer, x_bf16, token, shared_l1_weights, shared_l2_weights, lambda gate_up: gated(
                    gate_up, limit, activation, activation_alpha, activation_beta
                ))  # fmt: skip
            y[token] = total

    play.own_buffer = kind == "nvfp4" and weigh == "sum"  # type: ignore[attr-defined]
    return play


def sglang_layer(kind: str) -> Any:
    """The same, as sgl-deep-gemm is called."""
    play = sm100_layer(kind)

    def called(
        y: Any, first: Any, second: Any, buffer: Any, activation_clamp: float | None = None, activation: str = "swiglu",
        shared_l1_weights: Any = None, shared_l2_weights: Any = None, fast_math: bool = True,
        use_x_scales: bool = False, l1_alphas: Any = None, l2_alphas: Any = None, l2_act_scales: Any = None,
        weight_layout: str = "megamoe", post_expert_norm: bool = False, post_expert_norm_weight: Any = None,
        post_expert_norm_eps: float = 1e-6, post_expert_norm_weight_first: bool = False,
    ) -> None:  # fmt: skip
        alpha, beta = {"swigluoai": (1.702, 1.0), "situ": (4.0, 25.0)}.get(activation, (1.0, 0.0))
        gain = 1.0 if post_expert_norm_weight is None else post_expert_norm_weight

        def norm(out: Any) -> Any:
            return (out * gain if post_expert_norm_weight_first else out), out * gain

        play(
            y, first, second, buffer, activation_clamp, activation, alpha, beta, shared_l1_weights, shared_l2_weights,
            use_x_scales=use_x_scales, norm=norm if post_expert_norm else None,
            post_expert_norm_eps=post_expert_norm_eps, alphas=(l1_alphas, l2_alphas, l2_act_scales),
        )  # fmt: skip

    return called


def shared(buffer: Any, x_bf16: Any, token: int, first: Any, second: Any, activate: Any) -> Any:
    """What the shared experts give for one token."""
    if isinstance(first, tuple):
        x = buffer.x if buffer.shared_l1_acts is None else buffer.shared_l1_acts
        page = [lane + 32 * quarter for lane in range(32) for quarter in range(4)]
        sf = buffer.shared_l1_acts_sf[token // BLOCK_M * 128 + page.index(token % BLOCK_M)]
        x, kind = blocks(x[token : token + 1], sf[None])[0], "fp8"
        first, second = blocks(*first), blocks(*second)
    else:
        own = x_bf16 if x_bf16 is not None else buffer.shared_l1_acts
        x, kind = (buffer.x if own is None else own)[token].float(), "bf16"
    return (second.float() @ between(activate(first.float() @ x), kind)).bfloat16()


def sm100_buffer(
    group: Any, experts: int, tokens: int, topk: int, hidden: int, inner: int,
    num_shared_experts: int = 0, mma_type: str = "fp8xfp4", activation: str = "swiglu", own: Any = None,
) -> Any:  # fmt: skip
    kind = mma_type.split("x")[0]
    tokens = -(-tokens // 128) * 128
    width, dtype = {"bf16": (hidden, torch.bfloat16), "fp8": (hidden, torch.int8)}.get(kind, (hidden // 2, torch.int8))
    return SimpleNamespace(
        x=torch.zeros(tokens, width, dtype=dtype).view(torch.float8_e4m3fn if kind == "fp8" else dtype),
        x_sf=torch.zeros(tokens, hidden // (64 if mma_type in ("fp4xfp4", "nvfp4xnvfp4") else 128), dtype=torch.int32),
        x_scales=torch.zeros(tokens),
        topk_idx=torch.zeros(tokens, topk, dtype=torch.int64),
        topk_weights=torch.zeros(tokens, topk),
        shared_l1_acts=None if own is None else torch.zeros(tokens, hidden, dtype=own),
        shared_l1_acts_sf=torch.zeros(tokens * 128 // BLOCK_M, hidden // 128, dtype=torch.int32),
        num_max_tokens_per_rank=tokens,
        mma_type=mma_type if own is None else "nvfp4",
    )


def nvfp4_buffer(*shape: Any, num_shared_experts: int = 0, shared_dtype: Any = torch.float8_e4m3fn) -> Any:
    return sm100_buffer(*shape, num_shared_experts, "nvfp4xnvfp4", own=shared_dtype)


def sm100_pre_dispatch(
    x: Any, chosen: Any, weights: Any, into: Any, sf: Any, ids: Any, ws: Any, tokens: int,
    mma_type: str = "fp8xfp4", group_size: int = 32, buf_x_scales: Any = None,
) -> None:  # fmt: skip
    ids.fill_(-1), ws.fill_(0)
    ids[:tokens], ws[:tokens] = chosen, weights
    largest = 448 if mma_type == "fp8xfp4" else 6
    for token in range(tokens):
        row = x[token].float()
        outer = row.abs().max() / 2688 if buf_x_scales is not None else torch.tensor(1.0)
        if buf_x_scales is not None:
            buf_x_scales[token] = outer
        codes, scales = [], []
        for group in row.split(group_size):
            most = group.abs().max()
            if buf_x_scales is not None:
                byte = (most / (6 * outer)).to(torch.float8_e4m3fn)
                scales.append(int(byte.view(torch.uint8)))
                inverse = 1 / (byte.float() * outer)
            else:
                exponent = math.ceil(math.log2(most.item() / largest))
                scales.append(exponent + 127)
                inverse = torch.tensor(2.0**-exponent)
            if largest == 448:
                codes += (group * inverse).to(torch.float8_e4m3fn).view(torch.uint8).tolist()
            else:
                signs = [E2M1.index(abs(nearest(v))) + (8 if v < 0 else 0) for v in (group * inverse).tolist()]
                codes += [low + 16 * high for low, high in zip(signs[::2], signs[1::2], strict=True)]
        into.view(torch.uint8)[token] = torch.tensor(codes, dtype=torch.uint8)
        sf.view(torch.uint8)[token] = torch.tensor(scales, dtype=torch.uint8)
