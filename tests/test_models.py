"""Derives manifests from models' configs: the shapes of MODEL_SHAPES.md, the engines' rules, and every refusal."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from cachebuilder.authoring.derive.config import Config
from cachebuilder.authoring.derive.derive import Derived, derive
from cachebuilder.authoring.derive.engines import ENGINES
from cachebuilder.authoring.derive.serving import Serving
from cachebuilder.authoring.derive.text import manifest_text
from cachebuilder.cli.main import cli
from cachebuilder.cuda import gpus, toolchain
from cachebuilder.deepgemm import installation as installations
from cachebuilder.errors import ModelError
from cachebuilder.manifest import schema as manifests
from cachebuilder.manifest.inputs import Inputs
from cachebuilder.planning import make as planning

from . import configs

DENSE = "fp8_gemm_nt"
OLDEST = {engine: rules.versions[0] for engine, rules in ENGINES.items()}
CONTIGUOUS = "m_grouped_fp8_gemm_nt_contiguous"
MASKED = "m_grouped_fp8_gemm_nt_masked"


def config_of(tree: dict[str, Any]) -> Config:
    return Config.of(tree, Path("model/config.json"))


def serving_of(engine: str = "vllm", gpu: str = "H200", version: str | None = None, **sizes: Any) -> Serving:
    rules = ENGINES[engine]
    return rules(gpu=gpus.find(gpu), version=rules.release(version), **sizes)


def derived_of(tree: dict[str, Any], engine: str = "vllm", gpu: str = "H200", **sizes: Any) -> Derived:
    return derive(config_of(tree), serving_of(engine, gpu, **sizes))


def dense(derived: Derived) -> set[tuple[int, int]]:
    return {(item.op.n, item.op.k) for item in derived.ops if item.op.op == DENSE}


def experts(derived: Derived, op: str = CONTIGUOUS) -> set[tuple[int, int, int]]:
    return {(item.op.experts, item.op.n, item.op.k) for item in derived.ops if item.op.op == op}


def changed(tree: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {**copy.deepcopy(tree), **fields}


# Whole shapes, and the dimension that tensor parallelism divides: "n", "k" or "" (every rank holds it all). The rows are
# those of MODEL_SHAPES.md; a comment names what a row has more or less than the engines really call.

#: Three shapes of the row are not here, because the fused model does not call them: (576, 7168) is kv_a unfused,
#: (24576, 7168) the q projection of a model without q_lora_rank, and (12288, 7168) belongs to no layer of DeepSeek-V3.
DEEPSEEK_V3_LINEARS = {
    (2112, 7168, ""),
    (24576, 1536, "n"),
    (32768, 512, "n"),
    (7168, 16384, "k"),
    (36864, 7168, "n"),
    (7168, 18432, "k"),
    (4096, 7168, "n"),
    (7168, 2048, "k"),
}
#: The row lacks the shared expert, the indexer's wq_b, and the MTP layer's e_proj and h_proj.
DEEPSEEK_V4_LINEARS = {
    (1536, 4096, ""),
    (32768, 1024, "n"),
    (4096, 8192, "k"),
    (4096, 4096, "n"),
    (4096, 2048, "k"),
    (8192, 1024, ""),
    (4096, 4096, ""),
}
#: (14336, 5120), the fused q, k and v, is divided by heads: 96 and twice 8 of them.
GLM_45_LINEARS = {
    (14336, 5120, "n"),
    (5120, 12288, "k"),
    (24576, 5120, "n"),
    (3072, 5120, "n"),
    (5120, 1536, "k"),
}


def cut(shapes: set[tuple[int, int, str]], ranks: int) -> set[tuple[int, int]]:
    return {(n // ranks if axis == "n" else n, k // ranks if axis == "k" else k) for n, k, axis in shapes}


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
@pytest.mark.parametrize("engine", ["vllm", "sglang"])
class TestModelShapes:
    """The rows of MODEL_SHAPES.md, for each engine, divided by 1, 2, 4 and 8."""

    def test_deepseek_v3(self, engine: str, tp: int) -> None:
        derived = derived_of(configs.DEEPSEEK_V3, engine, tp=tp)
        if engine == "sglang":  # the shared expert is the 257th routed one there
            assert dense(derived) == cut(DEEPSEEK_V3_LINEARS - {(4096, 7168, "n"), (7168, 2048, "k")}, tp) | (
                {(7168, 2048)} if tp == 8 else set()  # o_proj, cut, has the shared expert's shape
            )
        else:
            assert dense(derived) == cut(DEEPSEEK_V3_LINEARS, tp)
        count = 257 if engine == "sglang" else 256
        assert experts(derived) == {(count, 4096 // tp, 7168), (count, 7168, 2048 // tp)}
        assert {item.op.topk for item in derived.ops if item.op.op == CONTIGUOUS} == {9 if engine == "sglang" else 8}

    def test_deepseek_v3_with_expert_parallelism(self, engine: str, tp: int) -> None:
        derived = derived_of(configs.DEEPSEEK_V3, engine, tp=tp, ep=tp, moe_deep_gemm=True)
        count, shared = (257, set()) if engine == "sglang" and tp == 1 else (256 // tp, {(4096 // tp, 7168)})
        assert shared <= dense(derived)
        assert experts(derived) == {(count, 4096, 7168), (count, 7168, 2048)}

    def test_deepseek_v32_adds_the_indexer_s_query_projection(self, engine: str, tp: int) -> None:
        derived = derived_of(configs.DEEPSEEK_V32, engine, tp=tp)
        indexer = {(8192, 1536, "")} | ({(128, 7168, "")} if engine == "sglang" else set())  # wq_b; SGLang's wk
        assert dense(derived) == cut(DEEPSEEK_V3_LINEARS | indexer, tp)
        assert experts(derived) == {(256, 4096 // tp, 7168), (256, 7168, 2048 // tp)}
        assert "get_paged_mqa_logits_metadata" in {item.op.op for item in derived.ops}

    def test_deepseek_v4_flash(self, engine: str, tp: int) -> None:
        derived = derived_of(configs.DEEPSEEK_V4_FLASH, engine, tp=tp)
        assert dense(derived) == cut(DEEPSEEK_V4_LINEARS, tp)
        assert not experts(derived)
        left_out = " ".join(item.what for item in derived.left_out)
        [einsum] = (item.op for item in derived.ops if item.op.op == "fp8_einsum")
        assert (einsum.h, einsum.d, einsum.r) == (8 // tp, 1024, 4096)
        first = [(24, 4096)] if engine == "vllm" else []  # the first layer's streams are equal
        assert [(i.op.n, i.op.k) for i in derived.ops if i.op.op == "tf32_hc_prenorm_gemm"] == [(24, 16384), *first]
        assert "256 of MXFP4 weights" in left_out

    def test_deepseek_v4_with_fp8_experts(self, engine: str, tp: int) -> None:
        tree = changed(configs.DEEPSEEK_V4_FLASH, expert_dtype="fp8")
        assert experts(derived_of(tree, engine, tp=tp)) == {(256, 4096 // tp, 4096), (256, 4096, 2048 // tp)}

    def test_qwen3_235b(self, engine: str, tp: int) -> None:
        if tp == 8:  # 1536 / 8 = 192 is no multiple of the checkpoint's block
            with pytest.raises(ModelError, match=r"multiple of 128.* 1536 / 8 = 192"):
                derive(config_of(configs.QWEN3_235B), serving_of(engine, version=OLDEST[engine], tp=tp))
            # Of 4 K and V heads on 8 ranks each has a copy of one: 8 + 2 heads of 128, not 9216 / 8.
            derived = derived_of(configs.QWEN3_235B, engine, tp=tp, moe_deep_gemm=False)
            assert dense(derived) == {(1280, 4096), (4096, 1024)}
            return
        derived = derived_of(configs.QWEN3_235B, engine, tp=tp)
        assert dense(derived) == {(9216 // tp, 4096), (4096, 8192 // tp)}
        assert experts(derived) == {(128, 3072 // tp, 4096), (128, 4096, 1536 // tp)}

    def test_qwen3_30b(self, engine: str, tp: int) -> None:
        if tp >= 4:  # 768 / 4 = 192, 768 / 8 = 96
            with pytest.raises(ModelError, match=f"768 / {tp} = {768 // tp}"):
                derive(config_of(configs.QWEN3_30B), serving_of(engine, version=OLDEST[engine], tp=tp))
            by_experts = derived_of(configs.QWEN3_30B, engine, tp=tp, ep=tp)
            assert experts(by_experts) == {(128 // tp, 1536, 2048), (128 // tp, 2048, 768)}
            return
        derived = derived_of(configs.QWEN3_30B, engine, tp=tp)
        assert dense(derived) == {(5120 // tp, 2048), (2048, 4096 // tp)}
        assert experts(derived) == {(128, 1536 // tp, 2048), (128, 2048, 768 // tp)}

    def test_glm_45(self, engine: str, tp: int) -> None:
        if tp == 8:  # the shared expert's and the routed experts' 1536 / 8 = 192
            with pytest.raises(ModelError, match=r"1536 / 8 = 192"):
                derived_of(configs.GLM_45, engine, tp=tp)
            return
        derived = derived_of(configs.GLM_45, engine, tp=tp)
        fused = engine == "sglang"  # the shared expert, as the 161st routed one
        shared = {(3072, 5120, "n"), (5120, 1536, "k")} if fused else set()
        assert dense(derived) == cut(GLM_45_LINEARS - shared, tp)
        count = 161 if fused else 160
        assert experts(derived) == {(count, 3072 // tp, 5120), (count, 5120, 1536 // tp)}


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_vllm_s_mega_moe_runs_the_router_and_the_shared_expert_of_deepseek_v4(tp: int) -> None:
    derived = derived_of(configs.DEEPSEEK_V4_FLASH, "vllm", "B200", tp=tp, ep=tp, mega_moe=True)
    shared_expert = {(4096, 4096, "n"), (4096, 2048, "k")}
    assert dense(derived) == cut(DEEPSEEK_V4_LINEARS - shared_expert, tp)
    [layer] = (item.op for item in derived.ops if item.op.op == "fp8_fp4_mega_moe")
    assert (layer.ranks, layer.experts, layer.topk, layer.hidden, layer.intermediate) == (tp, 256, 6, 4096, 2048)
    assert (layer.shared_experts, layer.activation_clamp, layer.max_tokens) == (1, 10.0, None)
    gates = [(item.op.bias, item.op.hashed) for item in derived.ops if item.op.op == "bf16_mega_gate"]
    assert gates == [(True, None), (False, True)]
    assert not derived.left_out


def test_kimi_k2_is_deepseek_s_layers_with_its_own_numbers() -> None:
    derived = derived_of(configs.KIMI_K2, tp=8, ep=8)
    assert {(2112, 7168), (1536, 1536), (2048, 512), (7168, 1024)} <= dense(derived)
    assert experts(derived) == {(48, 4096, 7168), (48, 7168, 2048)}


def test_qwen3_next_has_gated_attention_and_gated_delta_net_layers() -> None:
    derived = derived_of(configs.QWEN3_NEXT, tp=2)
    # Query and gate of 16 heads of 256, K and V of 2; the delta net's q and k of 2048, v and z of 4096.
    assert {((2 * 4096 + 2 * 512) // 2, 2048), (2048, 2048), (12288 // 2, 2048)} <= dense(derived)
    assert experts(derived) == {(512, 512, 2048), (512, 2048, 256)}
    texts = " ".join(line for item in derived.ops for line in item.serves)
    assert "self_attn.qkv_proj, layers 3, 7, 11, …, 43, 47:" in texts


def test_sglang_fuses_glm_5_s_shared_expert_where_each_rank_has_all_experts() -> None:
    glm = changed(configs.DEEPSEEK_V32, architectures=["GlmMoeDsaForCausalLM"])
    alone = derived_of(glm, "sglang", tp=4)
    assert experts(alone) == {(257, 1024, 7168), (257, 7168, 512)} and (1024, 7168) not in dense(alone)
    spread = derived_of(glm, "sglang", tp=8, ep=8)
    assert experts(spread) == {(32, 4096, 7168), (32, 7168, 2048)} and (512, 7168) in dense(spread)


@pytest.mark.parametrize(("ep", "count"), [(1, 513), (2, 257)])
def test_sglang_fuses_qwen3_next_s_shared_expert_on_every_rank(ep: int, count: int) -> None:
    derived = derived_of(configs.QWEN3_NEXT, "sglang", tp=2, ep=ep)
    width = 512 // (2 // ep)
    assert experts(derived) == {(count, 2 * width, 2048), (count, 2048, width)}
    assert {item.op.topk for item in derived.ops if item.op.op == CONTIGUOUS} == {11}
    assert not any("shared_expert." in text for item in derived.ops for text in item.serves)
    wider = derived_of(changed(configs.QWEN3_NEXT, shared_expert_intermediate_size=1024), "sglang", tp=2, ep=ep)
    assert {shape[0] for shape in experts(wider)} == {512 // ep} and (1024, 2048) in dense(wider)


@pytest.mark.parametrize(("gpu", "half"), [("H200", 72), ("B200", 80)])
def test_sglang_projects_the_indexer_s_queries_on_half_of_the_sms_too(gpu: str, half: int) -> None:
    def projections(tree: dict[str, Any], engine: str = "sglang", **sizes: int) -> list[tuple[int, Any]]:
        ops = [item.op for item in derived_of(tree, engine, gpu, tp=8, ep=8, **sizes).ops]
        return [(op.max_tokens, op.sm_counts) for op in ops if op.op == "fp8_gemm_nt" and op.n == 8192]

    assert projections(configs.DEEPSEEK_V32) == [(None, None), (1024, [half])]
    assert projections(configs.DEEPSEEK_V32, "vllm") == [(None, None)]
    assert projections(configs.DEEPSEEK_V4_FLASH) == [(None, None)], "its indexer is another"
    kept = {**configs.BLOCK_FP8, "modules_to_not_convert": ["indexer.wq_b"]}
    assert not projections(changed(configs.DEEPSEEK_V32, quantization_config=kept))


def test_sglang_projects_the_indexer_s_keys_apart_unless_rotary_embedding_is_interleaved() -> None:
    def keys(**fields: Any) -> bool:
        return (128, 7168) in dense(derived_of(changed(configs.DEEPSEEK_V32, **fields), "sglang", tp=8, ep=8))

    assert keys() and keys(indexer_rope_interleave=False)
    assert not keys(indexer_rope_interleave=True)
    assert not keys(quantization_config={**configs.BLOCK_FP8, "modules_to_not_convert": ["indexer.wk"]})


@pytest.mark.parametrize(
    ("gpu", "batches"), [("H200", {(4096, 1)}), ("B200", {(4096, 1), (1024, 2), (1024, 4)})], ids=["sm90", "sm100"]
)
def test_sglang_s_indexer_decodes_as_many_rows_as_it_drafts(gpu: str, batches: set[tuple[int, int]]) -> None:
    ops = [item.op for item in derived_of(configs.DEEPSEEK_V32, "sglang", gpu, tp=8, ep=8, max_seqs=1024).ops]
    for name in ("get_paged_mqa_logits_metadata", "fp8_paged_mqa_logits"):
        assert {(op.max_batch, op.next_n) for op in ops if op.op == name} == batches


def test_sglang_s_v4_indexer_has_compressed_logits() -> None:
    def forms(tree: dict[str, Any]) -> list[Any]:
        return [item.op.compressed for item in derived_of(tree, "sglang").ops if item.op.op == "fp8_mqa_logits"]

    assert forms(configs.DEEPSEEK_V4_FLASH) == [True] and forms(configs.DEEPSEEK_V32) == [None]


@pytest.mark.parametrize("tree", [configs.DEEPSEEK_V3, configs.DEEPSEEK_V32], ids=["v3", "v3.2"])
def test_sglang_projects_128_ki_tokens_of_the_cache_at_once(tree: dict[str, Any]) -> None:
    ops = [item.op for item in derived_of(tree, "sglang", tp=8, ep=8).ops]
    assert [op.max_tokens for op in ops if op.op == "fp8_gemm_nt" and op.k == 512] == [128 * 1024]


def test_what_sglang_s_ranks_share_sees_the_tokens_of_all_dp_groups() -> None:
    assert serving_of("sglang", tp=8, ep=8, dp=8, max_tokens=65536).largest_m == 65536
    assert serving_of("sglang", tp=8, ep=8, dp=8, max_tokens=8192).largest_m == 16384


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_scales_of_v4_s_grouped_output_are_transformed_at_load_on_blackwell(engine: str) -> None:
    def transforms(gpu: str) -> list[tuple[Any, ...]]:
        ops = [item.op for item in derived_of(configs.DEEPSEEK_V4_FLASH, engine, gpu, tp=4).ops]
        return [(op.k, op.recipe, op.groups, op.rows) for op in ops if op.op == "transform_sf_into_required_layout"]

    assert transforms("B200") == [(4096, [128, 128], 2, 1024)] and transforms("H200") == []


def test_sglang_leaves_an_sm_to_receiving_while_a_pipeline_stage_indexes() -> None:
    def logits(pp: int) -> dict[str, Any]:
        ops = [item.op for item in derived_of(configs.DEEPSEEK_V32, "sglang", tp=8, ep=8, pp=pp).ops]
        return {op.op: op.sm_counts for op in ops if "logits" in op.op}

    assert set(logits(1).values()) == {None}
    assert logits(2) == {**logits(1), "fp8_mqa_logits": [131, 132]}


def test_a_comment_above_each_op_gives_the_arithmetic_of_its_shape() -> None:
    derived = derived_of(configs.DEEPSEEK_V3, tp=8, ep=8)
    lines = {line.partition(",")[0]: line for item in derived.ops for line in item.serves}
    assert lines["self_attn.q_b_proj"] == (
        "self_attn.q_b_proj, layers 0–61: N = num_attention_heads 128 · (qk_nope_head_dim 128 + qk_rope_head_dim 64) "
        "= 24576 / 8 ranks = 3072; K = q_lora_rank 1536"
    )
    assert lines["mlp.down_proj"] == (
        "mlp.down_proj, layers 0–2: N = hidden_size 7168; K = intermediate_size 18432 / 8 ranks = 2304"
    )
    assert lines["mlp.experts w13 (gate and up)"] == (
        "mlp.experts w13 (gate and up), layers 3–61: n_routed_experts 256 / ep 8 = 32; "
        "N = 2 · moe_intermediate_size 2048 = 4096; K = hidden_size 7168"
    )


def test_an_unknown_decoder_says_what_the_config_leaves_open() -> None:
    derived = derived_of(configs.UNKNOWN)
    assert dense(derived) == {(6144, 4096), (4096, 4096), (24576, 4096), (4096, 12288)}
    assert any("SomethingNewForCausalLM has no rule of its own" in text for text in derived.unknown)
    assert "# Not known:" in manifest_text(config_of(configs.UNKNOWN), serving_of(), derived)


@pytest.mark.parametrize(
    ("gpu", "version", "paged"),
    [
        pytest.param("B200", "0.33.0", [(2048, 1, True)], id="each-row-by-itself"),
        pytest.param("B200", "0.32.0", [(1024, 1, None), (1024, 2, None)], id="before-that"),
        pytest.param("H200", "0.33.0", [(1024, 1, None), (1024, 2, None)], id="not-on-sm90"),
    ],
)
def test_vllm_decodes_with_rows_of_their_own_on_sm100(
    gpu: str, version: str, paged: list[tuple[int, int, bool | None]]
) -> None:
    derived = derive(config_of(configs.DEEPSEEK_V32), serving_of("vllm", gpu, version, tp=8))
    for name in ("fp8_fp4_paged_mqa_logits", "get_paged_mqa_logits_metadata"):
        ops: list[Any] = [item.op for item in derived.ops if item.op.op == name]
        assert [(op.max_batch, op.next_n, op.varlen) for op in ops] == paged


class TestLargestM:
    """Up to which M each engine calls."""

    def test_vllm_takes_the_batch_and_the_tokens_of_all_replicas_for_experts(self) -> None:
        derived = derived_of(configs.DEEPSEEK_V3, tp=8, ep=16, dp=2, max_tokens=4096)
        assert serving_of(max_tokens=4096).largest_m == 4096
        assert {item.op.max_tokens for item in derived.ops if item.op.op == CONTIGUOUS} == {8192}
        # Tokens are spread over the tensor parallel ranks: each holds the whole shared expert.
        assert {(4096, 7168), (7168, 2048)} <= dense(derived)

    def test_vllm_calls_kv_b_for_the_chunked_context_too(self) -> None:
        derived = derived_of(configs.DEEPSEEK_V3, tp=8, max_model_len=1000, max_seqs=16)
        (kv_b,) = (item for item in derived.ops if (item.op.op, item.op.k) == (DENSE, 512))
        assert kv_b.op.max_tokens is None  # 8 · 1000 is less than the batch
        (kv_b,) = (
            item for item in derived_of(configs.DEEPSEEK_V3, tp=8).ops if (item.op.op, item.op.k) == (DENSE, 512)
        )
        assert kv_b.op.max_tokens == 64 * 1024

    @pytest.mark.parametrize(
        ("tree", "sizes", "message"),
        [
            pytest.param({}, {"gpu": "H200"}, "wanted vLLM 0.33.0 on an SM100 GPU, found 0.33.0 on H200", id="sm90"),
            pytest.param({}, {"version": "0.32.0"}, "found 0.32.0 on B200", id="an-older-engine"),
            pytest.param({}, {"ep": 1}, r"--ep 8 \(tp · dp\), found 1", id="no-expert-parallelism"),
            pytest.param(
                {"n_routed_experts": 254}, {}, "254 a multiple of the 8 ranks", id="experts-that-do-not-divide"
            ),
            pytest.param({"expert_dtype": "fp8"}, {}, "wanted DeepSeek V4 with experts in MXFP4", id="fp8-experts"),
            pytest.param(
                {"swiglu_limit": "ten"}, {}, "swiglu_limit: wanted a number above 0, found 'ten'", id="no-limit"
            ),
        ],
    )
    def test_mega_moe_where_vllm_does_not_run_it_is_refused(
        self, tree: dict[str, Any], sizes: dict[str, Any], message: str
    ) -> None:
        with pytest.raises(ModelError, match=message):
            derived_of(
                changed(configs.DEEPSEEK_V4_FLASH, **tree),
                **({"gpu": "B200", "tp": 8, "ep": 8, "mega_moe": True} | sizes),
            )

    def test_mega_moe_with_pipeline_stages_keeps_the_shared_expert_apart(self) -> None:
        derived = derived_of(configs.DEEPSEEK_V4_FLASH, gpu="B200", tp=2, ep=2, pp=2, mega_moe=True)
        [layer] = (item.op for item in derived.ops if item.op.op == "fp8_fp4_mega_moe")
        assert layer.shared_experts is None and (2048, 4096) in dense(derived)

    def test_hash_layers_are_those_that_the_config_names(self) -> None:
        def gates(**fields: Any) -> list[bool | None]:
            derived = derived_of(changed(configs.DEEPSEEK_V4_FLASH, **fields), gpu="B200", mega_moe=True)
            return [item.op.hashed for item in derived.ops if item.op.op == "bf16_mega_gate"]

        assert gates(num_hash_layers=0) == [None]
        assert gates(mlp_layer_types=["moe"] * 43) == [None]
        assert gates(mlp_layer_types=["hash_moe"] + ["moe"] * 42) == [None, True]

    def test_v4_s_mtp_projection_takes_a_row_for_each_stream(self) -> None:
        derived = derived_of(configs.DEEPSEEK_V4_FLASH, tp=8, max_tokens=1000)
        (projection,) = (
            item.op for item in derived.ops if item.op.op == DENSE and (item.op.n, item.op.k) == (4096, 4096)
        )
        assert projection.max_tokens == 4 * 1000

    def test_vllm_low_latency_reserves_rows_for_each_dispatching_rank(self) -> None:
        derived = derived_of(configs.DEEPSEEK_V3, tp=1, ep=32, dp=32, max_tokens=256, low_latency=True)
        assert experts(derived, MASKED) == {(8, 4096, 7168), (8, 7168, 2048)}
        assert not experts(derived)
        assert {item.op.max_m for item in derived.ops if item.op.op == MASKED} == {256 * 32}

    @pytest.mark.parametrize(("chunk", "dp", "largest"), [(4096, 1, 16384), (16384, 1, 32768), (16384, 8, 16384)])
    def test_sglang_goes_to_the_end_of_its_own_list(self, chunk: int, dp: int, largest: int) -> None:
        assert serving_of("sglang", tp=8, dp=dp, max_tokens=chunk).largest_m == largest

    def test_sglang_runs_experts_in_both_layouts(self) -> None:
        derived = derived_of(configs.QWEN3_235B, "sglang", tp=4)
        assert experts(derived) == experts(derived, MASKED)


def mega_moe(tree: dict[str, Any], gpu: str = "H200", tp: int = 8, **sizes: Any) -> Derived:
    return derived_of(tree, "sglang", gpu, **({"tp": tp, "ep": tp, "mega_moe": True} | sizes))


class TestMegaMoeOfSglang:
    """``--moe-a2a-backend megamoe`` of SGLang 0.5.23."""

    @pytest.mark.parametrize(
        ("tree", "sizes"),
        [
            pytest.param(configs.DEEPSEEK_V3, (256, 8, 7168, 2048), id="deepseek-v3"),
            pytest.param(configs.DEEPSEEK_V32, (256, 8, 7168, 2048), id="deepseek-v3.2"),
            pytest.param(
                changed(configs.DEEPSEEK_V32, architectures=["GlmMoeDsaForCausalLM"]), (256, 8, 7168, 2048), id="glm-5"
            ),
            pytest.param(configs.KIMI_K2, (384, 8, 7168, 2048), id="kimi-k2"),
            pytest.param(configs.QWEN3_235B, (128, 8, 4096, 1536), id="qwen3-235b"),
            pytest.param(configs.QWEN3_NEXT, (512, 10, 2048, 512), id="qwen3-next"),
        ],
    )
    def test_fp8_experts_on_sm90_at_all_sms(self, tree: dict[str, Any], sizes: tuple[int, ...]) -> None:
        tp = 2 if tree is configs.QWEN3_NEXT else 8
        derived = mega_moe(tree, tp=tp)
        ops = [item.op for item in derived.ops if "mega_moe" in item.op.op]
        assert [op.op for op in ops] == ["mega_moe_pre_dispatch_sm90", "fp8_mega_moe"]
        for op in ops:
            assert (op.experts, op.topk, op.hidden, op.intermediate) == sizes
            assert (op.ranks, op.max_tokens, op.activation_clamp, op.sm_counts) == (tp, 8192, None, None)
        assert not experts(derived) and not experts(derived, MASKED)

    def test_each_rank_has_the_whole_shared_expert_on_sm90(self) -> None:
        assert {(4096, 7168), (7168, 2048)} <= dense(mega_moe(configs.DEEPSEEK_V3))

    def test_mxfp4_experts_on_sm100_with_two_sms_free_and_the_shared_expert_in_the_kernel(self) -> None:
        derived = mega_moe(configs.DEEPSEEK_V4_FLASH, "B200")
        ops = [item.op for item in derived.ops if "mega" in item.op.op]
        assert [op.op for op in ops] == ["fp8_fp4_mega_moe"], "pre-dispatch and router are SGLang's own kernels"
        [op] = ops
        assert (op.ranks, op.experts, op.topk, op.hidden, op.intermediate) == (8, 256, 6, 4096, 2048)
        assert (op.shared_experts, op.activation_clamp, op.max_tokens, op.sm_counts) == (1, 10.0, 8192, [146])
        assert (4096, 2048) not in dense(derived)
        assert [item.op for item in derived.ops if item.op.sm_counts] == [op]
        assert not derived.left_out

    def test_an_odd_number_of_sms_becomes_an_even_one(self) -> None:
        gpu = gpus.find("B200").model_copy(update={"sm_count": 147})
        serving = ENGINES["sglang"](gpu=gpu, version="0.5.23", tp=8, ep=8, mega_moe=True)
        derived = derive(config_of(configs.DEEPSEEK_V4_FLASH), serving)
        assert [item.op.sm_counts for item in derived.ops if item.op.op == "fp8_fp4_mega_moe"] == [[144]]

    def test_scales_of_the_weights_that_mega_moe_reads_are_transformed_at_load(self) -> None:
        transforms = [
            (op.k, op.recipe, op.groups, op.rows)
            for item in mega_moe(configs.DEEPSEEK_V4_FLASH, "B200").ops
            if (op := item.op).op == "transform_sf_into_required_layout"
        ]
        assert transforms == [
            (4096, [128, 128], 1, 1024),
            (4096, [1, 32], 32, 4096),
            (2048, [1, 32], 32, 4096),
            (4096, [128, 32], None, 4096),
            (2048, [128, 32], None, 4096),
        ]

    def test_v4_with_fp8_experts_is_limited_on_sm90(self) -> None:
        derived = mega_moe(changed(configs.DEEPSEEK_V4_FLASH, expert_dtype="fp8"))
        clamps = [item.op.activation_clamp for item in derived.ops if "mega_moe" in item.op.op]
        assert clamps == [None, 10.0], "the pre-dispatch knows no limit"
        assert {(4096, 4096), (4096, 2048)} <= dense(derived), "the shared expert is apart, and whole"

    def test_steps_beyond_the_buffer_go_elsewhere_and_are_named(self) -> None:
        assert not any("8192 tokens a rank" in item.what for item in mega_moe(configs.DEEPSEEK_V3).left_out)
        derived = mega_moe(configs.DEEPSEEK_V3, max_tokens=16384)
        assert any("more than 8192 tokens a rank" in item.what for item in derived.left_out)
        assert not mega_moe(configs.QWEN3_235B, max_tokens=16384, dp=2).left_out

    def test_layers_whose_experts_are_not_quantised_are_left_out(self) -> None:
        kept = {**configs.BLOCK_FP8, "modules_to_not_convert": ["model.layers.61.mlp.experts"]}
        derived = mega_moe(changed(configs.DEEPSEEK_V3, quantization_config=kept))
        assert any("layers 3–60" in text for item in derived.ops for text in item.serves if "ranks" in text)
        assert any("mlp.experts in layers 61" in item.what for item in derived.left_out)

    @pytest.mark.parametrize(
        ("tree", "sizes", "message"),
        [
            pytest.param(configs.GLM_45, {}, "found Glm4MoeForCausalLM, whose MoE block does not", id="glm-4.5"),
            pytest.param(configs.UNKNOWN, {}, "found SomethingNewForCausalLM", id="no-known-family"),
            pytest.param(
                configs.DEEPSEEK_V3,
                {"gpu": "B200"},
                "MXFP4, which SGLang 0.5.23 runs .* B200, found experts in FP8",
                id="sm100",
            ),
            pytest.param(
                configs.DEEPSEEK_V4_FLASH,
                {},
                "FP8, which SGLang 0.5.23 runs .* H200, found experts in MXFP4",
                id="sm90",
            ),
            pytest.param(configs.DEEPSEEK_V3, {"gpu": "RTX-PRO-6000"}, "wanted an SM90 or SM100 GPU", id="sm120"),
            pytest.param(configs.DEEPSEEK_V3, {"ep": 1}, "wanted --ep 8, found 1", id="no-expert-parallelism"),
            pytest.param(configs.QWEN3_NEXT, {"tp": 1, "ep": 1}, "wanted --tp above 1, found 1", id="one-rank"),
            pytest.param(configs.DEEPSEEK_V3, {"low_latency": True}, "wanted no --low-latency", id="two-backends"),
            pytest.param(
                configs.QWEN3_235B, {"max_tokens": 16384}, "at most 8192 tokens a rank, found 16384", id="chunk"
            ),
            pytest.param(
                changed(configs.DEEPSEEK_V3, n_routed_experts=254), {}, "254 a multiple of the 8 ranks", id="experts"
            ),
            pytest.param(
                changed(configs.DEEPSEEK_V4_FLASH, hidden_size=4352),
                {"gpu": "B200"},
                "hidden_size a multiple of 512, found 4352",
                id="hidden-size",
            ),
            pytest.param(
                changed(configs.DEEPSEEK_V3, first_k_dense_replace=62), {}, "wanted a layer with the", id="no-experts"
            ),
        ],
    )
    def test_what_sglang_does_not_run_this_way_is_refused(
        self, tree: dict[str, Any], sizes: dict[str, Any], message: str
    ) -> None:
        with pytest.raises(ModelError, match=message):
            mega_moe(tree, **sizes)

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("tree", "gpu", "kernel", "sms"),
        [
            pytest.param(configs.DEEPSEEK_V3, "H200", "sm90_fp8_mega_moe", 132, id="sm90"),
            pytest.param(configs.DEEPSEEK_V4_FLASH, "B200", "sm100_fp8_fp4_mega_moe", 146, id="sm100"),
        ],
    )
    def test_its_layer_is_planned_at_the_sm_count_that_sglang_sets(
        self, tree: dict[str, Any], gpu: str, kernel: str, sms: int
    ) -> None:
        config, serving = config_of(tree), serving_of("sglang", gpu, tp=8, ep=8, mega_moe=True)
        whole = manifests.parse(manifest_text(config, serving, derive(config, serving)).encode())
        ops = [op for op in whole.ops if "mega_moe" in op.op or "transform" in op.op]
        plan = planning.make(Inputs(whole.model_copy(update={"ops": ops}), b"", toolchain.find(), installations.find()))
        layers = [one for one in plan.kernels if one.name == kernel]
        assert layers and all({s.sm_count for s in one.selected_by} == {sms} for one in layers)
        assert all(f" {sms}, " in one.source for one in layers)


class TestRefusals:
    """A model that the engine would not serve with DeepGEMM is refused, with the reason."""

    @pytest.mark.parametrize(
        ("quantization", "reason"),
        [
            pytest.param(None, "its weights are not quantised", id="bf16"),
            pytest.param({"quant_method": "fp8"}, "one scale a tensor", id="fp8 per tensor"),
            pytest.param(
                {"quant_method": "fp8", "weight_block_size": [32, 32]}, r"each block of \[32, 32\]", id="other block"
            ),
            pytest.param(
                {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "static"},
                "static scales",
                id="static activations",
            ),
            pytest.param({"quant_method": "awq", "bits": 4}, "quant_method is 'awq'", id="awq"),
            pytest.param({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "'modelopt'", id="nvfp4"),
            pytest.param(
                # Kimi-K2-Thinking's form: INT4 experts, the rest unquantised.
                {
                    "quant_method": "compressed-tensors",
                    "format": "pack-quantized",
                    "config_groups": {
                        "group_0": {
                            "targets": ["Linear"],
                            "weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32},
                        }
                    },
                },
                "INT4",
                id="int4 experts",
            ),
            pytest.param(
                {
                    "quant_method": "compressed-tensors",
                    "config_groups": {
                        "group_0": {
                            "targets": ["Linear"],
                            "weights": {"num_bits": 8, "type": "float", "strategy": "channel"},
                            "input_activations": {"dynamic": True, "strategy": "token"},
                        }
                    },
                },
                "one for each channel",
                id="compressed-tensors by channel",
            ),
        ],
    )
    def test_of_another_quantisation(self, quantization: dict[str, Any] | None, reason: str) -> None:
        tree = changed(configs.GLM_45, quantization_config=quantization)
        with pytest.raises(ModelError, match=reason) as caught:
            derived_of(tree)
        assert "wanted FP8 weights" in str(caught.value)

    def test_not_of_compressed_tensors_by_block(self) -> None:
        group = {
            "targets": ["Linear"],
            "weights": {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [128, 128]},
            "input_activations": {"dynamic": True, "strategy": "group", "group_size": 128},
        }
        tree = changed(
            configs.QWEN3_30B,
            quantization_config={
                "quant_method": "compressed-tensors",
                "config_groups": {"group_0": group},
                "ignore": ["lm_head", r"re:.*mlp\.gate$"],
            },
        )
        assert dense(derived_of(tree)) == dense(derived_of(configs.QWEN3_30B))

    def test_of_heads_that_the_ranks_do_not_divide(self) -> None:
        with pytest.raises(ModelError, match=r"128.*wanted a multiple of the 3 ranks"):
            derived_of(configs.DEEPSEEK_V3, tp=3)

    def test_of_a_k_that_is_cut_within_a_block(self) -> None:
        tree = changed(configs.DEEPSEEK_V4_FLASH, o_lora_rank=80)
        with pytest.raises(ModelError, match=r"attn\.wo_b: wanted K .* 128, .* 640 / 2 = 320"):
            derived_of(tree, tp=2)

    def test_of_an_n_that_is_cut_within_a_block(self) -> None:
        with pytest.raises(ModelError, match=r"mlp\.gate_proj: wanted N .* 128, .* 12352 / 2 = 6176"):
            derived_of(changed(configs.UNKNOWN, intermediate_size=12352), "sglang", tp=2)
        # vLLM does not check the N of layers that fuse several weights, but the K of the next layer.
        with pytest.raises(ModelError, match=r"mlp\.down_proj: wanted K .* 128, .* 12352 / 2 = 6176"):
            derived_of(changed(configs.UNKNOWN, intermediate_size=12352), "vllm", tp=2)

    def test_of_ranks_that_the_engine_does_not_have(self) -> None:
        with pytest.raises(ModelError, match="wanted --ep 8 or 1, found 4"):
            derived_of(configs.DEEPSEEK_V3, tp=8, ep=4)
        with pytest.raises(ModelError, match="wanted --dp to divide --tp, found 3"):
            derived_of(configs.DEEPSEEK_V3, "sglang", tp=8, dp=3)

    def test_of_a_model_that_vllm_switches_off_on_blackwell(self) -> None:
        tree = changed(configs.UNKNOWN, model_type="qwen3_5_text")
        assert dense(derived_of(tree, gpu="H200"))
        with pytest.raises(ModelError, match="does not use DeepGEMM for qwen3_5_text on B200"):
            derived_of(tree, gpu="B200")

    def test_of_a_missing_field(self) -> None:
        tree = changed(configs.DEEPSEEK_V3)
        del tree["v_head_dim"]
        with pytest.raises(ModelError, match="v_head_dim: missing"):
            derived_of(tree)

    @pytest.mark.parametrize("value", ["7168", 0, -1, 7168.0, True, [7168]])
    def test_of_a_field_that_is_no_number(self, value: object) -> None:
        with pytest.raises(ModelError, match="hidden_size: wanted an integer from 1 to "):
            derived_of(changed(configs.DEEPSEEK_V3, hidden_size=value))

    @pytest.mark.parametrize("text", ["", "[]", "{", '{"architectures": "X"}', "\0"])
    def test_of_a_file_that_is_no_config(self, tmp_path: Path, text: str) -> None:
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ModelError, match=r"config\.json"):
            Config.read(tmp_path)

    def test_of_more_layers_than_fit_into_memory(self) -> None:
        with pytest.raises(ModelError, match=r"num_hidden_layers: wanted an integer from 1 to 4096, found 1073741824"):
            derived_of(changed(configs.DEEPSEEK_V3, num_hidden_layers=1 << 30))

    def test_of_sizes_that_no_op_can_have(self) -> None:
        with pytest.raises(ModelError, match=r"config\.json: Fp8GemmNt: n: wanted less than or equal to 1048576"):
            derived_of(changed(configs.DEEPSEEK_V3, intermediate_size=1 << 28))
        with pytest.raises(ModelError, match="max_batch: wanted less than"):
            derive(config_of(configs.DEEPSEEK_V32), serving_of(tp=8, max_seqs=1 << 20))

    def test_of_a_release_that_was_not_read(self) -> None:
        with pytest.raises(ModelError, match=r"from 0\.25\.0 on, found 0\.11\.0"):
            serving_of(version="0.11.0")


class TestUnconverted:
    """Layers that the checkpoint keeps unquantised are left out, and named."""

    def test_one_layer(self) -> None:
        names = [f"model.layers.0.mlp.{name}_proj" for name in ("gate", "up", "down")]
        tree = changed(configs.UNKNOWN, quantization_config={**configs.BLOCK_FP8, "modules_to_not_convert": names})
        derived = derived_of(tree)
        assert dense(derived) == dense(derived_of(configs.UNKNOWN))
        assert any(item.what == "mlp.gate_up_proj in layers 0" for item in derived.left_out)
        assert any("mlp.gate_up_proj, layers 1–31" in line for item in derived.ops for line in item.serves)

    def test_all_layers(self) -> None:
        names = [f"model.layers.{layer}.self_attn.o_proj" for layer in range(32)]
        tree = changed(configs.UNKNOWN, quantization_config={**configs.BLOCK_FP8, "modules_to_not_convert": names})
        assert (4096, 4096) not in dense(derived_of(tree))

    def test_half_of_a_fused_layer_is_refused(self) -> None:
        names = ["model.layers.7.self_attn.q_proj"]
        tree = changed(configs.UNKNOWN, quantization_config={**configs.BLOCK_FP8, "modules_to_not_convert": names})
        with pytest.raises(ModelError, match=r"layer 7's self_attn\.qkv_proj is fused"):
            derived_of(tree)

    def test_sglang_reads_parts_of_names_and_vllm_whole_ones(self) -> None:
        tree = changed(configs.UNKNOWN, quantization_config={**configs.BLOCK_FP8, "modules_to_not_convert": ["o_proj"]})
        assert (4096, 4096) in dense(derived_of(tree, "vllm"))
        assert (4096, 4096) not in dense(derived_of(tree, "sglang"))


MODELS = {name: tree for name, tree in vars(configs).items() if isinstance(tree, dict) and "architectures" in tree}


@pytest.mark.parametrize("gpu", ["H200", "B200"])
@pytest.mark.parametrize("engine", ["vllm", "sglang"])
@pytest.mark.parametrize("name", MODELS)
def test_a_written_manifest_reads_back_as_the_ops_that_were_derived(name: str, engine: str, gpu: str) -> None:
    config, serving = config_of(MODELS[name]), serving_of(engine, gpu, tp=2)
    derived = derive(config, serving)
    text = manifest_text(config, serving, derived)
    read = manifests.parse(text.encode())
    assert read.target.gpu == serving.gpu
    assert read.max_tokens == serving.largest_m
    for item, op in zip(derived.ops, read.ops, strict=True):
        fields = item.op.model_dump(exclude_none=True)
        if "max_tokens" in type(op).model_fields:
            fields.setdefault("max_tokens", read.max_tokens)
        assert op.model_dump(exclude_none=True) == fields
    assert manifest_text(config, serving, derived) == text
    assert max(len(line) for line in text.splitlines() if line.lstrip().startswith("#")) <= 120


def run(*arguments: str | Path) -> Any:
    return CliRunner().invoke(cli, ["manifest", *map(str, arguments)], standalone_mode=False)


def test_the_verb_writes_a_manifest_with_its_reasons(tmp_path: Path) -> None:
    folder = tmp_path / "DeepSeek-V3.2"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(configs.DEEPSEEK_V32))
    output = tmp_path / "m.yaml"
    result = run("--model", folder, "--engine", "vllm", "--gpu", "b200", "--tp", "8", "-o", output)
    assert result.exception is None, result.output
    text = output.read_text()
    assert "name: deepseek-v3.2-tp8-b200-vllm\n" in text
    assert "self_attn.q_b_proj, layers 0–61" in text
    assert "mqa_logits" in text
    assert str(tmp_path) not in text
    assert manifests.load(output)[0].target.gpu.name == "B200"


def test_the_verb_writes_to_standard_output_and_names_a_wrong_gpu(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(configs.QWEN3_30B))
    result = run("--model", file, "--engine", "sglang", "--gpu", "H200")
    assert manifests.parse(result.output.encode()).ops
    result = run("--model", file, "--engine", "sglang", "--gpu", "A100")
    assert isinstance(result.exception, ModelError)
    assert "--gpu: wanted one of" in str(result.exception)
