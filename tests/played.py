"""DeepGEMM's part played by plain torch on the CPU: the arithmetic of every op written a second time, for test_trial.py.

`PLAYED` has each op with the function that plays it; `device` is a device whose DeepGEMM is that function.
"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import torch

from cachebuilder.ops.device import Device


def spread(data: Any, scales: Any) -> Any:
    """Dequantised another way than `Scaled.values`: element by element."""
    m, k = data.shape[-2:]
    rows = torch.arange(m) // (1 if scales.shape[-2] == m else 128)
    return data.float() * scales[..., rows, :][..., torch.arange(k) // 128]


def dense(a: Any, b: Any, d: Any, **_: Any) -> None:
    a, b = (spread(*x) if isinstance(x, tuple) else x.float() for x in (a, b))
    d.copy_(a @ b.mT)


def contiguous(a: Any, b: Any, d: Any, expert_of_row: Any, **_: Any) -> None:
    a, b = (spread(*x) if isinstance(x, tuple) else x.float() for x in (a, b))
    d.fill_(7)  # what a kernel does with padding rows is its own business
    for row, expert in enumerate(expert_of_row.tolist()):
        if expert >= 0:
            d[row] = b[expert] @ a[row]


def masked(a: Any, b: Any, d: Any, counts: Any, expected_m: int, **_: Any) -> None:
    a, b = (spread(*x) if isinstance(x, tuple) else x.float() for x in (a, b))
    for expert, count in enumerate(counts.tolist()):
        tile = min(-(-count // 256) * 256, d.shape[1])
        d[expert, :tile] = (a[expert] @ b[expert].mT)[:tile]


def values(operand: Any) -> Any:
    return spread(*operand) if isinstance(operand, tuple) else operand.float()


def batched(expr: str, a: Any, b: Any, d: Any, **_: Any) -> None:
    if isinstance(a, tuple):
        a = a[0], a[1].permute(1, 0, 2)  # one matrix for each group
        d.copy_(torch.einsum("hbr,hdr->bhd", values((a[0].permute(1, 0, 2), a[1])), values(b)))
    else:
        d.copy_(torch.einsum(expr, a.float(), b.float()))


def prenorm(a: Any, b: Any, d: Any, squares: Any, splits: int) -> None:
    for index, columns in enumerate(torch.arange(a.shape[1]).tensor_split(splits)):
        d[index] = a[:, columns].float() @ b[:, columns].mT
        squares[index] = a[:, columns].float().square().sum(1)


def skip_mid(a: Any, b: Any, d: Any, heads: tuple[int, int, int], **_: Any) -> None:
    left, mid, right = heads
    product = (values(a) @ values(b).mT).view(len(d), -1, left + right)
    whole = d.view(len(d), -1, left + mid + right)
    whole[..., :left], whole[..., left + mid :] = product[..., :left], product[..., left:]


def one_by_one(q: Any, k: Any, weights: Any) -> Any:
    """Logits [rows, keys] by the definition, another way than `expected_logits`."""
    return (torch.einsum("shd,td->sht", q, k).relu() * weights.float()[..., None]).sum(1)


def logits(
    q: Any, kv: Any, weights: Any, starts: Any, ends: Any, clean_logits: bool = False, max_seqlen_k: int = 0
) -> Any:
    q = q[0] if isinstance(q, tuple) else q
    found = one_by_one(q.float(), kv[0].float() * kv[1][:, None], weights)
    if max_seqlen_k:
        found = torch.stack([row.roll(-int(start)) for row, start in zip(found, starts, strict=True)])
    return found


def paged(
    q: Any, cache: Any, weights: Any, lengths: Any, table: Any, schedule: Any, most: int, clean_logits: bool = False
) -> Any:
    q = (q[0] if isinstance(q, tuple) else q).float()
    pages, size, _, width = cache.shape
    flat, dim = cache.view(pages, -1), width - 4
    keys = flat[:, : size * dim].view(torch.float8_e4m3fn).float().view(pages, size, dim)
    keys = keys * flat[:, size * dim :].view(torch.float32)[..., None]
    rows = [
        one_by_one(q[i], keys[table[i].long()].flatten(0, 1), weights.view(len(q), -1, q.shape[2])[i])
        for i in range(len(q))
    ]
    return torch.cat(rows)[:, :most]


def mx(pair: Any, width: int = 128) -> Any:
    """Values of data […, D] whose scales are four exponents in an int32."""
    data, scales = pair
    exponents = scales.contiguous().view(torch.uint8).view(*scales.shape, 4).int()
    return data.float() * (exponents - 127).float().exp2().repeat_interleave(width // 4, -1)


def sparse(q: Any, kv: Any, weights: Any, schedule: Any, blocks: int, block: int, use_unaligned_ks: bool) -> Any:
    """The schedule stands for what DeepGEMM's holds: starts and blocks of each row."""
    starts, chosen = schedule
    queries, keys = mx(q), mx(kv)
    logits = torch.zeros(len(weights), blocks * block)
    for row, own in enumerate(chosen.tolist()):
        whole = one_by_one(queries[row : row + 1], keys, weights[row : row + 1])[0]
        for j, number in enumerate(own):
            at = number * block + int(starts[row]) % block
            logits[row, j * block : (j + 1) * block] = whole[at : at + block]
    return logits


