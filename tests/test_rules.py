"""The rules held against the engines: what was recorded of each release, and fields that no rule reads."""

from __future__ import annotations

import contextlib
import copy
import itertools
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from benchmarks.engines.cases import GOOD, RECORDED, Answer, of_record, verdict
from cachebuilder.authoring.derive.config import Config
from cachebuilder.authoring.derive.derive import Derived, derive
from cachebuilder.authoring.derive.engines import ENGINES
from cachebuilder.authoring.derive.families import FAMILIES, TEXT_MODELS
from cachebuilder.authoring.derive.manifest import Deployment
from cachebuilder.cli.main import cli
from cachebuilder.errors import ModelError
from cachebuilder.manifest import schema as manifests

from . import configs

ANSWERS = list(of_record(RECORDED))
MODELS = {answer.model: answer.config for answer in ANSWERS}


def derived_of(tree: dict[str, Any], engine: str = "vllm", **options: Any) -> Derived:
    deployment = Deployment(**{"engine": engine, "gpu": "H200", "max_tokens": 64, **options})
    return derive(Config.of(tree, Path("model/config.json")), deployment.serving())


def dense(derived: Derived) -> set[tuple[int, int]]:
    return {(item.op.n, item.op.k) for item in derived.ops if item.op.op == "fp8_gemm_nt"}  # type: ignore[attr-defined]


@pytest.mark.parametrize("answer", ANSWERS, ids=lambda answer: " ".join(answer.name.split()))
def test_the_rules_answer_what_the_engine_answered(answer: Answer) -> None:
    word, difference = verdict(answer, ANSWERS)
    assert word in GOOD, difference
    if answer.refuses:  # for the same reason: the same division within a block
        share = answer.refuses.split(" = ")[1].split()[0]
        assert f"= {share}" in difference or "128" in difference


def test_each_release_that_was_read_and_recorded_is_one_of_the_rules() -> None:
    releases = {(answer.engine, answer.release) for answer in ANSWERS}
    assert {engine for engine, _ in releases} == set(ENGINES)
    assert all(release in ENGINES[engine].versions for engine, release in releases)


