"""One small shape of every op for each arch and generation, which the CI plans and compiles, and the docs' tables of them.

``python -m tests.entry_points`` writes the tables into ``docs/entry-points.md``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.without_op import WITHOUT_OP

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs" / "entry-points.md"
#: The ops that ran on a real GPU with right results: {"sm90 deepjit": [op, …], …}.
RUNS = ROOT / "benchmarks" / "gpu" / "entry-points.json"

GPUS = {"sm90": "H200", "sm100": "B200", "sm120": "RTX-PRO-6000"}
GENERATIONS = ("deepjit", "legacy")
ALL, BLACKWELL, DATACENTER = ("sm90", "sm100", "sm120"), ("sm100", "sm120"), ("sm90", "sm100")
EXPERTS = {"experts": 4, "n": 512, "k": 512}
MOE = {"ranks": 2, "experts": 16, "topk": 4, "hidden": 1024, "intermediate": 512}
ALPHAS = {"use_x_scales": True, "l1_alphas": True, "l2_alphas": True, "l2_act_scales": True}
MXFP4 = {"recipe_a": [1, 128], "recipe_b": [1, 32]}

#: (fields, archs, generations): the generations are those whose DeepGEMM has the op.
CASES: list[tuple[dict[str, Any], tuple[str, ...], tuple[str, ...]]] = [
    ({"op": "fp8_gemm_nt", "n": 512, "k": 1024}, ALL, GENERATIONS),
    ({"op": "fp8_gemm_nt", "n": 512, "k": 1024, "scales": "packed"}, BLACKWELL, GENERATIONS),
    ({"op": "fp8_gemm_nt", "n": 512, "k": 1024, "recipe": [1, 1, 128], "out_dtype": "float32", "accumulate": True, "max_tokens": 64}, ALL, GENERATIONS),
    ({"op": "fp8_gemm_nt", "n": 512, "k": 1024, "scales": "packed", "recipe_a": [1, 32], "recipe_b": [1, 32]}, BLACKWELL, GENERATIONS),
    ({"op": "fp8_fp4_gemm_nt", "n": 512, "k": 1024} | MXFP4, BLACKWELL, GENERATIONS),
    ({"op": "fp8_gemm_nn", "n": 512, "k": 1024}, BLACKWELL, GENERATIONS),
    ({"op": "fp8_gemm_tn", "n": 512, "k": 1024}, BLACKWELL, GENERATIONS),
    ({"op": "fp8_gemm_tt", "n": 512, "k": 1024}, BLACKWELL, GENERATIONS),
    ({"op": "bf16_gemm_nt", "n": 512, "k": 1024}, ALL, ("legacy",)),  # DeepJIT's dense BF16 is cuBLASLt's
    ({"op": "bf16_gemm_nn", "n": 512, "k": 1024}, ALL, ("legacy",)),
    ({"op": "bf16_gemm_tn", "n": 512, "k": 1024}, ALL, ("legacy",)),
    ({"op": "bf16_gemm_tt", "n": 512, "k": 1024}, ALL, ("legacy",)),
    ({"op": "fp8_gemm_nt_skip_head_mid", "n": 512, "k": 1024, "left": 128, "mid": 64, "right": 128}, ALL, GENERATIONS),
    ({"op": "m_grouped_fp8_gemm_nt_contiguous", "topk": 2} | EXPERTS, ALL, GENERATIONS),
    ({"op": "m_grouped_fp8_gemm_nt_contiguous", "topk": 2, "psum": True} | EXPERTS, ALL, GENERATIONS),
    ({"op": "m_grouped_fp8_gemm_nt_contiguous", "topk": 2, "alignment": "per-call"} | EXPERTS, ALL, GENERATIONS),
    ({"op": "m_grouped_fp8_gemm_nn_contiguous", "topk": 2} | EXPERTS, BLACKWELL, GENERATIONS),
    ({"op": "m_grouped_fp8_fp4_gemm_nt_contiguous", "topk": 2} | EXPERTS | MXFP4, BLACKWELL, GENERATIONS),
    ({"op": "m_grouped_bf16_gemm_nt_contiguous", "topk": 2} | EXPERTS, ALL, GENERATIONS),
    ({"op": "m_grouped_bf16_gemm_nt_contiguous", "topk": 2, "psum": True} | EXPERTS, ALL, GENERATIONS),
    ({"op": "m_grouped_bf16_gemm_nn_contiguous", "topk": 2} | EXPERTS, ALL, GENERATIONS),
    ({"op": "m_grouped_fp8_gemm_nt_masked", "max_m": 128} | EXPERTS, ALL, GENERATIONS),
    ({"op": "m_grouped_fp8_fp4_gemm_nt_masked", "max_m": 128} | EXPERTS | MXFP4, BLACKWELL, GENERATIONS),
    ({"op": "m_grouped_bf16_gemm_nt_masked", "max_m": 128} | EXPERTS, ALL, GENERATIONS),
    ({"op": "k_grouped_fp8_gemm_nt_contiguous", "experts": 4, "m": 512, "n": 256, "max_k": 256}, ("sm90",), GENERATIONS),
    ({"op": "k_grouped_fp8_gemm_tn_contiguous", "experts": 4, "m": 512, "n": 256, "max_k": 256}, ("sm100",), GENERATIONS),
    ({"op": "k_grouped_bf16_gemm_tn_contiguous", "experts": 4, "m": 512, "n": 256, "max_k": 256}, DATACENTER, GENERATIONS),
    ({"op": "einsum", "expr": "bhr,hdr->bhd", "h": 4, "d": 128, "r": 512}, ALL, GENERATIONS),
    ({"op": "einsum", "expr": "bhd,hdr->bhr", "h": 4, "d": 128, "r": 512}, ALL, GENERATIONS),
    ({"op": "fp8_einsum", "h": 4, "d": 128, "r": 512}, ALL, GENERATIONS),
    ({"op": "fp8_mqa_logits", "heads": 64}, ALL, GENERATIONS),
    ({"op": "fp8_fp4_mqa_logits", "heads": 32, "compressed": True}, ALL, GENERATIONS),
    ({"op": "fp8_fp4_mqa_logits", "heads": 64, "scales": "mx", "weights": "bfloat16", "logits": "bfloat16"}, ("sm100",), GENERATIONS),
    ({"op": "fp8_fp4_mqa_logits", "heads": 64, "format": "fp4"}, BLACKWELL, GENERATIONS),
    ({"op": "fp8_paged_mqa_logits", "heads": 64, "max_batch": 8}, ALL, GENERATIONS),
    ({"op": "fp8_fp4_paged_mqa_logits", "heads": 32, "max_batch": 8, "next_n": 2}, ALL, GENERATIONS),
    ({"op": "fp8_fp4_paged_mqa_logits", "heads": 64, "max_batch": 8, "format": "fp4"}, BLACKWELL, GENERATIONS),
    ({"op": "get_paged_mqa_logits_metadata", "max_batch": 8}, ALL, GENERATIONS),
    ({"op": "get_paged_mqa_logits_metadata", "max_batch": 8, "varlen": True}, ("sm100",), GENERATIONS),
    ({"op": "get_sparse_mqa_logits_metadata", "blocks": 64, "block": 16, "unaligned": True}, ("sm100",), ("deepjit",)),
    ({"op": "fp8_fp4_sparse_mqa_logits", "blocks": 64, "block": 16, "unaligned": True}, ("sm100",), ("deepjit",)),
    ({"op": "fp8_fp4_sparse_mqa_logits", "blocks": 64, "block": 8, "format": "fp4"}, ("sm100",), ("deepjit",)),
    ({"op": "get_paged_sparse_mqa_logits_metadata", "blocks": 64, "block": 16, "max_batch": 8}, ("sm100",), ("deepjit",)),
    ({"op": "fp8_fp4_paged_sparse_mqa_logits", "blocks": 64, "block": 16, "max_batch": 8}, ("sm100",), ("deepjit",)),
    ({"op": "tf32_hc_prenorm_gemm", "n": 24, "k": 4096}, ALL, GENERATIONS),
    ({"op": "get_mn_major_tma_aligned_tensor", "columns": 12}, ALL, GENERATIONS),
    ({"op": "get_mn_major_tma_aligned_packed_ue8m0_tensor", "columns": 12}, ALL, GENERATIONS),
    ({"op": "transform_sf_into_required_layout", "k": 1024, "recipe": [1, 128]}, ALL, GENERATIONS),
    ({"op": "bf16_mega_gate", "hidden": 1024, "experts": 64, "topk": 4}, ("sm100",), ("deepjit",)),
    (
        {"op": "bf16_mega_gate", "hidden": 1024, "experts": 64, "topk": 4, "bias": False, "hashed": True},
        ("sm100",),
        ("deepjit",),
    ),
    ({"op": "mega_mhc", "hidden": 1024}, ("sm100",), ("deepjit",)),
    ({"op": "mega_moe_pre_dispatch_sm90"} | MOE, ("sm90",), GENERATIONS),
    ({"op": "fp8_mega_moe"} | MOE, ("sm90",), GENERATIONS),
    ({"op": "mega_moe_pre_dispatch"} | MOE, ("sm100",), GENERATIONS),
    ({"op": "mega_moe_pre_dispatch", "mma_type": "mxf4xmxf4"} | MOE, ("sm100",), ("deepjit",)),
    ({"op": "mega_moe_pre_dispatch", "mma_type": "nvfp4xnvfp4"} | MOE, ("sm100",), ("deepjit",)),
    ({"op": "fp8_fp4_mega_moe"} | MOE, ("sm100",), GENERATIONS),
    ({"op": "fp8_fp4_mega_moe", "mma_type": "mxf4xmxf4"} | MOE, ("sm100",), ("deepjit",)),
    ({"op": "fp8_fp4_mega_moe", "mma_type": "fp8xfp8"} | MOE, ("sm100",), ("deepjit",)),
    ({"op": "fp8_fp4_mega_moe", "shared_experts": 1, "activation": "swigluoai", "activation_clamp": 7.0} | MOE, ("sm100",), GENERATIONS),
    ({"op": "fp8_fp4_mega_moe", "activation": "situ", "fast_math": False} | MOE, ("sm100",), GENERATIONS),
    ({"op": "bf16_mega_moe"} | MOE, ("sm100",), GENERATIONS),
    ({"op": "bf16_mega_moe", "shared_experts": 2, "fast_math": False} | MOE, ("sm100",), GENERATIONS),
    ({"op": "bf16_mega_moe", "post_expert_norm": True, "post_expert_norm_eps": 1e-5, "post_expert_norm_weight_first": True} | MOE, ("sm100",), ("deepjit",)),
    ({"op": "bf16_mega_moe", "weight_layout": "trtllm"} | MOE, ("sm100",), ("deepjit",)),
    ({"op": "nvfp4_mega_moe"} | MOE, ("sm100",), GENERATIONS),
    ({"op": "nvfp4_mega_moe", "use_x_scales": True} | MOE, ("sm100",), GENERATIONS),
    ({"op": "nvfp4_mega_moe", "activation": "swigluoai"} | MOE | ALPHAS, ("sm100",), GENERATIONS),
    ({"op": "nvfp4_mega_moe", "post_expert_norm": True, "post_expert_norm_weight": False} | MOE | ALPHAS, ("sm100",), ("deepjit",)),
    ({"op": "nvfp4_mega_moe", "weight_layout": "trtllm"} | MOE | ALPHAS, ("sm100",), ("deepjit",)),
    ({"op": "nvfp4_mega_moe", "shared_experts": 1} | MOE, ("sm100",), GENERATIONS),
    ({"op": "fp4_fp4_mega_moe"} | MOE, ("sm100",), ()),  # only vLLM 0.33.0's copy has it, and the CI has no such copy
]  # fmt: skip

#: Pairs whose kernels the CI compiles. Legacy DeepGEMM on SM120 cannot be planned: its flags name the arch by -gencode.
PAIRS = [("sm90", "deepjit"), ("sm90", "legacy"), ("sm100", "deepjit"), ("sm100", "legacy"), ("sm120", "deepjit")]


def ops(arch: str, generation: str) -> list[dict[str, Any]]:
    """The cases for one arch and generation."""
    return [fields for fields, archs, generations in CASES if arch in archs and generation in generations]


def write_manifest(path: Path, arch: str, generation: str) -> Path:
    """A manifest of all cases for one arch and generation."""
    manifest = {"name": "x", "target": {"gpu": GPUS[arch]}, "max_tokens": 16, "ops": ops(arch, generation)}
    path.write_text(json.dumps(manifest, indent=1))  # JSON is YAML without anchors, which a manifest may not have
    return path


def table() -> str:
    """The docs' table: an op a row, a pair a column."""
    runs = json.loads(RUNS.read_text())
    heads = [f"{arch.upper()} {generation}" for arch, generation in PAIRS]
    lines = ["| entry point | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    for name in dict.fromkeys(fields["op"] for fields, _, _ in CASES):
        cells = []
        for arch, generation in PAIRS:
            planned = any(fields["op"] == name for fields in ops(arch, generation))
            run = name in runs.get(f"{arch} {generation}", [])
            cells.append("planned, compiled" * planned + ", run" * run or "–")
        lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


TABLE = "<!-- table: python -m tests.entry_points -->", "<!-- end of table -->"
REASONS = "<!-- reasons: python -m tests.entry_points -->", "<!-- end of reasons -->"


def reasons() -> str:
    """The docs' table of functions that have no op."""
    return "\n".join(["| function | reason |", "|---|---|", *(f"| `{n}` | {why} |" for n, why in WITHOUT_OP.items())])


def with_tables(text: str) -> str:
    """``text`` with new tables between its marks."""
    for (begin, end), content in ((TABLE, table()), (REASONS, reasons())):
        before, rest = text.split(begin)
        text = f"{before}{begin}\n{content}\n{end}{rest.split(end)[1]}"
    return text


if __name__ == "__main__":
    DOCS.write_text(with_tables(DOCS.read_text()))