def paged_sparse(q: Any, cache: Any, weights: Any, schedule: Any, blocks: int, block: int) -> Any:
    table, chosen = schedule
    pages, size, _, width = cache.shape
    whole_pages = torch.stack(
        [cache[page].as_strided((size * width,), (1,), cache[page].storage_offset()) for page in range(pages)]
    )
    data = whole_pages[:, : size * 128].reshape(pages, size, 128).contiguous().view(torch.float8_e4m3fn)
    scales = whole_pages[:, size * 128 :].contiguous().view(torch.int32)
    rows = [
        sparse((q[0][i : i + 1, 0], q[1][i : i + 1, 0]), (data[own].flatten(0, 1), scales[own].flatten()),
               weights[i : i + 1], (torch.zeros(1), chosen[i : i + 1]), blocks, block, False)
        for i, own in enumerate(table.long())
    ]  # fmt: skip
    return torch.cat(rows)


def k_grouped(a: Any, b: Any, d: Any, ks: Any, layout: Any, c: Any, **_: Any) -> None:
    scales = lambda x: x[1].repeat_interleave(128, 0) if isinstance(x, tuple) else 1.0  # noqa: E731
    data = lambda x: (x[0] if isinstance(x, tuple) else x).float()  # noqa: E731
    for expert, (left, right) in enumerate(
        zip((data(a) * scales(a)).split(ks), (data(b) * scales(b)).split(ks), strict=True)
    ):
        d[expert] += left.mT @ right


def accumulating(a: Any, b: Any, d: Any, c: Any, **_: Any) -> None:
    d += values(a) @ values(b).mT


def nn(a: Any, b: Any, d: Any, **_: Any) -> None:
    d.copy_(a.float() @ b.float())


