"""DeepGEMM's part played by plain torch on the CPU: the arithmetic of an op written a second time, for test_trial.py.

`PLAYED` has three representative GEMMs, and every op whose reference no card has checked (docs/entry-points.md): for these
the second writing is the only evidence. `device` is a device whose DeepGEMM is one of the functions here.
"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import torch

from cachebuilder.ops.device import Device
from tests.played_mega_moe import (
    BLOCK_M,
    MOE,
    fp4,
    nvfp4_buffer,
    sglang_layer,
    sm100_buffer,
    sm100_layer,
    sm100_pre_dispatch,
)


def spread(data: Any, scales: Any, columns: int = 128) -> Any:
    """Dequantised another way than `Scaled.values`: element by element."""
    m, k = data.shape[-2:]
    rows = torch.arange(m) // (1 if scales.shape[-2] == m else 128)
    return data.float() * scales[..., rows, :][..., torch.arange(k) // columns]


def values(operand: Any) -> Any:
    """Of data and float32 scales: FP8 in blocks of 128 columns, FP4 in blocks of 32."""
    data, scales = operand
    return spread(fp4(data), scales, 32) if data.dtype == torch.int8 else spread(data, scales)


def turned(operand: Any) -> Any:
    """The operand with its last two dimensions swapped back."""
    data, scales = operand
    return data.mT, scales.mT


def dense(a: Any, b: Any, d: Any, **_: Any) -> None:
    d.copy_(values(a) @ values(b).mT)


def dense_tn(a: Any, b: Any, d: Any, **_: Any) -> None:
    dense(turned(a), turned(b), d)


def contiguous(a: Any, b: Any, d: Any, expert_of_row: Any, **_: Any) -> None:
    a, b = values(a), values(b)
    d.fill_(7)  # a kernel may do anything with padding rows
    for row, expert in enumerate(expert_of_row.tolist()):
        if expert >= 0:
            d[row] = b[expert] @ a[row]


def contiguous_nn(a: Any, b: Any, d: Any, expert_of_row: Any, **_: Any) -> None:
    contiguous(a, turned(b), d, expert_of_row)


def masked(a: Any, b: Any, d: Any, counts: Any, expected_m: int, **_: Any) -> None:
    a, b = values(a), values(b)
    for expert, count in enumerate(counts.tolist()):
        tile = min(-(-count // 256) * 256, d.shape[1])
        d[expert, :tile] = (a[expert] @ b[expert].mT)[:tile]


def k_grouped(a: Any, b: Any, d: Any, ks: Any, layout: Any, c: Any, **_: Any) -> None:
    left, right = ((data.float() * scales.repeat_interleave(128, 0)).split(ks) for data, scales in (a, b))
    for expert in range(len(ks)):
        d[expert] += left[expert].mT @ right[expert]


def one_by_one(q: Any, k: Any, weights: Any) -> Any:
    """Logits [rows, keys] by the definition, another way than `expected_logits`."""
    return (torch.einsum("shd,td->sht", q, k).relu() * weights.float()[..., None]).sum(1)


def mx(pair: Any, width: int = 128) -> Any:
    """Values of data […, D] whose scales are four exponents in an int32."""
    data, scales = pair
    exponents = scales.contiguous().view(torch.uint8).view(*scales.shape, 4).int()
    return data.float() * (exponents - 127).float().exp2().repeat_interleave(width // 4, -1)


def sparse(q: Any, kv: Any, weights: Any, schedule: Any, blocks: int, block: int, use_unaligned_ks: bool) -> Any:
    """The schedule stands for what DeepGEMM's holds: starts and blocks of each row."""
    starts, block_ids = schedule
    queries, keys = mx(q), mx(kv)
    logits = torch.zeros(len(weights), blocks * block)
    for row, row_blocks in enumerate(block_ids.tolist()):
        every_key = one_by_one(queries[row : row + 1], keys, weights[row : row + 1])[0]
        for j, number in enumerate(row_blocks):
            first = number * block + int(starts[row]) % block
            logits[row, j * block : (j + 1) * block] = every_key[first : first + block]
    return logits


def paged_sparse(q: Any, cache: Any, weights: Any, schedule: Any, blocks: int, block: int) -> Any:
    table, block_ids = schedule
    pages, size, _, width = cache.shape
    whole_pages = torch.stack(
        [cache[page].as_strided((size * width,), (1,), cache[page].storage_offset()) for page in range(pages)]
    )
    data = whole_pages[:, : size * 128].reshape(pages, size, 128).contiguous().view(torch.float8_e4m3fn)
    scales = whole_pages[:, size * 128 :].contiguous().view(torch.int32)
    rows = [
        sparse((q[0][i : i + 1, 0], q[1][i : i + 1, 0]), (data[own].flatten(0, 1), scales[own].flatten()),
               weights[i : i + 1], (torch.zeros(1), block_ids[i : i + 1]), blocks, block, False)
        for i, own in enumerate(table.long())
    ]  # fmt: skip
    return torch.cat(rows)


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