class TestEveryFieldIsReadOrReported:
    """A field that may bear on shapes and that no rule reads is an error that names it."""

    def test_of_the_recorded_models_all_are_read(self) -> None:
        assert {model: derived_of(tree).unread for model, tree in MODELS.items()} == dict.fromkeys(MODELS, ())

    @pytest.mark.parametrize("model", MODELS)
    def test_a_renamed_field_is_an_error_and_never_a_smaller_manifest(self, model: str) -> None:
        for engine in ENGINES:
            for field, tree in renamed_fields(MODELS[model], random.Random(model)):
                try:
                    unread = derived_of(tree, engine).unread
                except ModelError:
                    continue
                assert unread, f"{engine}: {field}"

    @pytest.mark.parametrize("model", MODELS)
    def test_a_field_renamed_to_another_that_the_rules_ask_for_is_an_error_or_loses_nothing(self, model: str) -> None:
        config = Config.of(tree := MODELS[model], Path("model/config.json"))
        ops = {str(item.op) for item in derive(config, Deployment(engine="vllm", gpu="H200").serving()).ops}
        absent = sorted(name for name in config.fields.read if name not in config.fields and "." not in name)
        text = tree.get("text_config", tree)
        harmless = {"max_position_embeddings": 262144, "attention_bias": False, "rms_norm_eps": 1e-6}
        for (field, value), name in itertools.product(harmless.items(), absent):
            fields = {key: old for key, old in text.items() if key != field} | {name: value}
            with contextlib.suppress(ModelError):
                derived = derived_of({**tree, "text_config": fields} if text is not tree else fields, max_tokens=8192)
                assert derived.unread or {str(item.op) for item in derived.ops} >= ops, name

    def test_a_field_renamed_to_one_that_leaves_no_layer_with_experts_is_an_error(self) -> None:
        tree = MODELS["hy3-fp8"] | {"moe_layer_freq": 262144}  # max_position_embeddings, by another field's name
        for engine in ENGINES:
            with pytest.raises(ModelError, match="wanted a layer with the num_experts 192, found none"):
                derived_of(tree, engine)

    def test_the_verb_names_it_and_goes_on_where_that_is_allowed(self, tmp_path: Path) -> None:
        file = tmp_path / "config.json"
        file.write_text(json.dumps(configs.QWEN3_30B | {"second_attention_heads": 8, "rope_theta": 1e6}))
        arguments = ["manifest", "--model", str(file), "--engine", "vllm", "--gpu", "H200"]
        result = CliRunner().invoke(cli, arguments, standalone_mode=False)
        assert isinstance(result.exception, ModelError)
        assert "found second_attention_heads:" in str(result.exception)
        result = CliRunner().invoke(cli, [*arguments, "--allow-unread"], standalone_mode=False)
        assert result.exception is None
        assert "# Not read in the config:" in result.stdout
        assert "second_attention_heads: no rule here reads it" in result.stdout
        assert manifests.parse(result.stdout.encode()).ops

    def test_what_a_plain_decoder_would_refuse_is_not_said_of_an_architecture_without_a_rule(self) -> None:
        with pytest.raises(ModelError, match=r"no rule here reads SomethingNewForCausalLM: it has no rule of its own"):
            derived_of(configs.UNKNOWN | {"intermediate_size": 12296}, tp=8)

    def test_two_fields_that_name_other_layers_with_experts_are_refused(self) -> None:
        tree = MODELS["glm-5-fp8"]
        dense_first = ["dense"] * 3 + ["sparse"] * (tree["num_hidden_layers"] - 3)
        assert dense(derived_of(tree | {"mlp_layer_types": dense_first})) == dense(derived_of(tree))
        with pytest.raises(ModelError, match=r"mlp_layer_types: wanted experts in the layers that first_k_dense"):
            derived_of(tree | {"mlp_layer_types": [*dense_first[1:], "sparse"]})

    def test_an_architecture_without_a_rule_is_one(self) -> None:
        assert derived_of(configs.UNKNOWN).unread == ("architectures (SomethingNewForCausalLM)",)

    def test_a_tower_of_another_modality_is_read_where_the_checkpoint_keeps_it_as_it_was(self) -> None:
        tree = configs.QWEN3_30B | {"model_type": "qwen3_vl_moe_text"}
        around = {"architectures": ["Qwen3VLMoeForConditionalGeneration"], "text_config": tree, "vision_config": {}}
        listed = tree["quantization_config"] | {"modules_to_not_convert": ["model.visual.blocks.0.attn.qkv"]}
        assert derived_of(around | {"quantization_config": tree["quantization_config"]}).unread == ("vision_config",)
        derived = derived_of(around | {"quantization_config": listed})
        assert not derived.unread
        assert dense(derived) == dense(derived_of(configs.QWEN3_30B))

    def test_a_kind_of_layer_that_no_rule_reads_is_refused(self) -> None:
        tree = configs.QWEN3_30B | {"layer_types": ["linear_attention"] * configs.QWEN3_30B["num_hidden_layers"]}
        with pytest.raises(ModelError, match=r"layer_types: wanted .* found linear_attention: no rule here reads"):
            derived_of(tree)


def renamed_fields(tree: dict[str, Any], seeded: random.Random) -> Iterator[tuple[str, dict[str, Any]]]:
    """``tree`` with one field renamed: each of the text model's fields that the rules read."""
    names = [name for name in tree.get("text_config", tree) if name not in ("architectures", "quantization_config")]
    for name in names:
        changed = copy.deepcopy(tree)
        fields = changed.get("text_config", changed)
        new = seeded.choice([f"{name}_2", f"n_{name}", f"{name}s", name.replace("_", ""), f"{name}_v2"])
        fields[new if new != name else f"x_{name}"] = fields.pop(name)
        yield name, changed


def test_the_fuzz_renames_forty_real_fields() -> None:
    assert len({name for tree in MODELS.values() for name, _ in renamed_fields(tree, random.Random(0))}) >= 40


class TestACutWithinABlock:
    """The engines' checks, with their exceptions."""

    def test_vllm_does_not_check_layers_that_fuse_several_weights(self) -> None:
        tree = configs.QWEN3_30B | {"moe_intermediate_size": 1024, "head_dim": 192, "num_attention_heads": 32}
        assert (10 * 192, 2048) in dense(derived_of(tree, tp=4))  # 8 + 1 + 1 heads of 192, which no block divides
        with pytest.raises(ModelError, match=r"k_proj: wanted N of each rank a multiple of 128, .* 768 / 4 = 192"):
            derived_of(tree, "sglang", tp=4)

    def test_vllm_checks_them_in_compressed_tensors(self) -> None:
        group = {
            "targets": ["Linear"],
            "weights": {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [128, 128]},
            "input_activations": {"dynamic": True},
        }
        quantization = {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}}
        tree = configs.QWEN3_30B | {"head_dim": 192, "num_attention_heads": 32, "quantization_config": quantization}
        with pytest.raises(ModelError, match=r"k_proj: wanted N of each rank a multiple of 128, .* 768 / 4 = 192"):
            derived_of(tree, tp=4)

    @pytest.mark.parametrize(("tp", "width"), [(4, 256), (8, 128)])
    def test_vllm_pads_experts_for_its_deep_gemm_backend_since_0_32(self, tp: int, width: int) -> None:
        shapes = {
            (item.op.experts, item.op.n, item.op.k)  # type: ignore[attr-defined]
            for item in derived_of(configs.QWEN3_30B, engine_version="0.32.0", tp=tp).ops
            if item.op.op == "m_grouped_fp8_gemm_nt_contiguous"
        }
        assert shapes == {(128, 2 * width, 2048), (128, 2048, width)}
        with pytest.raises(ModelError, match=f"768 / {tp}"):
            derived_of(configs.QWEN3_30B, engine_version="0.25.0", tp=tp)


