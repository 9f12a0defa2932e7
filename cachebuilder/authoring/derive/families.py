"""The models that the rules know: each a table of blocks, with the config's fields where they are not the usual ones.

Read in the engines' model files: vLLM 0.25.0, 0.32.0 and 0.33.0 (``vllm/model_executor/models``, ``vllm/models``) and
SGLang 0.5.23 (``sglang/srt/models``); the comment at a family names its files where they have other names than the
model. What the engines always run unquantised is not listed: embeddings, the LM head (``ParallelLMHead`` takes no FP8
method in ``Fp8Config.get_quant_method``, vLLM 0.33.0 ``layers/quantization/fp8.py``), routers, norms and ``eh_proj`` of
most draft models (a plain ``nn.Linear``, vLLM 0.33.0 ``models/deepseek_mtp.py``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from cachebuilder.authoring.derive import deepseek_v4
from cachebuilder.authoring.derive.blocks import (
    Attention,
    Block,
    InterleavedQkv,
    Mla,
    Mlp,
    Moe,
    Projection,
)
from cachebuilder.authoring.derive.config import Config
from cachebuilder.authoring.derive.layer_kinds import (
    Layers,
    after_dense,
    between,
    decoder_only,
    draft,
    enumerated,
    everywhere,
    exaone,
    gated_attention,
    interleaved,
    laguna,
    last_of_group,
    listed,
    of_ling_3,
    other_than,
    stepped,
)
from cachebuilder.authoring.derive.layers import Model
from cachebuilder.authoring.derive.recurrent import GatedDeltaNet, KimiDelta
from cachebuilder.authoring.derive.serving import Serving

#: No model has a tenth of these; a config that names more would fill this machine's memory.
_MOST_LAYERS = 4096


@dataclass(frozen=True)
class Family:
    """What the layers of a model are made of.

    Attributes:
        since: the engines that the rules read, each with the first of the read releases that has the class; empty: all.
        layers, draft: the fields of the numbers of decoder layers and of draft layers.
        draft_prefix: see `Layers`.
        abbreviated: see `Model`.
        unused: fields, with spaces between them, on which no shape of these models depends; the comment says why.
        unknown: what the config leaves open.
    """

    blocks: tuple[Block, ...]
    since: Mapping[str, str] = field(default_factory=dict)
    layers: str = "num_hidden_layers"
    draft: str = "num_nextn_predict_layers|num_mtp_layers"
    draft_prefix: str = "model.layers."
    abbreviated: bool = False
    unused: str = ""
    unknown: tuple[str, ...] = ()


#: The keys and values of latent attention have no heads in the cache; a shared choice of keys leaves layers without an
#: indexer, and the first layers have one.
_MLA_UNUSED = (
    "num_key_value_heads head_dim qk_head_dim layer_types "
    "index_topk_freq index_topk_pattern index_skip_topk_offset indexer_types index_share_for_mtp_iteration"
)
_DECODER = Family((Attention(), Mlp()))
_DEEPSEEK = Family((Mla(), Moe(shared="n_shared_experts", on=after_dense)), unused=_MLA_UNUSED)
_MOE = Moe(on=stepped)
_SHARED_MOE = replace(_MOE, shared_width="shared_expert_intermediate_size", shared_at="mlp.shared_expert")
_GLM = Family((Attention(), Moe(shared="n_shared_experts", whole=("sglang",), on=after_dense)))
#: vLLM models/qwen3_5.py and qwen3_5_mtp.py; SGLang models/qwen3_5.py and qwen3_5_mtp.py.
_QWEN35_BLOCKS: tuple[Block, ...] = (
    Attention(gate="attn_output_gate", on=gated_attention),
    GatedDeltaNet(on=other_than(gated_attention)),
    Projection("mtp.fc", divided=True, on=draft),
)
_QWEN35 = Family(
    (*_QWEN35_BLOCKS, Mlp()),
    draft="mtp_num_hidden_layers",
    draft_prefix="mtp.layers.",
    unused="mlp_only_layers",  # Qwen3.5-27B has this field and no experts
)
_QWEN35_MOE = replace(_QWEN35, blocks=(*_QWEN35_BLOCKS, _SHARED_MOE), unused="")
#: vLLM models/exaone_moe.py and exaone_moe_mtp.py: the draft layer is dense.
_EXAONE = Family(
    (
        Attention(),
        Moe(shared="num_shared_experts", whole=("sglang",), on=exaone),
        Projection("mtp.fc", divided=True, on=draft),
    ),
    draft_prefix="mtp.layers.",
    unused="mtp_layer_types mtp_sliding_windows first_k_dense_replace first_last_k_dense_replace",
)
_BAILING_ATTENTION = Attention(at="attention", names=("query_key_value", "dense"), fused=True)
_BAILING_MOE = Moe(
    shared="num_shared_experts",
    shared_width="moe_shared_expert_intermediate_size",
    whole=("sglang",),
    on=after_dense,
)
_DOTS_SLIDING = listed("layer_types", "sliding_attention", drafts=True)
_BAILING = Family((_BAILING_ATTENTION, _BAILING_MOE))  # Ling and Ring 1.5 and 2: models/bailing_moe.py in both
_MIMO_ATTENTION = (  # models/mimo_v2.py in both
    Attention(value_dim="v_head_dim", checked=False, on=listed("hybrid_layer_pattern", 0)),
    Attention(
        *("swa_num_attention_heads", "swa_num_key_value_heads", "swa_head_dim", "swa_v_head_dim"),
        checked=False,
        on=listed("hybrid_layer_pattern", 1, drafts=True),
    ),
)
_MIMO_MOE = Moe(shared="n_shared_experts", on=listed("moe_layer_freq", 1))

#: ``architectures[0]`` → its family.
FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": _DECODER,
    "MistralForCausalLM": _DECODER,
    "Qwen2ForCausalLM": _DECODER,
    "Qwen3ForCausalLM": _DECODER,
    "SeedOssForCausalLM": _DECODER,
    "Exaone4ForCausalLM": _DECODER,
    "Ernie4_5ForCausalLM": _DECODER,
    "DeepseekV3ForCausalLM": _DEEPSEEK,  # DeepSeek V3, R1, V3.1; Kimi-K2
    "DeepseekV32ForCausalLM": _DEEPSEEK,
    "GlmMoeDsaForCausalLM": _DEEPSEEK,  # GLM-5
    "Glm4MoeLiteForCausalLM": _DEEPSEEK,  # GLM-4.7-Flash
    "Glm4MoeForCausalLM": _GLM,  # GLM-4.5, 4.6, 4.7
    "Qwen2MoeForCausalLM": Family((Attention(), _SHARED_MOE)),
    "Qwen3MoeForCausalLM": Family((Attention(), _MOE), unused="shared_expert_intermediate_size"),
    "Qwen3NextForCausalLM": Family(
        (
            Attention(gate=True, on=gated_attention),
            GatedDeltaNet(other_than(gated_attention), parts=False),
            _SHARED_MOE,
        ),
        unknown=(
            "whether the MTP layer's fc is quantised: this assumes that it is not; its other shapes are the decoder's",
        ),
    ),
    "Qwen3_5ForCausalLM": _QWEN35,
    "Qwen3_5MoeForCausalLM": _QWEN35_MOE,
    "MixtralForCausalLM": Family(
        (Attention(), Moe(experts="num_local_experts", width="intermediate_size", at="block_sparse_moe", dense=None))
    ),
    # The engines do not run its draft modules: vLLM's loader drops their weights, and SGLang's does.
    "MiniMaxM2ForCausalLM": Family(
        (Attention(), Moe(experts="num_local_experts", width="intermediate_size", at="block_sparse_moe", dense=None)),
        unused="use_mtp num_mtp_modules mtp_transformer_layers attn_type_list shared_intermediate_size",
    ),
    "MiMoV2FlashForCausalLM": Family((*_MIMO_ATTENTION, _MIMO_MOE), unused="hybrid_block_size"),
    "MiMoV2ForCausalLM": Family(  # MiMo-V2.5
        (*(replace(block, fused=True) for block in _MIMO_ATTENTION), InterleavedQkv(), _MIMO_MOE),
        unused="hybrid_block_size",
    ),
    # Two attentions and two dense MLPs a layer, beside the experts; the draft layer is dense (longcat_flash_mtp.py).
    "LongcatFlashForCausalLM": Family(
        (
            *(Mla(at=f"self_attn.{number}") for number in range(2)),
            *(Mlp("intermediate_size|ffn_hidden_size", at=f"mlps.{number}") for number in range(2)),
            Moe(
                topk="moe_topk",
                width="moe_intermediate_size|expert_ffn_hidden_size",
                dense=None,
                on=decoder_only(everywhere),
            ),
            Projection("eh_proj", on=draft),
        ),
        layers="num_hidden_layers|num_layers",
        unused=_MLA_UNUSED + " attention_method nextn_use_scmoe",
    ),
    "Step3p5ForCausalLM": Family(
        (
            Attention(
                kv_heads="num_attention_groups",
                head_gate="use_head_wise_attn_gate",
                on=other_than(listed("layer_types", "sliding_attention")),
            ),
            Attention(
                heads="num_sliding_attention_heads|attention_other_setting.num_attention_heads",
                kv_heads="attention_other_setting.num_attention_groups|num_attention_groups",
                dim="attention_other_setting.head_dim|head_dim",
                head_gate="use_head_wise_attn_gate",
                on=listed("layer_types", "sliding_attention"),
            ),
            Moe(
                experts="moe_num_experts",
                topk="moe_top_k",
                shared_width="share_expert_dim",
                shared_at="share_expert",
                whole=("sglang",),
                at="moe",
                on=enumerated,
            ),
        ),
        unused="att_impl_type moe_every_n_layer use_moe mtp_layer_types mtp_mlp_layer_types",
    ),
    "LagunaForCausalLM": Family(  # vLLM keeps gate and up apart, of the dense layers and of the shared expert
        (
            Attention(heads_by_layer="num_attention_heads_per_layer", head_gate="gating"),
            Moe(
                shared_width="shared_expert_intermediate_size",
                shared_at="mlp.shared_expert",
                whole=(),
                dense=Mlp(split_in=("vllm",)),
                split_in=("vllm",),
                on=laguna,
            ),
        ),
        unused="gating_types moe_apply_router_weight_on_input moe_routed_scaling_factor moe_router_logit_softcapping "
        "moe_router_score_func swa_attention_sink_enabled swa_rope_parameters",
    ),
    "MuseGlimmerForCausalLM": Family(
        (Attention(own_gate="output_gate_proj", split_in=("sglang",)), Mlp()),
        since={"vllm": "0.32.0", "sglang": "0.5.23"},
        unused="layer_rope_theta out_hidden_size output_multiplier post_norm_eps projector_hidden_size qk_scale_factor",
    ),
    "HYV3ForCausalLM": Family(  # vLLM models/hy_v3.py, SGLang models/hunyuan_v3.py
        (
            Attention(),
            Moe(
                width="expert_hidden_dim|moe_intermediate_size",
                shared="num_shared_experts",
                shared_at="mlp.shared_mlp",
                whole=(),
                on=after_dense,
            ),
        )
    ),
    "BailingMoeForCausalLM": _BAILING,
    "BailingMoeV2ForCausalLM": _BAILING,
    "BailingMoeV2_5ForCausalLM": Family(  # Ling and Ring 2.5 and 2.6: models/bailing_moe_linear.py in both
        (
            Mla(at="attention", on=last_of_group),
            replace(
                _BAILING_ATTENTION, kv_heads="num_attention_heads", own_gate="g_proj", on=other_than(last_of_group)
            ),
            _BAILING_MOE,
        ),
        unused=_MLA_UNUSED + " group_norm_size",
    ),
    "BailingMoeV3ForCausalLM": Family(  # Ling 3: vLLM models/bailing_moe_v3.py, bailing_moe_v3_mtp.py
        (
            Mla(at="attention", gate="gated_attention_proj_granularity_type", out="dense", on=of_ling_3),
            KimiDelta(on=other_than(of_ling_3)),
            replace(_BAILING_MOE, whole=(), padded=True),
            Projection("eh_proj", on=draft),
        ),
        since={"vllm": "0.32.0"},
        abbreviated=True,
        unused=_MLA_UNUSED + " expert_swiglu_limit_list group_norm_size kda_lower_bound kda_safe_gate linear_attention "
        "mtp_use_kda num_kv_heads_for_linear_attn share_expert_swiglu_limit_list short_conv_kernel_size use_kda_lora",
    ),
    "Dots3NoteForCausalLM": Family(  # vLLM models/dots3_note; its draft layer is dense
        (
            Mla(gate="attention_gate_type", on=other_than(_DOTS_SLIDING)),
            Mla(of="swa_", indexed=False, gate="attention_gate_type", on=_DOTS_SLIDING),
            Moe(shared="n_shared_experts", padded=True, dense=Mlp(padded=True), on=decoder_only(after_dense)),
            Projection("eh_proj", on=draft),
        ),
        since={"vllm": "0.32.0"},
        unused=_MLA_UNUSED + " apply_mla_qkv_lora_rescale swa_num_key_value_heads",
    ),
    "Ernie4_5_MoeForCausalLM": Family(  # SGLang models/ernie4.py; the draft layer is dense (ernie_mtp.py)
        (
            Attention(),
            Moe(experts="moe_num_experts", topk="moe_k", shared="moe_num_shared_experts", whole=(), on=between),
        )
    ),
    "ExaoneMoEForCausalLM": _EXAONE,  # K-EXAONE
    "ExaoneMoeForCausalLM": _EXAONE,
    "Llama4ForCausalLM": Family(
        (
            Attention(),
            Moe(
                width="intermediate_size",
                shared_width="intermediate_size",
                shared_at="feed_forward.shared_expert",
                whole=("vllm",),
                dense=Mlp("intermediate_size_mlp", at="feed_forward"),
                at="feed_forward",
                on=interleaved,
            ),
        ),
        unused="moe_layers",
    ),
    "DeepseekV4ForCausalLM": Family(
        (
            deepseek_v4.Attention(),
            deepseek_v4.HyperConnections(),
            deepseek_v4.RoutedExperts(),
            deepseek_v4.DraftProjections(),
        ),
        unused="num_key_value_heads qk_rope_head_dim qk_nope_head_dim v_head_dim index_topk compress_rates "
        "expert_dtype layer_types num_hash_layers mlp_layer_types swiglu_limit dspark_markov_rank",
    ),
}

#: ``model_type`` of the text part → its class, for models whose ``architectures`` name the class around it. Some of
#: DeepSeek-V4's checkpoints name V3's class.
TEXT_MODELS = {
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "deepseek_v32": "DeepseekV32ForCausalLM",
    "deepseek_v4": "DeepseekV4ForCausalLM",
    "ernie4_5_moe": "Ernie4_5_MoeForCausalLM",
    "glm4_moe": "Glm4MoeForCausalLM",
    "glm4v_moe_text": "Glm4MoeForCausalLM",
    "kimi_k2": "DeepseekV3ForCausalLM",
    "llama": "LlamaForCausalLM",
    "llama4_text": "Llama4ForCausalLM",
    "muse_glimmer_text": "MuseGlimmerForCausalLM",
    "minimax_m2": "MiniMaxM2ForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen2_5_vl_text": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_5_moe_text": "Qwen3_5MoeForCausalLM",
    "qwen3_5_text": "Qwen3_5ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "qwen3_omni_moe_text": "Qwen3MoeForCausalLM",
    "qwen3_vl_moe_text": "Qwen3MoeForCausalLM",
    "qwen3_vl_text": "Qwen3ForCausalLM",
    "step3p5": "Step3p5ForCausalLM",  # in Step-3.7
}


#: ``model_type`` → what such a model sends to DeepGEMM, which no rule here reads. Its checkpoints' linear layers are in
#: blocks of 1 × 32: vLLM 0.33.0 models/deepseek_v41 (``nvidia/ops/o_proj.py``, ``mhc.py``, ``mega_mhc.py``); SGLang
#: 0.5.23 models/deepseek_v4.py (``is_dsv41``), layers/attention/dsv4/v41_indexer.
NOT_READ = {
    "deepseek_v41": "its grouped output (fp8_einsum), hyper-connections and indexer call DeepGEMM in other forms "
    "than DeepSeek V4's",
}


def family_of(config: Config) -> Family | None:
    """The family of ``config``'s text model; None where no rule reads it."""
    if config.fields.get("model_type") == "deepseek_v4":
        return FAMILIES["DeepseekV4ForCausalLM"]
    return FAMILIES.get(config.architecture) or FAMILIES.get(
        TEXT_MODELS.get(str(config.fields.get("model_type")), "") if config.around else ""
    )


