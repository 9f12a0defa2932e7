"""The layers of each architecture, as both engines fuse them.

Read in the engines' model files: vLLM 0.25.0, 0.32.0 and 0.33.0 (``vllm/model_executor/models``, ``vllm/models``) and
SGLang 0.5.23 (``sglang/srt/models``); each function names its files. What the engines always run unquantised is not
listed: embeddings, the LM head (``ParallelLMHead`` takes no FP8 method in ``Fp8Config.get_quant_method``, vLLM 0.33.0
``layers/quantization/fp8.py``), routers, norms and V3's MTP ``eh_proj`` (a plain ``nn.Linear``, vLLM 0.33.0
``models/deepseek_mtp.py``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from cachebuilder.authoring.derive.config import Config
from cachebuilder.authoring.derive.layers import Call, Experts, LeftOut, Linear, Linears, Model, Part, layers_text
from cachebuilder.authoring.derive.serving import Serving
from cachebuilder.authoring.derive.size import Size
from cachebuilder.errors import ModelError

_Layers = tuple[int, ...]

#: No model has a tenth of these; a config that names more would fill this machine's memory.
_MOST_LAYERS = 4096


def describe(config: Config, serving: Serving) -> Model:
    """The layers of ``config``'s model. Raises ModelError for a field that is missing or makes no sense."""
    # Some of DeepSeek-V4's checkpoints name V3's class: model_type tells them apart.
    family = _deepseek_v4 if config.fields.get("model_type") == "deepseek_v4" else FAMILIES.get(config.architecture)
    return (family or _unknown)(config, serving)


def _decoder_layers(config: Config) -> _Layers:
    return tuple(range(config.number("num_hidden_layers", most=_MOST_LAYERS)))


def _all_layers(config: Config) -> _Layers:
    """The decoder layers, then those of multi-token prediction, which have the same shapes."""
    decoder = len(_decoder_layers(config))
    return tuple(range(decoder + config.number("num_nextn_predict_layers", 0, least=0, most=_MOST_LAYERS)))


def _mla(config: Config, serving: Serving) -> Model:
    """Multi-head latent attention with routed experts: DeepSeek V3, R1, V3.1, V3.2, Kimi-K2, GLM-5.

    vLLM 0.33.0 ``models/deepseek_v2.py`` (``DeepseekV2MLAAttention``, ``Indexer``) and
    ``models/deepseek_v32/attention.py``; 0.25.0 the same; SGLang 0.5.23 ``models/deepseek_v2.py`` and
    ``layers/attention/dsa/dsa_indexer.py``.
    """
    layers = _all_layers(config)
    hidden, heads = config.number("hidden_size"), config.number("num_attention_heads")
    nope, rope = config.number("qk_nope_head_dim"), config.number("qk_rope_head_dim", least=0)
    value, kv_rank = config.number("v_head_dim"), config.number("kv_lora_rank")
    attention = Linears(layers, serving.ranks.attention)
    q, kv_a = heads * (nope + rope), kv_rank + rope
    model = Model()
    if config.has("q_lora_rank"):
        q_rank = config.number("q_lora_rank")
        fused = [Part("self_attn.q_a_proj", q_rank), Part("self_attn.kv_a_proj_with_mqa", kv_a)]
        model.linears += [
            attention.replicated("self_attn.fused_qkv_a_proj", fused, hidden),
            attention.column("self_attn.q_b_proj", q, q_rank),
        ]
    else:
        model.linears += [
            attention.column("self_attn.q_proj", q, hidden),
            attention.replicated("self_attn.kv_a_proj_with_mqa", kv_a, hidden),
        ]
    kv_b = attention.column("self_attn.kv_b_proj", heads * (nope + value), kv_rank)
    if prefix := serving.prefix_tokens(config):
        kv_b = replace(kv_b, tokens=prefix, note=f"Also called for context in the cache, up to {prefix} tokens.")
    model.linears += [kv_b, attention.row("self_attn.o_proj", hidden, heads * value)]
    if config.has("index_topk"):
        _add_indexer(model, config, serving, layers)
    _add_mlp(model, config, serving, layers)
    return model


def _add_indexer(model: Model, config: Config, serving: Serving, layers: _Layers, v4: bool = False) -> None:
    """The indexer of sparse attention: FP8 projections of the queries and, in some engines, of the keys; its logits."""
    name = "self_attn.indexer"
    heads, dim = config.number("index_n_heads"), config.number("index_head_dim")
    indexer = Linears(layers, 1)
    queries = indexer.replicated(f"{name}.wq_b", heads * dim, config.number("q_lora_rank"))
    model.linears.append(queries if v4 else replace(queries, beside=serving.indexer_beside()))
    if not v4 and serving.projects_indexer_keys(config):
        model.linears.append(indexer.replicated(f"{name}.wk", dim, config.number("hidden_size")))
    model.calls += serving.indexer_logits(v4).calls(heads, f"{name}, {layers_text(layers)}")