class TestReleases:
    """A release that was not read is refused, or named."""

    @pytest.mark.parametrize(
        ("version", "rules"),
        [("0.25", "0.25.0"), ("0.25.1", "0.25.0"), ("0.32", "0.32.0"), ("0.33.0", "0.33.0"), ("0.33", "0.33.0")],
    )
    def test_a_series_has_the_rules_of_the_release_that_was_read(self, version: str, rules: str) -> None:
        serving = Deployment(engine="vllm", engine_version=version, gpu="H200").serving()
        assert serving.read_version == rules
        assert not serving.unknown
        assert serving.at_least(rules)

    def test_one_between_two_that_were_read_says_whose_rules_it_has(self) -> None:
        [text] = derived_of(configs.QWEN3_30B, engine_version="0.28.1").unknown
        assert text.startswith("vllm 0.28.1 was not read: these are the rules of 0.25.0")

    @pytest.mark.parametrize("version", ["0.40.0", "1.0", "0.24.0", "0", "latest"])
    def test_one_beyond_them_is_refused(self, version: str) -> None:
        with pytest.raises(ModelError, match=rf"wanted a release of vllm .* found {version}"):
            Deployment(engine="vllm", engine_version=version, gpu="H200").serving()

    def test_vllm_switches_deep_gemm_off_for_kolibri1_on_sm120_since_0_33(self) -> None:
        tree = configs.QWEN3_30B | {"model_type": "kolibri1"}
        gpu = "RTX PRO 6000"
        assert derived_of(tree, gpu=gpu, engine_version="0.32.0").ops
        with pytest.raises(ModelError, match="does not use DeepGEMM for kolibri1"):
            derived_of(tree, gpu=gpu, engine_version="0.33.0")


class TestUnquantisedModules:
    """The checkpoint's list is read as the engine reads it."""

    def test_a_tower_s_layers_are_not_the_decoder_s(self) -> None:
        names = [f"vision_tower.encoder.layers.{number}.self_attn.o_proj" for number in range(48)]
        quantization = configs.BLOCK_FP8 | {"modules_to_not_convert": names}
        tree = configs.QWEN3_30B | {"quantization_config": quantization}
        for engine in ENGINES:
            assert dense(derived_of(tree, engine)) == dense(derived_of(configs.QWEN3_30B, engine))

    def test_a_text_model_s_layers_are_known_behind_a_prefix(self) -> None:
        names = [f"model.language_model.layers.{number}.self_attn.o_proj" for number in range(48)]
        quantization = configs.BLOCK_FP8 | {"modules_to_not_convert": names}
        tree = configs.QWEN3_30B | {"quantization_config": quantization}
        for engine in ENGINES:
            assert (2048, 4096) not in dense(derived_of(tree, engine))

    def test_vllm_takes_the_name_of_a_fused_layer(self) -> None:
        names = [f"model.layers.{number}.self_attn.qkv_proj" for number in range(48)]
        quantization = configs.BLOCK_FP8 | {"modules_to_not_convert": names}
        tree = configs.QWEN3_30B | {"quantization_config": quantization}
        assert (5120, 2048) not in dense(derived_of(tree, "vllm"))
        assert (5120, 2048) in dense(derived_of(tree, "sglang"))

    def test_the_targets_of_compressed_tensors_say_what_is_quantised_how(self) -> None:
        block = {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [128, 128]}
        groups = {
            "group_0": {
                "targets": [r"re:.*self_attn\..*_proj$"],
                "weights": block,
                "input_activations": {"dynamic": True},
            },
            "group_1": {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "float", "strategy": "group"}},
        }
        quantization = {"quant_method": "compressed-tensors", "config_groups": groups}
        derived = derived_of(configs.QWEN3_30B | {"quantization_config": quantization})
        assert [item.op.op for item in derived.ops] == ["fp8_gemm_nt"] * 2
        assert any("4-bit float" in item.why for item in derived.left_out)