#: The ops whose tests stand for the comparison itself: one output, which the caller allocates.
REPRESENTATIVE = ("fp8_gemm_nt", "m_grouped_fp8_gemm_nt_contiguous", "m_grouped_fp8_gemm_nt_masked")

GEMM = {"n": 256, "k": 384, "max_tokens": 64}
CONTIGUOUS = {"experts": 3, "topk": 2, "n": 128, "k": 256, "max_tokens": 400}
MASKED = {"experts": 3, "max_m": 512, "n": 128, "k": 256}
MXFP4 = {"recipe_a": [1, 128], "recipe_b": [1, 32]}
GATE = {"hidden": 256, "experts": 24, "topk": 4, "max_tokens": 64}
ALPHAS = {"use_x_scales": True, "l1_alphas": True, "l2_alphas": True, "l2_act_scales": True}
LARGER = MOE | {"hidden": 512, "intermediate": 256}
#: op name and variant → the function that plays DeepGEMM's, and the op's fields.
PLAYED: dict[str, tuple[Any, dict[str, Any]]] = {
    "fp8_gemm_nt": (dense, GEMM),
    "m_grouped_fp8_gemm_nt_contiguous": (contiguous, CONTIGUOUS),
    "m_grouped_fp8_gemm_nt_masked": (masked, MASKED),
    "fp8_gemm_tn": (dense_tn, GEMM),
    "fp8_fp4_gemm_nt": (dense, GEMM | MXFP4),
    "m_grouped_fp8_gemm_nn_contiguous": (contiguous_nn, CONTIGUOUS),
    "m_grouped_fp8_fp4_gemm_nt_contiguous": (contiguous, CONTIGUOUS | MXFP4),
    "m_grouped_fp8_fp4_gemm_nt_masked": (masked, MASKED | MXFP4),
    "k_grouped_fp8_gemm_tn_contiguous": (k_grouped, {"experts": 3, "m": 64, "n": 32, "max_k": 512}),
    "fp8_fp4_sparse_mqa_logits": (sparse, {"heads": 8, "block": 16, "blocks": 32, "unaligned": True, "max_tokens": 64}),
    "fp8_fp4_sparse_mqa_logits aligned": (sparse, {"heads": 8, "block": 8, "blocks": 132, "max_tokens": 64}),
    "fp8_fp4_paged_sparse_mqa_logits": (paged_sparse, {"heads": 8, "block": 16, "blocks": 32, "max_batch": 64}),
    "bf16_mega_gate": (gate, GATE),
    "bf16_mega_gate hashed": (gate, GATE | {"bias": False, "hashed": True}),
    "bf16_mega_gate all": (gate, GATE | {"experts": 4, "scoring": "sigmoid"}),
    "bf16_mega_gate identity": (gate, GATE | {"experts": 64, "topk": 6, "scoring": "identity", "bias": False}),
    "mega_mhc": (hyper_connections, {"hidden": 1024, "max_tokens": 64}),
    "mega_moe_pre_dispatch": (sm100_pre_dispatch, MOE),
    "mega_moe_pre_dispatch fp4": (sm100_pre_dispatch, MOE | {"mma_type": "mxf4xmxf4"}),
    "mega_moe_pre_dispatch nvfp4": (sm100_pre_dispatch, MOE | {"mma_type": "nvfp4xnvfp4"}),
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
}


def op_name(played: str) -> str:
    return played.split()[0]


def device(function: Any) -> Device:
    functions = dict.fromkeys(map(op_name, PLAYED), function) | {
        "fp8_fp4_mqa_logits": function,
        "get_mk_alignment_for_contiguous_layout": lambda: 128,
        "get_num_sms": lambda: 132,
        "get_sparse_mqa_logits_metadata": lambda starts, ends, keys, block_ids, *_, **__: (starts, block_ids),
        "get_paged_sparse_mqa_logits_metadata": lambda lengths, table, rows, page, block_ids, *_: (table, block_ids),
        "get_symm_buffer_for_mega_moe": sm100_buffer,
        "transform_weights_for_mega_moe": lambda first, second: (first, second),
        "get_block_m_for_mega_moe": lambda *_: BLOCK_M,
        "get_block_m_for_nvfp4_mega_moe": lambda *_: BLOCK_M,
    }
    if getattr(function, "own_buffer", False):
        functions["NVFP4SymmBuffer"] = nvfp4_buffer
    return Device(torch, SimpleNamespace(**functions), "cpu")  # type: ignore[arg-type]