def _deepseek_v4(config: Config, serving: Serving) -> Model:
    """DeepSeek V4: a fused low-rank input projection, a grouped low-rank output projection, hyper-connections.

    vLLM 0.33.0 ``models/deepseek_v4/attention.py``, ``compressor.py``, ``nvidia/model.py``, ``nvidia/mtp.py``,
    ``quant_config.py``; SGLang 0.5.23 ``models/deepseek_v4.py``, ``deepseek_v4_nextn.py``. The compressor's projection
    is unquantised in both.
    """
    layers, hidden = _all_layers(config), config.number("hidden_size")
    model = Model()
    _add_v4_attention(model, config, serving, layers)
    if config.has("hc_mult"):
        streams = config.number("hc_mult")
        n, k = streams * (streams + 2), streams * hidden
        what = f"hyper-connections, {layers_text(layers)}: N = {n.how}; K = {k.how}"
        model.calls.append(Call("tf32_hc_prenorm_gemm", {"n": n, "k": k}, what))
    _add_v4_experts(model, config, serving, layers)
    if mtp := layers[len(_decoder_layers(config)) :]:
        # h_proj takes the hyper-connection's streams of a token as so many rows (SGLang deepseek_v4_nextn.py).
        rows = config.number("hc_mult", 1) * serving.largest_m
        h_proj = Linears(mtp, 1).replicated("mtp.h_proj", [Part("h_proj", hidden)], hidden)
        model.linears += [
            Linears(mtp, 1).replicated("mtp.e_proj", [Part("e_proj", hidden)], hidden),
            replace(h_proj, tokens=rows, note=f"Up to {rows} rows: hc_mult rows a token."),
        ]
    return model