def mega_buffer(group: Any, experts: int, tokens: int, topk: int, hidden: int, intermediate: int) -> Any:
    tokens = -(-tokens // 128) * 128
    return SimpleNamespace(
        x=torch.zeros(tokens, hidden, dtype=torch.int8),
        x_sf=torch.zeros(tokens, hidden // 128),
        topk_idx=torch.zeros(tokens, topk, dtype=torch.int64),
        topk_weights=torch.zeros(tokens, topk),
    )


def mega_moe(y: Any, first: Any, second: Any, there: Any, activation_clamp: float | None) -> None:
    """One token and one expert at a time."""
    x = spread(there.x.view(torch.float8_e4m3fn), there.x_sf)
    first, second = spread(*first), spread(*second)
    limit = activation_clamp or math.inf
    for token in range(len(y)):
        total = torch.zeros(y.shape[1])
        for expert, weight in zip(there.topk_idx[token].tolist(), there.topk_weights[token].tolist(), strict=True):
            both = first[expert] @ x[token]
            gate, up = both[: len(both) // 2].clamp(max=limit), both[len(both) // 2 :].clamp(-limit, limit)
            blocks = (gate / (1 + (-gate).exp()) * up * weight).view(-1, 64)
            scale = blocks.abs().max(1, keepdim=True).values / 448
            total += (second[expert] @ ((blocks / scale).to(torch.float8_e4m3fn).float() * scale).flatten()).bfloat16()
        y[token] = total


def sm90_pre_dispatch(x: Any, chosen: Any, weights: Any, into: Any, sf: Any, ids: Any, ws: Any, tokens: int) -> None:
    blocks = x.float().view(tokens, -1, 128)
    sf[:tokens] = blocks.abs().amax(-1) / 448
    into[:tokens] = (blocks / sf[:tokens, :, None]).flatten(1).to(torch.float8_e4m3fn)
    ids.fill_(-1), ws.fill_(0)
    ids[:tokens], ws[:tokens] = chosen, weights


def fp4(data: Any) -> Any:
    """Values of FP4, two to a byte, the even one in the low half."""
    table = torch.tensor([0.0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])
    codes = data.contiguous().view(torch.uint8).long()
    return torch.stack((table[codes % 16], table[codes // 16]), -1).flatten(-2)


def blocks(data: Any, scales: Any) -> Any:
    """Values […, K] with packed scales: E4M3 for 16 columns, exponents for more."""
    found = fp4(data) if data.dtype in (torch.int8, torch.uint8) else data.float()
    columns = found.shape[-1] // (4 * scales.shape[-1])
    bytes_ = scales.clone(memory_format=torch.contiguous_format).view(torch.uint8)
    exponents = (bytes_.int() - 127).float().exp2()
    return found * (bytes_.view(torch.float8_e4m3fn).float() if columns == 16 else exponents).repeat_interleave(
        columns, -1
    )


E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def nearest(value: float) -> float:
    """The E2M1 nearest to ``value``; of two as near, the one with the even code."""
    code = min(range(8), key=lambda code: (abs(E2M1[code] - abs(value)), code % 2))
    return math.copysign(E2M1[code], value)


def between(row: Any, kind: str) -> Any:
    """One token's activations as SM100's kernels keep them, group by group."""
    if kind == "bf16":
        return row.bfloat16().float()
    found = []
    for group in row.split(16 if kind == "nvfp4" else 32):
        most = group.abs().max().item()
        if kind == "nvfp4":
            scale = torch.tensor(most / 6).to(torch.float8_e4m3fn).float().item()
        else:
            scale = 2.0 ** math.ceil(math.log2(most / (448 if kind == "fp8" else 6)))
        if kind == "fp8":
            found.append((group / scale).to(torch.float8_e4m3fn).float() * scale)
        else:
            found.append(torch.tensor([nearest(value) * scale for value in (group / scale).tolist()]))
    return torch.cat(found)


def gated(both: Any, limit: float, name: str = "swiglu", alpha: float = 1.0, beta: float = 0.0) -> Any:
    """One token's gate and up as SM100's kernels join them."""
    gate, up = both.bfloat16().float().chunk(2)
    if name == "situ":
        up = up if beta == 0 else beta * (2 / (1 + (-2 / beta * up).exp()) - 1)
        return alpha * (2 / (1 + (-2 / alpha * gate).exp()) - 1) / (1 + (-gate).exp()) * up
    up = up.clamp(-limit, limit)
    gate = gate if name == "swiglustep" else gate.clamp(max=limit)
    gate = gate / (1 + (-alpha * gate).exp())
    return (gate.clamp(max=limit) if name == "swiglustep" else gate) * (up + beta)


def sm100_layer(kind: str, weigh: str = "activation") -> Any:
    """One token and one expert at a time, on SM100, as vLLM's copy is called; NVFP4's with a buffer of its own."""

    def play(
        y: Any, first: Any, second: Any, there: Any, activation_clamp: float | None = None,
        activation: str = "swiglu", activation_alpha: float = 1.0, activation_beta: float = 0.0,
        shared_l1_weights: Any = None, shared_l2_weights: Any = None, x_bf16: Any = None,
        post_expert_norm_gamma: Any = None, post_expert_norm_eps: float = 0.0, fast_math: bool = True,
        use_x_scales: bool = False, norm: Any = None, alphas: Any = (None, None, None),
    ) -> None:  # fmt: skip
        limit = activation_clamp or math.inf
        bf16 = kind == "bf16"
        xs = there.x.float() if bf16 else blocks(there.x, there.x_sf)
        if use_x_scales:
            xs = there.x_scales[:, None] * xs
        first, second = (w.float() if bf16 else blocks(*w) for w in (first, second))
        if post_expert_norm_gamma is not None:
            norm = lambda out: (out * post_expert_norm_gamma, out * post_expert_norm_gamma)  # noqa: E731
        for token in range(len(y)):
            total = torch.zeros(y.shape[1])
            for expert, weight in zip(there.topk_idx[token].tolist(), there.topk_weights[token].tolist(), strict=True):
                both = first[expert] @ xs[token]
                if alphas[0] is not None:
                    both = torch.cat(
                        [half * alpha for half, alpha in zip(both.chunk(2), alphas[0][expert], strict=True)]
                    )
                row = gated(both, limit, activation, activation_alpha, activation_beta)
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
                total += shared(there, x_bf16, token, shared_l1_weights, shared_l2_weights, lambda both: gated(
                    both, limit, activation, activation_alpha, activation_beta
                ))  # fmt: skip
            y[token] = total

    play.own_buffer = kind == "nvfp4" and weigh == "sum"  # type: ignore[attr-defined]
    return play


def sglang_layer(kind: str) -> Any:
    """The same as sgl-deep-gemm is called."""
    play = sm100_layer(kind)

    def called(
        y: Any, first: Any, second: Any, there: Any, activation_clamp: float | None = None, activation: str = "swiglu",
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
            y, first, second, there, activation_clamp, activation, alpha, beta, shared_l1_weights, shared_l2_weights,
            use_x_scales=use_x_scales, norm=norm if post_expert_norm else None,
            post_expert_norm_eps=post_expert_norm_eps, alphas=(l1_alphas, l2_alphas, l2_act_scales),
        )  # fmt: skip

    return called


def shared(there: Any, x_bf16: Any, token: int, first: Any, second: Any, activate: Any) -> Any:
    """What the experts that every token goes to give for one."""
    if isinstance(first, tuple):
        x = there.x if there.shared_l1_acts is None else there.shared_l1_acts
        page = [lane + 32 * quarter for lane in range(32) for quarter in range(4)]
        sf = there.shared_l1_acts_sf[token // BLOCK_M * 128 + page.index(token % BLOCK_M)]
        x, kind = blocks(x[token : token + 1], sf[None])[0], "fp8"
        first, second = blocks(*first), blocks(*second)
    else:
        own = x_bf16 if x_bf16 is not None else there.shared_l1_acts
        x, kind = (there.x if own is None else own)[token].float(), "bf16"
    return (second.float() @ between(activate(first.float() @ x), kind)).bfloat16()


#: Of SM100's kernels that are played.
BLOCK_M = 32


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


def gate(
    x: Any, weight: Any, topk: int, shared: bool, shared_experts: int, factor: float, rank: int,
    scoring_func: str, bias: Any, out: Any, fix_routing_mask: Any = None, unmapped_topk_idx: Any = None,
) -> None:  # fmt: skip
    score = {"sigmoid": lambda v: 1 / (1 + math.exp(-v)), "sqrtsoftplus": lambda v: math.sqrt(math.log1p(math.exp(v)))}
    for row, logits in enumerate((x.float() @ weight.float().mT).tolist()):
        scores = [score.get(scoring_func, float)(logit) for logit in logits]
        order = sorted(range(len(scores)), key=lambda e: -(scores[e] + (0 if bias is None else bias[e].item())))[:topk]
        if fix_routing_mask is not None and fix_routing_mask[row]:
            order = unmapped_topk_idx[row].tolist()
        total = sum(scores[expert] for expert in order)
        out[0][row] = torch.tensor(order)
        out[1][row] = torch.tensor([scores[expert] / total for expert in order])


def hyper_connections(
    x: Any, residual: Any, previous: Any, post: Any, mix: Any, weight: Any, scales: Any, bases: Any,
    count: int, norm_eps: float, pre_eps: float, post_scale: float, eps: float, iterations: int,
    gain: Any, y_eps: float, y_scale: float, new: Any, new_prev: Any, new_post: Any, new_mix: Any, y_bf16: Any,
) -> None:  # fmt: skip
    """One token at a time."""
    for token in range(len(x)):
        rows = torch.einsum("io,ih->oh", mix[token], residual[token].float()) + post[token] * x[token].float()
        new[token] = rows.bfloat16()
        rows = new[token].float()
        mixed = (previous[token, :, 0] @ rows).bfloat16().float()
        y_bf16[token] = mixed / (mixed.square().mean() + y_eps).sqrt() * y_scale * gain.float()
        flat = rows.flatten()
        logits = weight @ flat / (flat.square().mean() + norm_eps).sqrt()
        logits = logits * torch.cat((scales[0].expand(4), scales[1].expand(4), scales[2].expand(16))) + bases
        new_prev[token, :, 0] = logits[:4].sigmoid() + pre_eps
        new_post[token, :, 0] = logits[4:8].sigmoid() * post_scale
        square = [[math.exp(v) for v in row] for row in logits[8:].view(4, 4).tolist()]
        square = [[v / sum(row) + eps for v in row] for row in square]
        for step in range(2 * iterations - 1):
            square = [list(column) for column in zip(*square, strict=True)]
            square = [[v / (sum(row) + eps) for v in row] for row in square]
            if step % 2:
                assert all(abs(sum(row) - 1) < 1e-3 for row in square)
        new_mix[token] = torch.tensor(square).mT


MOE = {"ranks": 1, "experts": 8, "topk": 2, "hidden": 256, "intermediate": 128, "max_tokens": 64}
ALPHAS = {"use_x_scales": True, "l1_alphas": True, "l2_alphas": True, "l2_act_scales": True}
LARGER = MOE | {"hidden": 512, "intermediate": 256}
PLAYED: dict[str, tuple[Any, dict[str, Any]]] = {
    "fp8_gemm_nt accumulating": (
        accumulating,
        {"n": 256, "k": 384, "max_tokens": 64, "out_dtype": "float32", "accumulate": True},
    ),
    "bf16_gemm_nn": (nn, {"n": 256, "k": 384, "max_tokens": 64}),
    "einsum": (batched, {"expr": "bhd,hdr->bhr", "h": 3, "d": 64, "r": 128, "max_tokens": 64}),
    "fp8_einsum": (batched, {"h": 3, "d": 256, "r": 384, "max_tokens": 64}),
    "tf32_hc_prenorm_gemm": (prenorm, {"n": 24, "k": 1024, "max_tokens": 64}),
    "fp8_gemm_nt_skip_head_mid": (skip_mid, {"n": 256, "k": 384, "left": 64, "mid": 32, "right": 64, "max_tokens": 64}),
    "fp8_mqa_logits": (logits, {"heads": 32, "max_tokens": 64}),
    "fp8_fp4_mqa_logits": (logits, {"heads": 32, "max_tokens": 64, "compressed": True}),
    "fp8_paged_mqa_logits": (paged, {"heads": 32, "max_batch": 40, "next_n": 2}),
    "fp8_fp4_sparse_mqa_logits": (sparse, {"heads": 8, "block": 16, "blocks": 32, "unaligned": True, "max_tokens": 64}),
    "fp8_fp4_sparse_mqa_logits aligned": (sparse, {"heads": 8, "block": 8, "blocks": 132, "max_tokens": 64}),
    "fp8_fp4_paged_sparse_mqa_logits": (paged_sparse, {"heads": 8, "block": 16, "blocks": 32, "max_batch": 64}),
    "k_grouped_bf16_gemm_tn_contiguous": (k_grouped, {"experts": 3, "m": 64, "n": 32, "max_k": 512}),
    "k_grouped_fp8_gemm_tn_contiguous": (k_grouped, {"experts": 3, "m": 64, "n": 32, "max_k": 512}),
    "fp8_mega_moe": (mega_moe, MOE),
    "fp8_mega_moe clamped": (mega_moe, MOE | {"activation_clamp": 7.0}),
    "mega_moe_pre_dispatch_sm90": (sm90_pre_dispatch, MOE),
    "bf16_mega_moe": (sm100_layer("bf16"), MOE),
    "bf16_mega_moe step": (sm100_layer("bf16"), MOE | {"activation": "swiglustep", "activation_clamp": 3.0}),
    "bf16_mega_moe shared": (sglang_layer("bf16"), MOE | {"shared_experts": 2, "fast_math": False}),
    "bf16_mega_moe gained": (sm100_layer("bf16"), MOE | {"post_expert_norm": True}),
    "bf16_mega_moe normed": (sglang_layer("bf16"), MOE | {"post_expert_norm": True, "post_expert_norm_eps": 0.5}),
    "bf16_mega_moe weight first": (
        sglang_layer("bf16"),
        MOE | {"post_expert_norm": True, "post_expert_norm_weight_first": True},
    ),
    "bf16_mega_moe no weight": (
        sglang_layer("bf16"),
        MOE | {"post_expert_norm": True, "post_expert_norm_weight": False},
    ),
    "bf16_mega_moe clamped": (sm100_layer("bf16"), MOE | {"activation_clamp": 7.0}),
    "fp8_fp4_mega_moe": (sm100_layer("fp8"), MOE | {"activation_clamp": 10.0}),
    "fp8_fp4_mega_moe fp8": (sm100_layer("fp8"), MOE | {"mma_type": "fp8xfp8"}),
    "fp8_fp4_mega_moe fp4": (sm100_layer("fp4"), MOE | {"mma_type": "mxf4xmxf4"}),
    "fp8_fp4_mega_moe shared": (sm100_layer("fp8"), MOE | {"shared_experts": 2, "activation_clamp": 10.0}),
    "fp8_fp4_mega_moe scaled": (sm100_layer("fp8"), MOE | {"activation_alpha": 1.7, "activation_beta": 1.0}),
    "fp8_fp4_mega_moe step": (sm100_layer("fp8"), MOE | {"activation": "swiglustep", "activation_clamp": 3.0}),
    "fp8_fp4_mega_moe oai": (sglang_layer("fp8"), MOE | {"activation": "swigluoai", "activation_clamp": 7.0}),
    "fp8_fp4_mega_moe situ": (sglang_layer("fp8"), MOE | {"activation": "situ"}),
    "fp8_fp4_mega_moe situ up": (sm100_layer("fp8"), MOE | {"activation": "situ", "activation_alpha": 4.0}),
    "fp8_fp4_mega_moe situ limits": (
        sm100_layer("fp8"),
        MOE | {"activation": "situ", "activation_alpha": 4.0, "activation_beta": 2.0},
    ),
    "nvfp4_mega_moe": (sglang_layer("nvfp4"), MOE),
    "nvfp4_mega_moe alphas": (sglang_layer("nvfp4"), MOE | ALPHAS),
    "nvfp4_mega_moe normed": (sglang_layer("nvfp4"), MOE | ALPHAS | {"post_expert_norm": True}),
    "nvfp4_mega_moe tokens": (sm100_layer("nvfp4", "sum"), MOE | {"use_x_scales": True}),
    "nvfp4_mega_moe shared": (sm100_layer("nvfp4", "sum"), MOE | {"use_x_scales": True, "shared_experts": 1}),
    "nvfp4_mega_moe shared bf16": (
        sm100_layer("nvfp4", "sum"),
        MOE | {"use_x_scales": True, "shared_experts": 1, "shared_dtype": "bfloat16"},
    ),
    "fp4_fp4_mega_moe": (sm100_layer("nvfp4", "rounded"), LARGER),
    "fp4_fp4_mega_moe shared": (sm100_layer("nvfp4", "rounded"), LARGER | {"shared_experts": 2}),
    "fp4_fp4_mega_moe normed": (sm100_layer("nvfp4", "norm"), LARGER | {"post_expert_norm": True, "fast_math": False}),
    "mega_moe_pre_dispatch": (sm100_pre_dispatch, MOE),
    "mega_moe_pre_dispatch fp4": (sm100_pre_dispatch, MOE | {"mma_type": "mxf4xmxf4"}),
    "mega_moe_pre_dispatch nvfp4": (sm100_pre_dispatch, MOE | {"mma_type": "nvfp4xnvfp4"}),
    "bf16_mega_gate": (gate, {"hidden": 256, "experts": 24, "topk": 4, "max_tokens": 64}),
    "bf16_mega_gate hashed": (
        gate,
        {"hidden": 256, "experts": 24, "topk": 4, "max_tokens": 64, "bias": False, "hashed": True},
    ),
    "bf16_mega_gate all": (gate, {"hidden": 256, "experts": 4, "topk": 4, "max_tokens": 64, "scoring": "sigmoid"}),
    "bf16_mega_gate identity": (
        gate,
        {"hidden": 256, "experts": 64, "topk": 6, "max_tokens": 64, "scoring": "identity", "bias": False},
    ),
    "mega_mhc": (hyper_connections, {"hidden": 1024, "max_tokens": 64}),
    "fp8_gemm_nt": (dense, {"n": 256, "k": 384, "max_tokens": 64}),
    "bf16_gemm_nt": (dense, {"n": 256, "k": 384, "max_tokens": 64, "out_dtype": "float32"}),
    "m_grouped_fp8_gemm_nt_contiguous": (contiguous, {"experts": 3, "topk": 2, "n": 128, "k": 256, "max_tokens": 400}),
    "m_grouped_bf16_gemm_nt_contiguous": (contiguous, {"experts": 3, "topk": 2, "n": 128, "k": 256, "max_tokens": 400}),
    "m_grouped_fp8_gemm_nt_masked": (masked, {"experts": 3, "max_m": 512, "n": 128, "k": 256}),
    "m_grouped_bf16_gemm_nt_masked": (masked, {"experts": 3, "max_m": 512, "n": 128, "k": 256}),
}


def op_name(played: str) -> str:
    return played.split()[0]


def device(function: Any) -> Device:
    functions = dict.fromkeys(map(op_name, PLAYED), function) | {
        "get_mk_alignment_for_contiguous_layout": lambda: 128,
        "get_num_sms": lambda: 132,
        "get_sparse_mqa_logits_metadata": lambda starts, ends, keys, chosen, *_, **__: (starts, chosen),
        "get_paged_sparse_mqa_logits_metadata": lambda lengths, table, rows, page, chosen, *_: (table, chosen),
        "get_symm_buffer_for_sm90_mega_moe": mega_buffer,
        "transform_weights_for_mega_moe_sm90": lambda first, second: (first, second),
        "get_symm_buffer_for_mega_moe": sm100_buffer,
        "transform_weights_for_mega_moe": lambda first, second: (first, second),
        "get_block_m_for_mega_moe": lambda *_: BLOCK_M,
        "get_block_m_for_nvfp4_mega_moe": lambda *_: BLOCK_M,
        "get_paged_mqa_logits_metadata": lambda lengths, page, slots: torch.zeros(slots + 1, 2, dtype=torch.int32),
    }
    if getattr(function, "own_buffer", False):
        functions["NVFP4SymmBuffer"] = nvfp4_buffer
    return Device(torch, SimpleNamespace(**functions), "cpu")  # type: ignore[arg-type]