class TestWhatNoRuleReads:
    """It is another sentence than that the engine does not use DeepGEMM."""

    def test_blocks_of_32_in_sglang(self) -> None:
        tree = configs.QWEN3_30B | {"quantization_config": configs.BLOCK_FP8 | {"weight_block_size": [32, 32]}}
        with pytest.raises(ModelError, match="no rule here reads this checkpoint"):
            derived_of(tree, "sglang")
        with pytest.raises(ModelError, match="would not reach DeepGEMM"):
            derived_of(tree, "vllm")

    @pytest.mark.parametrize(
        ("model", "reason"),
        [
            ({"architectures": ["DeepseekV41ForCausalLM"], "model_type": "deepseek_v41"}, "hyper-connections"),
            ({"architectures": ["SomethingNewForCausalLM"]}, "no rule of its own"),
            ({"quantization_config": {"quant_method": "mxfp8"}}, "'mxfp8'"),
        ],
        ids=["v4.1", "an unknown model in another format", "mxfp8"],
    )
    def test_models_that_may_call_deep_gemm_without_fp8_blocks(self, model: dict[str, Any], reason: str) -> None:
        quantization = {"quant_method": "fp8", "weight_block_size": [1, 32]}
        with pytest.raises(ModelError, match=f"no rule here reads .*{reason}"):
            derived_of({**configs.QWEN3_30B, "quantization_config": quantization, **model})

    def test_modelopt_s_blocks_are_read_in_linear_layers(self) -> None:
        quantization = {"quant_method": "modelopt", "quant_algo": "FP8_PB_WO", "exclude_modules": ["lm_head"]}
        derived = derived_of(configs.DEEPSEEK_V3 | {"quantization_config": quantization}, tp=8)
        assert (2176, 7168) in dense(derived)  # 2112, padded to whole blocks
        assert (3072, 1536) in dense(derived)
        assert {item.op.op for item in derived.ops} == {"fp8_gemm_nt"}
        assert any("mlp.experts" in item.what and "one scale a tensor" in item.why for item in derived.left_out)
        tree = configs.DEEPSEEK_V3 | {"quantization_config": quantization | {"ignore": ["lm_head"]}}
        with pytest.raises(ModelError, match="wanted N a multiple of 128, found 2112"):
            derived_of(tree, tp=8, engine_version="0.25.0")

    def test_modelopt_s_quantised_lm_head_is_not_read(self) -> None:
        quantization = {"quant_method": "modelopt", "quant_algo": "FP8_PB_WO", "exclude_modules": ["*mlp.gate"]}
        with pytest.raises(ModelError, match="no rule here reads a quantised LM head"):
            derived_of(configs.QWEN3_30B | {"quantization_config": quantization})

    def test_vllm_before_0_33_reads_modelopt_s_ignore_list_by_one_name_only(self) -> None:
        quantization = {"quant_method": "modelopt", "quant_algo": "FP8_PB_WO"}
        for name, version in (("ignore", "0.25.0"), ("ignore", "0.33.0"), ("exclude_modules", "0.33.0")):
            tree = configs.QWEN3_30B | {"quantization_config": quantization | {name: ["lm_head"]}}
            assert (5120, 2048) in dense(derived_of(tree, engine_version=version))
        with pytest.raises(ModelError, match=r"wanted ignore, which vLLM 0.32.0 reads .* found exclude_modules alone"):
            derived_of(tree, engine_version="0.32.0")

    def test_modelopt_s_mixed_precision_has_blocks_in_vllm_since_0_32(self) -> None:
        layers = {f"model.layers.{n}.self_attn.o_proj": {"quant_algo": "FP8_PB_WO"} for n in range(48)}
        quantization = {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION", "quantized_layers": layers}
        tree = configs.QWEN3_30B | {"quantization_config": quantization}
        for engine, version in (("vllm", "0.32.0"), ("vllm", "0.33.0"), ("sglang", "0.5.23")):
            assert dense(derived_of(tree, engine, engine_version=version)) == {(2048, 4096)}
        with pytest.raises(ModelError, match="would not reach DeepGEMM"):
            derived_of(tree, engine_version="0.25.0")

    def test_the_indexer_calls_deep_gemm_whatever_the_weights_are(self) -> None:
        quantization = {"quant_method": "modelopt", "quant_algo": "NVFP4"}
        derived = derived_of(configs.DEEPSEEK_V32 | {"quantization_config": quantization}, tp=8)
        names = {item.op.op for item in derived.ops}
        assert names == {"fp8_fp4_mqa_logits", "fp8_fp4_paged_mqa_logits", "get_paged_mqa_logits_metadata"}


class TestFurtherOptionsOfTheEngine:
    """Each option that bears on shapes is read or refused."""

    def test_a_dense_mlp_is_whole_on_each_rank(self) -> None:
        tree = configs.DEEPSEEK_V3
        assert (2 * 18432, 7168) not in dense(derived_of(tree, "sglang", tp=8, ep=8, dp=8))
        derived = derived_of(tree, "sglang", tp=8, ep=8, dp=8, engine_arguments=("--moe-dense-tp-size", "1"))
        assert {(2 * 18432, 7168), (7168, 18432)} <= dense(derived)

    @pytest.mark.parametrize(("option", "count"), [("enforce", 385), ("disable", 256)])
    def test_the_shared_expert_is_fused_or_not_on_demand(self, option: str, count: int) -> None:
        tree = configs.DEEPSEEK_V3 | {"n_routed_experts": 384 if option == "enforce" else 256}
        derived = derived_of(tree, "sglang", tp=8, engine_arguments=(f"--{option}-shared-experts-fusion",))
        experts = {item.op.experts for item in derived.ops if "contiguous" in item.op.op}  # type: ignore[attr-defined]
        assert experts == {count}

    def test_the_indexer_has_as_many_rows_as_are_drafted(self) -> None:
        derived = derived_of(
            configs.DEEPSEEK_V32, "sglang", tp=8, engine_arguments=("--speculative-num-draft-tokens=6",)
        )
        assert {item.op.max_batch for item in derived.ops if "paged" in item.op.op} == {6 * 1024}  # type: ignore[attr-defined]

    def test_dual_batch_overlap_runs_on_fewer_sms(self, tmp_path: Path) -> None:
        file = tmp_path / "config.json"
        file.write_text(json.dumps(configs.QWEN3_30B))
        arguments = ["--model", str(file), "--engine", "vllm", "--gpu", "H200", "--dp", "2", "--ep", "2"]
        options = ["--", "--enable-dbo", "VLLM_DBO_COMM_SMS=24"]
        result = CliRunner().invoke(cli, ["manifest", *arguments, *options], standalone_mode=False)
        assert manifests.parse(result.stdout.encode()).target.sm_counts == [108, 132]

    @pytest.mark.parametrize(
        ("engine", "option", "reason"),
        [
            ("sglang", "--enable-single-batch-overlap", "signals its tokens"),
            ("sglang", "--enable-two-batch-overlap", "DeepEP"),
            ("sglang", "--enable-deepseek-v4-fp4-indexer", "FP4"),
            ("sglang", "SGLANG_SHARED_EXPERT_TP1=1", "whole shared expert"),
            ("vllm", "--enable-lora", "adapter"),
            ("vllm", "--something-new", "wanted options of the engine that bear on shapes"),
            ("sglang", "--moe-dense-tp-size", "wanted a whole number"),
            ("sglang", "--moe-dense-tp-size=3", "SGLang wants 1 or --tp 1"),
        ],
    )
    def test_others_are_refused_with_the_reason(self, engine: str, option: str, reason: str) -> None:
        with pytest.raises(ModelError, match=reason):
            derived_of(configs.QWEN3_30B, engine, engine_arguments=(option,))


GQA = {"num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "hidden_size": 2048}
EXPERTS = {"num_experts": 64, "num_experts_per_tok": 8, "moe_intermediate_size": 1024, "intermediate_size": 8192}
ATTENTION = {((32 + 2 * 4) * 128, 2048), (2048, 4096)}
DENSE_MLP = {(2 * 8192, 2048), (2048, 8192)}
SHARED_MLP = {(2 * 1024, 2048), (2048, 1024)}


@pytest.mark.parametrize(
    ("architecture", "fields", "linears"),
    [
        pytest.param(
            "Ernie4_5_MoeForCausalLM",
            {
                "moe_num_experts": 64,
                "moe_k": 6,
                "moe_num_shared_experts": 2,
                "moe_layer_start_index": 1,
                "moe_layer_end_index": 3,
                "moe_layer_interval": 1,
                "moe_intermediate_size": 1024,
                "intermediate_size": 8192,
            },
            ATTENTION | DENSE_MLP | {(2 * 2048, 2048), (2048, 2048)},
            id="ERNIE-4.5: layer 0 is dense; two shared experts",
        ),
        pytest.param(
            "ExaoneMoEForCausalLM",
            {
                **EXPERTS,
                "num_shared_experts": 1,
                "first_k_dense_replace": 1,
                "layer_types": ["sliding_attention"] * 3 + ["full_attention"],
                "mlp_layer_types": ["dense"] + ["sparse"] * 3,
            },
            ATTENTION | DENSE_MLP | SHARED_MLP,
            id="K-EXAONE",
        ),
        pytest.param(
            "BailingMoeV2ForCausalLM",
            {**EXPERTS, "num_shared_experts": 1, "first_k_dense_replace": 1, "num_nextn_predict_layers": 0},
            ATTENTION | DENSE_MLP | SHARED_MLP,
            id="Ling 2",
        ),
        pytest.param(
            "BailingMoeV2_5ForCausalLM",
            {
                **EXPERTS,
                "num_shared_experts": 1,
                "first_k_dense_replace": 1,
                "layer_group_size": 4,
                "q_lora_rank": 1536,
                "kv_lora_rank": 512,
                "qk_nope_head_dim": 128,
                "qk_rope_head_dim": 64,
                "v_head_dim": 128,
            },
            {(3 * 4096, 2048), (4096, 2048), (2048, 4096)}  # linear attention: query, key and value; gate; output
            | {(1536 + 576, 2048), (32 * 192, 1536), (32 * 256, 512)}  # the fourth layer's latent attention
            | DENSE_MLP
            | SHARED_MLP,
            id="Ring 2.5",
        ),
        pytest.param(
            "Llama4ForCausalLM",
            {
                "num_local_experts": 16,
                "num_experts_per_tok": 1,
                "intermediate_size": 1024,
                "intermediate_size_mlp": 8192,
                "interleave_moe_layer_step": 2,
            },
            ATTENTION | DENSE_MLP | SHARED_MLP,
            id="Llama 4: each second layer has experts",
        ),
        pytest.param(
            "MixtralForCausalLM",
            {"num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 8192},
            ATTENTION,
            id="Mixtral",
        ),
        pytest.param(
            "Qwen3_5ForCausalLM",
            {
                "intermediate_size": 8192,
                "linear_num_key_heads": 16,
                "linear_key_head_dim": 128,
                "linear_num_value_heads": 48,
                "linear_value_head_dim": 128,
                "full_attention_interval": 4,
                "mtp_num_hidden_layers": 1,
            },
            {((2 * 32 + 2 * 4) * 128, 2048), (2048, 4096)}  # the query and its gate
            | {(2 * (16 + 48) * 128, 2048), (2048, 48 * 128)}
            | DENSE_MLP
            | {(2048, 4096)},  # mtp.fc
            id="Qwen3.5, dense",
        ),
    ],
)
def test_families_without_a_recorded_answer(
    architecture: str, fields: dict[str, Any], linears: set[tuple[int, int]]
) -> None:
    """Against arithmetic by hand from the engines' files that `families` names."""
    tree = {
        **GQA,
        **fields,
        "architectures": [architecture],
        "num_hidden_layers": 4,
        "quantization_config": configs.BLOCK_FP8
        | {"modules_to_not_convert": [f"model.layers.{n}.linear_attn.in_proj_{x}" for n in range(4) for x in "ab"]},
    }
    for engine in ENGINES:
        derived = derived_of(tree, engine)
        assert dense(derived) == linears, engine
        assert not derived.unread


LAGUNA = {
    **GQA,
    **EXPERTS,
    "architectures": ["LagunaForCausalLM"],
    "num_hidden_layers": 3,
    "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
    "num_attention_heads_per_layer": [32, 48, 48],
    "shared_expert_intermediate_size": 1024,
    "quantization_config": configs.BLOCK_FP8
    | {"modules_to_not_convert": [f"model.layers.{n}.self_attn.g_proj" for n in range(3)]},
}


@pytest.mark.parametrize("experts", [{"mlp_layer_types": ["dense", "sparse", "sparse"]}, {"mlp_only_layers": [0]}, {}])
def test_laguna_has_other_heads_in_some_layers_and_vllm_keeps_gate_and_up_apart(experts: dict[str, Any]) -> None:
    tree = {**LAGUNA, **experts, "gating": "per-head"}
    sliding = {((48 + 2 * 4) * 128, 2048), (2048, 48 * 128)}
    apart = {(8192, 2048), (2048, 8192), (1024, 2048), (2048, 1024)}
    assert dense(derived_of(tree, "vllm")) == ATTENTION | sliding | apart
    assert dense(derived_of(tree, "sglang")) == ATTENTION | sliding | DENSE_MLP | SHARED_MLP
    assert not derived_of(tree).unread


def test_laguna_s_gate_has_a_row_for_each_head_or_for_each_element() -> None:
    quantized = {**LAGUNA, "quantization_config": configs.BLOCK_FP8}
    assert (48 * 128, 2048) in dense(derived_of({**quantized, "gating": "per-element"}))
    assert any("self_attn.g_proj" in item.what for item in derived_of({**quantized, "gating": True}).left_out)
    with pytest.raises(ModelError, match="gating: wanted true, false, per-head or per-element, found 'both'"):
        derived_of({**quantized, "gating": "both"})
    with pytest.raises(ModelError, match="num_attention_heads_per_layer: wanted an entry for each layer"):
        derived_of({**quantized, "num_attention_heads_per_layer": [32, 48]})


def test_muse_glimmer_s_query_key_and_value_are_apart_in_sglang() -> None:
    text = {**GQA, "model_type": "muse_glimmer_text", "num_hidden_layers": 2, "intermediate_size": 8192}
    around = {"architectures": ["MuseGlimmerForConditionalGeneration"], "quantization_config": configs.BLOCK_FP8}
    tree = {**around, "text_config": text}
    assert dense(derived_of(tree, "vllm")) == ATTENTION | {(4096, 2048)} | DENSE_MLP  # and the output gate
    assert dense(derived_of(tree, "sglang")) == {(4096, 2048), (512, 2048), (2048, 4096)} | DENSE_MLP
    with pytest.raises(ModelError, match="sglang copies no heads here: wanted at most num_key_value_heads 4 ranks"):
        derived_of(tree, "sglang", tp=8)


@pytest.mark.parametrize("field", [{"is_moe_layer": [False, True]}, {"mlp_layer_types": ["dense", "sparse"]}])
def test_k_exaone_s_layers_with_experts_are_listed_in_either_field(field: dict[str, Any]) -> None:
    tree = {**GQA, **EXPERTS, **field, "architectures": ["ExaoneMoEForCausalLM"], "num_hidden_layers": 2}
    derived = derived_of({**tree, "num_shared_experts": 1, "quantization_config": configs.BLOCK_FP8})
    assert any("mlp.experts w13 (gate and up), layers 1:" in line for item in derived.ops for line in item.serves)
    assert not derived.unread


def test_a_multimodal_config_is_its_text_model() -> None:
    text = configs.QWEN3_30B
    around = {"architectures": ["InternVLChatModel"], "quantization_config": text["quantization_config"]}
    expected = dense(derived_of(text))
    assert dense(derived_of({**around, "llm_config": text})) == expected
    omni = {key: value for key, value in text.items() if key != "architectures"} | {"model_type": "qwen3_omni_moe_text"}
    assert dense(derived_of({**around, "thinker_config": {"text_config": omni}, "talker_config": {}})) == expected


def test_mimo_v2_5_s_interleaved_weights_are_read_where_each_rank_has_one_part() -> None:
    tree = {
        **MODELS["mimo-v2-flash"],
        "architectures": ["MiMoV2ForCausalLM"],
        "attention_projection_layout": "fused_qkv",
    }
    tree["quantization_config"] = configs.BLOCK_FP8
    assert (3392, 4096) in dense(derived_of(tree, "vllm", tp=4))
    with pytest.raises(ModelError, match="no rule here reads parts of num_key_value_heads 4 on 2 ranks"):
        derived_of(tree, "vllm", tp=2)
    with pytest.raises(ModelError, match="wanted a divisor of num_key_value_heads 4, found 8"):
        derived_of(tree, "sglang", tp=8)


def test_each_text_model_has_a_family() -> None:
    assert set(TEXT_MODELS.values()) <= set(FAMILIES)


LING_3 = {
    "architectures": ["BailingMoeV3ForCausalLM"],
    "num_hidden_layers": 3,  # layer 0 has linear attention, 1 is the last of its group, 2 is behind the last whole one
    "layer_group_size": 2,
    "first_k_dense_replace": 1,
    "no_kda_lora": True,
    "hidden_size": 2560,
    "intermediate_size": 6144,
    "head_dim": 128,
    "num_attention_heads": 32,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "kv_lora_rank": 512,
    "gated_attention_proj_granularity_type": "head_wise",
    "num_experts": 512,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "num_shared_experts": 1,
    "quantization_config": configs.BLOCK_FP8 | {"modules_to_not_convert": ["b_proj", "lm_head"]},
}


def test_ling_3_has_linear_attention_whose_beta_is_apart_where_it_is_not_quantised() -> None:
    latent = {(32 * 192 // 4, 2560), (576, 2560), (32 * 256 // 4, 512), (2560, 32 * 128 // 4)}
    linear = {(32 * 128 // 4, 2560), (2560, 32 * 128 // 4)}
    dense_mlp, shared = {(2 * 6144 // 4, 2560), (2560, 6144 // 4)}, {(512, 2560), (2560, 256)}  # 192 rows are padded
    derived = derived_of(LING_3, tp=4)
    assert dense(derived) == latent | linear | {(3 * 4096 // 4, 2560)} | dense_mlp | shared
    assert not derived.unread
    whole = derived_of({**LING_3, "quantization_config": configs.BLOCK_FP8}, tp=4)
    assert any("qkvb_proj" in item.what for item in whole.left_out)  # N 3080
    layers = {line.split(":")[0] for item in derived.ops for line in item.serves}
    assert "attention.qkv_proj, layers 0" in layers
    assert "attention.kv_b_proj, layers 1–2" in layers


def test_ling_3_is_read_as_vllm_runs_it_since_it_has_the_class() -> None:
    with pytest.raises(ModelError, match=r"wanted vllm 0.32.0 or later, which has BailingMoeV3ForCausalLM"):
        derived_of(LING_3, engine_version="0.25.0")
    with pytest.raises(ModelError, match="no rule here reads BailingMoeV3ForCausalLM as sglang runs it: wanted vllm"):
        derived_of(LING_3, "sglang")
    with pytest.raises(ModelError, match=r"attention\.g_proj: wanted N of each rank a multiple of 128"):
        derived_of(LING_3, engine_version="0.32.0", tp=4)
    with pytest.raises(ModelError, match="no_kda_lora: wanted true, with which alone vLLM loads it, found false"):
        derived_of({**LING_3, "no_kda_lora": False})


DOTS_3 = {
    "architectures": ["Dots3NoteForCausalLM"],
    "num_hidden_layers": 2,
    "layer_types": ["full_attention", "sliding_attention"],
    "first_k_dense_replace": 1,
    "hidden_size": 5120,
    "intermediate_size": 13824,
    "attention_gate_type": "headwise",
    "num_attention_heads": 128,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "q_lora_rank": 1024,
    "kv_lora_rank": 512,
    "index_head_dim": 128,
    "index_n_heads": 64,
    "index_topk": 2048,
    "swa_attention_gate_type": "elementwise",
    "swa_num_attention_heads": 64,
    "swa_qk_nope_head_dim": 192,
    "swa_qk_rope_head_dim": 64,
    "swa_v_head_dim": 128,
    "swa_q_lora_rank": 1024,
    "swa_kv_lora_rank": 1024,
    "n_routed_experts": 256,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 1536,
    "n_shared_experts": 1,
    "quantization_config": configs.BLOCK_FP8,
}


def test_dots_3_has_two_kinds_of_latent_attention_and_pads_its_mlps() -> None:
    full = {(1600, 5120), (128 * 192 // 8, 1024), (128 * 256 // 8, 512), (5120, 128 * 128 // 8), (8192, 1024)}
    sliding = {(2112, 5120), (64 * 256 // 8, 1024), (64 * 320 // 8, 1024), (5120, 64 * 128 // 8)}
    gates = {(128, 5120), (64 * 128 // 8, 5120)}
    mlps = {(2 * 14336 // 8, 5120), (5120, 14336 // 8), (512, 5120), (5120, 256)}
    derived = derived_of(DOTS_3, tp=8, ep=8)
    assert dense(derived) == full | sliding | gates | mlps
    assert not derived.unread
    rows = {item.op.n: getattr(item.op, "max_tokens", None) for item in derived.ops if item.op.op == "fp8_gemm_nt"}  # type: ignore[attr-defined]
    assert rows[64 * 320 // 8] == 64 * 1024  # the window's keys are projected from the cache
    with pytest.raises(ModelError, match="attention_gate_type: no rule here reads 'rowwise'"):
        derived_of({**DOTS_3, "attention_gate_type": "rowwise"})


def test_a_dspark_draft_projects_the_hidden_states_of_its_target_layers() -> None:
    dspark = {"dspark_block_size": 5, "dspark_markov_rank": 256, "dspark_target_layer_ids": [0, 1, 2]}
    target = derived_of(configs.DEEPSEEK_V4_FLASH | {"num_nextn_predict_layers": 0})
    tree = configs.DEEPSEEK_V4_FLASH | dspark | {"num_nextn_predict_layers": 1}
    assert dense(derived_of(tree, engine_version="0.25.0")) - dense(target) == {(4096, 3 * 4096)}
    newest = derived_of(tree)
    assert dense(newest) - dense(target) == {(4096, 3 * 4096)}
    lines = {(item.op.n, line.split(",")[0]) for item in newest.ops for line in item.serves if "mtp." in line}  # type: ignore[attr-defined]
    assert lines == {(4096, "mtp.0.main_proj"), (3 * 512, "mtp.context_wkv_proj")}
    assert not newest.unread
    assert "dspark_block_size" in derived_of(tree, "sglang").unread