def describe(config: Config, serving: Serving) -> Model:
    """The layers of ``config``'s model. Raises ModelError for a field that is missing or makes no sense."""
    family, unknown = (known, ()) if (known := family_of(config)) else _plain(config)
    serving.check_class(config, family.since)
    decoder = config.number(family.layers, most=_MOST_LAYERS)
    drafts = config.number(family.draft, 0, least=0, most=_MOST_LAYERS)
    layers = Layers(tuple(range(decoder)), tuple(range(decoder, decoder + drafts)), family.draft_prefix)
    unused = tuple(family.unused.split())
    model = Model(layers.name, family.abbreviated, unused=unused, unknown=[*family.unknown, *unknown])
    for block in family.blocks:
        block.add(model, config, serving, layers)
    return model


def _plain(config: Config) -> tuple[Family, tuple[str, ...]]:
    """An architecture without a rule of its own, read as a plain decoder; and what that leaves open."""
    moe: Block = _MOE if config.has(_MOE.experts) else Mlp()
    if config.has("n_shared_experts"):
        moe = replace(_MOE, shared="n_shared_experts", on=after_dense)
    elif config.has("shared_expert_intermediate_size"):
        moe = _SHARED_MOE
    family, kind = Family((Attention(), moe)), "grouped-query attention with q, k and v fused"
    if config.has("kv_lora_rank"):
        family = Family((Mla(), moe), unused=_MLA_UNUSED)
        kind = "multi-head latent attention with q_a and kv_a fused"
    return family, (
        f"{config.architecture} has no rule of its own: read as {kind}, gate and up fused",
        "whether this engine fuses these projections, and whether it has others (a vision tower, a second attention, "
        "MTP projections), is not known: compare with the engine's model file",
    )