def _add_v4_attention(model: Model, config: Config, serving: Serving, layers: _Layers) -> None:
    hidden, heads, dim = (config.number(name) for name in ("hidden_size", "num_attention_heads", "head_dim"))
    q_rank, o_rank, groups = (config.number(name) for name in ("q_lora_rank", "o_lora_rank", "o_groups"))
    attention = Linears(layers, serving.ranks.attention)
    fused = [Part("self_attn.wq_a", q_rank), Part("self_attn.wkv", dim)]
    model.linears += [
        attention.replicated("attn.fused_wqa_wkv", fused, hidden),
        attention.column("attn.wq_b", [Part("self_attn.wq_b", heads * dim)], q_rank),
        attention.row("attn.wo_b", [Part("self_attn.wo_b", hidden)], groups * o_rank),
    ]
    ranks, per_group = serving.ranks.attention, heads * dim // groups
    if groups % ranks:
        raise ModelError(f"attn.wo_a: wanted o_groups a multiple of the {ranks} ranks that share them, found {groups}")
    # Both engines: float32 scales on SM90, packed ones for each row from SM100 on (vLLM 0.33.0
    # models/deepseek_v4/nvidia/ops/o_proj.py, compute_fp8_einsum_recipe; SGLang 0.5.23 models/deepseek_v4.py,
    # _fp8_wo_a_einsum, on unless SGLANG_OPT_FP8_WO_A_GEMM=0).
    scales = {} if serving.gpu.major == 9 else {"scales": "packed", "recipe": [1, 1, 128]}
    over = f" / {ranks} ranks = {groups // ranks}" if ranks > 1 else ""
    what = (
        f"attn.wo_a, {layers_text(layers)}: h = {groups.how}{over}; d = {o_rank.how}; "
        f"r = {(heads * dim).how} / {groups.how} = {per_group}"
    )
    model.calls.append(Call("fp8_einsum", {"h": groups // ranks, "d": o_rank, "r": per_group, **scales}, what))
    model.calls += serving.grouped_output_at_load("attn.wo_a", groups // ranks, o_rank, per_group)
    # Layers that compress by 4 have an indexer (vLLM 0.33.0, models/deepseek_v4/attention.py).
    ratios = config.numbers("compress_ratios")
    indexed = tuple(number for number in layers if number < len(ratios) and ratios[number] == 4)
    if not ratios:
        model.unknown.append("compress_ratios is missing: this assumes an indexer in every layer")
        indexed = layers
    if indexed:
        _add_indexer(model, config, serving, indexed, v4=True)


def _add_v4_experts(model: Model, config: Config, serving: Serving, layers: _Layers) -> None:
    hidden, intermediate = config.number("hidden_size"), config.number("moe_intermediate_size")
    shared = config.number("n_shared_experts", 0, least=0)
    if shared and not serving.fuses_into_mega_moe(shared):
        linears = Linears(layers, serving.ranks.shared)
        model.linears += linears.gated_mlp("mlp.shared_experts", hidden, shared * intermediate)
    count, topk = config.number("n_routed_experts"), config.number("num_experts_per_tok")
    mxfp4 = config.fields.get("expert_dtype", "fp4") != "fp8"
    routed = Experts(count, topk, hidden, intermediate, layers, clamp=_v4_clamp(config), mxfp4=mxfp4)
    if not routed.mxfp4:
        model.experts.append(routed)
    elif serving.mega_moe:
        model.calls += serving.mega_moe_calls(routed, shared, _v4_hashed(config))
    else:
        # vLLM 0.33.0 models/deepseek_v4/quant_config.py: expert_dtype fp4 (the default) is Mxfp4MoEMethod.
        why = (
            "which function runs them is the engine's choice at start: add fp8_fp4_mega_moe or "
            "m_grouped_fp8_fp4_gemm_nt_contiguous by hand, or record the engine"
        )
        model.left_out.append(LeftOut(f"routed experts ({routed.count} of MXFP4 weights, on SM100)", why))


def _v4_clamp(config: Config) -> float | None:
    """The limit of the experts' activation, by default that of transformers 5.24.0, configuration_deepseek_v4.py."""
    limit = config.fields.get("swiglu_limit", 10.0)
    if limit is None:
        return None
    if isinstance(limit, bool) or not isinstance(limit, int | float) or not limit > 0:
        raise ModelError(f"{config.path}: swiglu_limit: wanted a number above 0, found {str(limit)[:40]!r}")
    return float(limit)


def _v4_hashed(config: Config) -> _Layers:
    """The first layers, in which a token's hash chooses the experts (vLLM 0.33.0 models/deepseek_v4/nvidia/model.py).

    Three by default (transformers 5.24.0, configuration_deepseek_v4.py).
    """
    kinds = config.fields.get("mlp_layer_types")
    count = kinds.count("hash_moe") if isinstance(kinds, list) else config.number("num_hash_layers", 3, least=0)
    return _decoder_layers(config)[:count]


def _attention(config: Config, serving: Serving, layers: _Layers, gate: bool = False) -> list[Linear]:
    """Grouped-query attention: ``qkv_proj`` and ``o_proj``. Ranks beyond the number of K and V heads hold copies.

    vLLM 0.33.0 ``model_executor/layers/linear.py``, ``QKVParallelLinear``; SGLang 0.5.23 ``layers/linear.py`` alike.
    """
    hidden, heads = config.number("hidden_size"), config.number("num_attention_heads")
    kv_heads = config.number("num_key_value_heads", heads)
    dim = config.number("head_dim", hidden // heads)
    attention = Linears(layers, serving.ranks.attention)
    q = heads * dim
    parts = [
        Part("self_attn.q_proj", Size(2, "2 (query and gate)") * q if gate else q),
        Part("self_attn.k_proj", kv_heads * dim, least=dim),
        Part("self_attn.v_proj", kv_heads * dim, least=dim),
    ]
    return [attention.column("self_attn.qkv_proj", parts, hidden), attention.row("self_attn.o_proj", hidden, q)]


def _gqa(config: Config, serving: Serving) -> Model:
    """Grouped-query attention, dense or with routed experts: Qwen3, Qwen3-MoE, GLM-4.5 to 4.7.

    vLLM 0.33.0 ``models/qwen3.py``, ``qwen3_moe.py``, ``glm4_moe.py``; SGLang 0.5.23 files of the same names.
    """
    layers = _all_layers(config)
    model = Model(linears=_attention(config, serving, layers))
    _add_mlp(model, config, serving, layers)
    return model


def _qwen3_next(config: Config, serving: Serving) -> Model:
    """Qwen3-Next: gated attention in each fourth layer, a gated delta net in the others; experts in all.

    vLLM 0.33.0 ``models/qwen3_next.py``, ``layers/mamba/gdn/qwen_gdn_linear_attn.py``; SGLang 0.5.23
    ``models/qwen3_next.py``. ``in_proj_ba`` (N of some dozens) has no block-FP8 weights: "ba_proj doesn't support
    blockwise fp8 quantization" (vLLM).
    """
    layers = _decoder_layers(config)
    types = config.fields.get("layer_types")
    if isinstance(types, list) and len(types) == len(layers):
        full = tuple(number for number in layers if types[number] == "full_attention")
    else:
        interval = config.number("full_attention_interval", 4)
        full = tuple(number for number in layers if (number + 1) % interval == 0)
    delta_net = tuple(number for number in layers if number not in full)
    model = Model()
    if full:
        model.linears += _attention(config, serving, full, gate=True)
    if delta_net:
        hidden = config.number("hidden_size")
        keys = config.number("linear_num_key_heads") * config.number("linear_key_head_dim")
        values = config.number("linear_num_value_heads") * config.number("linear_value_head_dim")
        linears = Linears(delta_net, serving.ranks.attention)
        model.linears += [
            linears.column("linear_attn.in_proj_qkvz", 2 * (keys + values), hidden),
            linears.row("linear_attn.out_proj", hidden, values),
        ]
        model.left_out.append(LeftOut("linear_attn.in_proj_ba", "both engines expect it without block-FP8 weights"))
    _add_mlp(model, config, serving, layers)
    model.unknown.append(
        "whether the MTP layer's fc is quantised: this assumes that it is not; its other shapes are the decoder's"
    )
    return model


def _unknown(config: Config, serving: Serving) -> Model:
    """An architecture without a rule of its own, read as a plain decoder; says what that leaves open."""
    if config.has("kv_lora_rank"):
        model = _mla(config, serving)
        kind = "multi-head latent attention with q_a and kv_a fused"
    else:
        model = _gqa(config, serving)
        kind = "grouped-query attention with q, k and v fused"
    model.unknown += [
        f"{config.architecture} has no rule of its own: read as {kind}, gate and up fused",
        "whether this engine fuses these projections, and whether it has others (a vision tower, a second attention, "
        "MTP projections), is not known: compare with the engine's model file",
    ]
    return model


def _add_mlp(model: Model, config: Config, serving: Serving, layers: _Layers) -> None:
    """The feed-forward part: dense in the first layers or those listed, else routed and shared experts."""
    hidden = config.number("hidden_size")
    names = ("n_routed_experts", "num_experts", "num_local_experts")
    count = next((config.number(name) for name in names if config.has(name)), None)
    dense, sparse = (layers, ()) if count is None else _dense_and_sparse(config, layers)
    if dense:
        model.linears += Linears(dense, serving.tp).gated_mlp("mlp", hidden, config.number("intermediate_size"))
    if count is None or not sparse:
        return
    topk, intermediate = config.number("num_experts_per_tok"), config.number("moe_intermediate_size")
    shared = config.number("n_shared_experts", 0, least=0)
    if shared:
        module, width = "mlp.shared_experts", shared * intermediate
    else:
        module, width = "mlp.shared_expert", config.number("shared_expert_intermediate_size", 0, least=0)
    fused = (shared or 1) if width and serving.fuses_shared_experts(config, shared) else 0
    if width and not fused:
        model.linears += Linears(sparse, serving.ranks.shared).gated_mlp(module, hidden, width)
    model.experts.append(Experts(count, topk + fused, hidden, intermediate, sparse, fused))


def _dense_and_sparse(config: Config, layers: _Layers) -> tuple[_Layers, _Layers]:
    """Of a model with experts: layers with a dense MLP, and those with experts.

    ``first_k_dense_replace`` and ``moe_layer_freq``: vLLM 0.33.0 ``models/deepseek_v2.py``, ``glm4_moe.py``;
    ``mlp_only_layers`` and ``decoder_sparse_step``: ``models/qwen3_moe.py``.
    """
    if not config.has("moe_intermediate_size"):
        raise ModelError(f"{config.path}: moe_intermediate_size: missing; {config.architecture} has experts")
    first = config.number("first_k_dense_replace", 0, least=0)
    only_dense = set(config.numbers("mlp_only_layers"))
    step = config.number("decoder_sparse_step", 1)
    frequency = config.number("moe_layer_freq", 1) if isinstance(config.fields.get("moe_layer_freq"), int) else 1
    candidates = (number for number in layers if number >= first and number not in only_dense)
    sparse = tuple(number for number in candidates if (number + 1) % step == 0 and number % frequency == 0)
    return tuple(number for number in layers if number not in sparse), sparse


#: ``architectures[0]`` → its layers. A new family is one function and its line here.
FAMILIES: dict[str, Callable[[Config, Serving], Model]] = {
    "DeepseekV3ForCausalLM": _mla,  # DeepSeek V3, R1, V3.1; Kimi-K2
    "DeepseekV32ForCausalLM": _mla,
    "GlmMoeDsaForCausalLM": _mla,  # GLM-5
    "DeepseekV4ForCausalLM": _deepseek_v4,
    "Qwen3ForCausalLM": _gqa,
    "Qwen3MoeForCausalLM": _gqa,
    "Glm4MoeForCausalLM": _gqa,  # GLM-4.5, 4.6, 4.7
    "Qwen3NextForCausalLM": _qwen3_next,
}
