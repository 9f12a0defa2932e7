"""The layers of each architecture, as both engines fuse them.

Read in the engines' model files: vLLM 0.25.0, 0.32.0 and 0.33.0 (``vllm/model_executor/models``, ``vllm/models``) and
SGLang 0.5.23 (``sglang/srt/models``); each function names its files. What the engines run unquantised in all of them is
not listed: embeddings, the LM head (``ParallelLMHead`` takes no FP8 method in ``Fp8Config.get_quant_method``, vLLM
0.33.0 ``layers/quantization/fp8.py``), routers, norms and V3's MTP ``eh_proj`` (a plain ``nn.Linear``, vLLM 0.33.0
``models/deepseek_mtp.py``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from cachebuilder.authoring.derive.config import Config
from cachebuilder.authoring.derive.layers import Call, Experts, LeftOut, Linear, Model, Part, numbers_text
from cachebuilder.authoring.derive.serving import Serving
from cachebuilder.errors import ModelError

_Layers = tuple[int, ...]

#: No model has a tenth; a config that says more is somebody's attempt at this machine's memory.
_MOST_LAYERS = 4096

NOT_AN_OP = "no op of this version of cachebuilder covers it"


def describe(config: Config, serving: Serving) -> Model:
    """The layers of ``config``'s model. Raises ModelError for a field that is missing or makes no sense."""
    # DeepSeek-V4's checkpoints are told apart by model_type: some name V3's class.
    family = _v4 if config.fields.get("model_type") == "deepseek_v4" else FAMILIES.get(config.architecture)
    if family is not None:
        return family(config, serving)
    return _generic(config, serving)


def _linear(
    module: str,
    parts: list[tuple[str, int, str]],
    k: tuple[int, str],
    split: str,
    ranks: int,
    layers: _Layers,
    **more: object,
) -> Linear:
    return Linear(module, tuple(Part(*part) for part in parts), *k, split, ranks, layers, **more)  # type: ignore[arg-type]


def _all_layers(config: Config, mtp: bool = True) -> _Layers:
    """All decoder layers; the multi-token-prediction ones follow the others, and have the same shapes."""
    extra = config.number("num_nextn_predict_layers", 0, least=0, most=_MOST_LAYERS) if mtp else 0
    return tuple(range(config.number("num_hidden_layers", most=_MOST_LAYERS) + extra))


def _mla(config: Config, serving: Serving) -> Model:
    """Multi-head latent attention with routed experts: DeepSeek V3, R1, V3.1, V3.2, Kimi-K2, GLM-5.

    vLLM 0.33.0 ``models/deepseek_v2.py`` (``DeepseekV2MLAAttention``, ``Indexer``) and
    ``models/deepseek_v32/attention.py``; 0.25.0 the same; SGLang 0.5.23 ``models/deepseek_v2.py`` and
    ``layers/attention/dsa/dsa_indexer.py``.
    """
    layers = _all_layers(config)
    hidden = config.number("hidden_size")
    heads = config.number("num_attention_heads")
    nope, rope = config.number("qk_nope_head_dim"), config.number("qk_rope_head_dim", least=0)
    value, kv_rank = config.number("v_head_dim"), config.number("kv_lora_rank")
    q_rank = config.number("q_lora_rank") if config.has("q_lora_rank") else None
    ranks, by_hidden = serving.attention_ranks, (hidden, f"hidden_size {hidden}")
    heads_how = f"num_attention_heads {heads}"
    q = (heads * (nope + rope), f"{heads_how} · (qk_nope_head_dim {nope} + qk_rope_head_dim {rope})")
    kv_a = ("self_attn.kv_a_proj_with_mqa", kv_rank + rope, f"kv_lora_rank {kv_rank} + qk_rope_head_dim {rope}")
    model = Model()
    add = model.linears.append
    if q_rank is None:
        add(_linear("self_attn.q_proj", [("self_attn.q_proj", *q)], by_hidden, "n", ranks, layers))
        add(_linear("self_attn.kv_a_proj_with_mqa", [kv_a], by_hidden, "none", 1, layers))
    else:
        q_a = ("self_attn.q_a_proj", q_rank, f"q_lora_rank {q_rank}")
        add(_linear("self_attn.fused_qkv_a_proj", [q_a, kv_a], by_hidden, "none", 1, layers))
        by_rank = (q_rank, f"q_lora_rank {q_rank}")
        add(_linear("self_attn.q_b_proj", [("self_attn.q_b_proj", *q)], by_rank, "n", ranks, layers))
    kv_b = (heads * (nope + value), f"{heads_how} · (qk_nope_head_dim {nope} + v_head_dim {value})")
    prefix = serving.prefix_tokens(config)
    add(
        _linear(
            "self_attn.kv_b_proj",
            [("self_attn.kv_b_proj", *kv_b)],
            (kv_rank, f"kv_lora_rank {kv_rank}"),
            "n",
            ranks,
            layers,
            tokens=prefix,
            note=f"Also called for context in the cache, up to {prefix} tokens." if prefix else "",
        )
    )
    o = (heads * value, f"{heads_how} · v_head_dim {value}")
    by_output = [("self_attn.o_proj", hidden, by_hidden[1])]
    add(_linear("self_attn.o_proj", by_output, o, "k", ranks, layers))
    if config.has("index_topk"):
        _add_indexer(model, config, serving, "self_attn.indexer", config.number("q_lora_rank"), layers)
    _add_mlp(model, config, serving, layers)
    return model


def _add_indexer(
    model: Model,
    config: Config,
    serving: Serving,
    name: str,
    q_rank: int,
    layers: _Layers,
    v4: bool = False,
) -> None:
    """The sparse attention's indexer: its query projection is FP8; the key's mostly runs in BF16 with the weights'."""
    heads, dim = config.number("index_n_heads"), config.number("index_head_dim")
    n = (f"{name}.wq_b", heads * dim, f"index_n_heads {heads} · index_head_dim {dim}")
    k = (q_rank, f"q_lora_rank {q_rank}")
    beside = None if v4 else serving.indexer_beside()
    model.linears.append(_linear(f"{name}.wq_b", [n], k, "none", 1, layers, beside=beside))
    if not v4 and serving.projects_indexer_keys(config):
        hidden = config.number("hidden_size")
        wk = (f"{name}.wk", dim, f"index_head_dim {dim}")
        model.linears.append(_linear(f"{name}.wk", [wk], (hidden, f"hidden_size {hidden}"), "none", 1, layers))
    model.calls += serving.indexer_calls(heads, f"{name}, layers {numbers_text(layers)}", v4)


def _v4(config: Config, serving: Serving) -> Model:
    """DeepSeek V4: a fused low-rank input projection, a grouped low-rank output projection, hyper-connections.

    vLLM 0.33.0 ``models/deepseek_v4/attention.py``, ``compressor.py``, ``nvidia/model.py``, ``nvidia/mtp.py``,
    ``quant_config.py``; SGLang 0.5.23 ``models/deepseek_v4.py``, ``deepseek_v4_nextn.py``. The compressor's projection
    is unquantised in both.
    """
    decoder, layers = _all_layers(config, mtp=False), _all_layers(config)
    hidden, heads, dim = (config.number(name) for name in ("hidden_size", "num_attention_heads", "head_dim"))
    q_rank, o_rank, groups = (config.number(name) for name in ("q_lora_rank", "o_lora_rank", "o_groups"))
    ranks, by_hidden = serving.attention_ranks, (hidden, f"hidden_size {hidden}")
    by_rank = (q_rank, f"q_lora_rank {q_rank}")
    model = Model()
    add = model.linears.append
    fused = [("self_attn.wq_a", q_rank, by_rank[1]), ("self_attn.wkv", dim, f"head_dim {dim}")]
    add(_linear("attn.fused_wqa_wkv", fused, by_hidden, "none", 1, layers))
    q = [("self_attn.wq_b", heads * dim, f"num_attention_heads {heads} · head_dim {dim}")]
    add(_linear("attn.wq_b", q, by_rank, "n", ranks, layers))
    o = (groups * o_rank, f"o_groups {groups} · o_lora_rank {o_rank}")
    add(_linear("attn.wo_b", [("self_attn.wo_b", hidden, by_hidden[1])], o, "k", ranks, layers))
    per_group = heads * dim // groups
    if groups % ranks:
        raise ModelError(f"attn.wo_a: wanted o_groups a multiple of the {ranks} ranks that share them, found {groups}")
    # Both engines: float32 scales on SM90, packed ones for each row from SM100 on (vLLM 0.33.0
    # models/deepseek_v4/nvidia/ops/o_proj.py, compute_fp8_einsum_recipe; SGLang 0.5.23 models/deepseek_v4.py,
    # _fp8_wo_a_einsum, on unless SGLANG_OPT_FP8_WO_A_GEMM=0).
    scales = {} if serving.gpu.major == 9 else {"scales": "packed", "recipe": [1, 1, 128]}
    over = f" / {ranks} ranks = {groups // ranks}" if ranks > 1 else ""
    what = (
        f"attn.wo_a, layers {numbers_text(layers)}: h = o_groups {groups}{over}; d = o_lora_rank {o_rank}; "
        f"r = num_attention_heads {heads} · head_dim {dim} / o_groups {groups} = {per_group}"
    )
    model.calls.append(Call("fp8_einsum", {"h": groups // ranks, "d": o_rank, "r": per_group, **scales}, what))
    model.calls += serving.grouped_output_at_load("attn.wo_a", groups // ranks, o_rank, per_group)
    # Layers that compress by 4 have an indexer (vLLM 0.33.0, models/deepseek_v4/attention.py).
    ratios = config.numbers("compress_ratios")
    indexed = tuple(number for number in layers if number < len(ratios) and ratios[number] == 4)
    if not ratios:
        model.unknown.append("compress_ratios is missing: every layer is taken to have an indexer")
        indexed = layers
    if indexed:
        _add_indexer(model, config, serving, "self_attn.indexer", q_rank, indexed, v4=True)
    if config.has("hc_mult"):
        mult = config.number("hc_mult")
        n, k = mult * (mult + 2), mult * hidden
        what = f"hyper-connections, layers {numbers_text(layers)}: N = {mult} · ({mult} + 2); K = {mult} · hidden_size"
        model.calls.append(Call("tf32_hc_prenorm_gemm", {"n": n, "k": k}, what))
    intermediate, count, topk = (
        config.number(name) for name in ("moe_intermediate_size", "n_routed_experts", "num_experts_per_tok")
    )
    shared = config.number("n_shared_experts", 0, least=0)
    if shared and not serving.fuses_into_mega_moe(shared):
        how = f"n_shared_experts {shared} · moe_intermediate_size {intermediate}"
        _add_gated(model, "mlp.shared_experts", hidden, shared * intermediate, how, serving.shared_ranks, layers)
    routed = replace(
        _experts(count, topk, hidden, intermediate, layers, "n_routed_experts"),
        clamp=_v4_clamp(config),
        mxfp4=config.fields.get("expert_dtype", "fp4") != "fp8",
    )
    if not routed.mxfp4:
        model.experts.append(routed)
    elif serving.mega_moe:
        model.calls += serving.mega_moe_calls(routed, shared, _v4_hashed(config, decoder))
    else:
        # vLLM 0.33.0 models/deepseek_v4/quant_config.py: expert_dtype fp4 (the default) is Mxfp4MoEMethod.
        why = (
            "which function runs them is the engine's choice at start: add fp8_fp4_mega_moe or "
            "m_grouped_fp8_fp4_gemm_nt_contiguous by hand, or record the engine"
        )
        model.left_out.append(LeftOut(f"routed experts ({count} of MXFP4 weights, on SM100)", why))
    if mtp := layers[len(decoder) :]:
        # h_proj takes the hyper-connection's streams of a token as so many rows (SGLang deepseek_v4_nextn.py).
        rows = config.number("hc_mult", 1) * serving.largest_m
        for name, tokens in (("e_proj", None), ("h_proj", rows)):
            parts = [(name, hidden, by_hidden[1])]
            note = f"Up to {tokens} rows: hc_mult rows a token." if tokens else ""
            add(_linear(f"mtp.{name}", parts, by_hidden, "none", 1, mtp, tokens=tokens, note=note))
    return model


def _v4_clamp(config: Config) -> float | None:
    """The limit of the experts' activation; left out it is transformers' (5.24.0, configuration_deepseek_v4.py)."""
    limit = config.fields.get("swiglu_limit", 10.0)
    if limit is None:
        return None
    if isinstance(limit, bool) or not isinstance(limit, int | float) or not limit > 0:
        raise ModelError(f"{config.path}: swiglu_limit: wanted a number above 0, found {str(limit)[:40]!r}")
    return float(limit)


def _v4_hashed(config: Config, decoder: _Layers) -> tuple[int, ...]:
    """Layers whose experts a token's hash gives: the first so many (vLLM 0.33.0 models/deepseek_v4/nvidia/model.py).

    Left out, three are (transformers 5.24.0, configuration_deepseek_v4.py).
    """
    kinds = config.fields.get("mlp_layer_types")
    count = kinds.count("hash_moe") if isinstance(kinds, list) else config.number("num_hash_layers", 3, least=0)
    return tuple(decoder[:count])


def _attention(config: Config, serving: Serving, layers: _Layers, gate: bool = False) -> list[Linear]:
    """Grouped-query attention: ``qkv_proj`` and ``o_proj``. K and V heads are copied to ranks beyond their number.

    vLLM 0.33.0 ``model_executor/layers/linear.py``, ``QKVParallelLinear``; SGLang 0.5.23 ``layers/linear.py`` alike.
    """
    hidden, heads = config.number("hidden_size"), config.number("num_attention_heads")
    kv_heads = config.number("num_key_value_heads", heads)
    dim = config.number("head_dim", hidden // heads)
    ranks, by_hidden = serving.attention_ranks, (hidden, f"hidden_size {hidden}")
    head_how = f"head_dim {dim}"
    gate_how = "2 (query and gate) · " if gate else ""
    q = Part(
        "self_attn.q_proj", heads * dim * (2 if gate else 1), f"{gate_how}num_attention_heads {heads} · {head_how}"
    )
    kv_how = f"num_key_value_heads {kv_heads} · {head_how}"
    parts = (q, *(Part(f"self_attn.{name}_proj", kv_heads * dim, kv_how, least=dim) for name in "kv"))
    o = (heads * dim, f"num_attention_heads {heads} · {head_how}")
    return [
        Linear("self_attn.qkv_proj", parts, *by_hidden, "n", ranks, layers),
        _linear("self_attn.o_proj", [("self_attn.o_proj", hidden, by_hidden[1])], o, "k", ranks, layers),
    ]


def _gqa(config: Config, serving: Serving) -> Model:
    """Grouped-query attention, dense or with routed experts: Qwen3, Qwen3-MoE, GLM-4.5 to 4.7.

    vLLM 0.33.0 ``models/qwen3.py``, ``qwen3_moe.py``, ``glm4_moe.py``; SGLang 0.5.23 files of the same names.
    """
    layers = _all_layers(config)
    model = Model(linears=_attention(config, serving, layers))
    _add_mlp(model, config, serving, layers)
    return model


def _qwen3_next(config: Config, serving: Serving) -> Model:
    """Qwen3-Next: gated delta net layers, each fourth one a gated attention; experts in all.

    vLLM 0.33.0 ``models/qwen3_next.py``, ``layers/mamba/gdn/qwen_gdn_linear_attn.py``; SGLang 0.5.23
    ``models/qwen3_next.py``. ``in_proj_ba`` (N of some dozens) has no block-FP8 weights: "ba_proj doesn't support
    blockwise fp8 quantization" (vLLM).
    """
    layers = _all_layers(config, mtp=False)
    types = config.fields.get("layer_types")
    every = config.number("full_attention_interval", 4)
    full = tuple(
        number
        for number in layers
        if (
            types[number] == "full_attention"
            if isinstance(types, list) and len(types) == len(layers)
            else (number + 1) % every == 0
        )
    )
    linear = tuple(number for number in layers if number not in full)
    model = Model()
    if full:
        model.linears += _attention(config, serving, full, gate=True)
    if linear:
        hidden = config.number("hidden_size")
        keys = config.number("linear_num_key_heads") * config.number("linear_key_head_dim")
        values = config.number("linear_num_value_heads") * config.number("linear_value_head_dim")
        ranks, by_hidden = serving.attention_ranks, (hidden, f"hidden_size {hidden}")
        qkvz = (
            "linear_attn.in_proj_qkvz",
            2 * keys + 2 * values,
            f"2 · (key {keys} + value {values}), heads · head_dim",
        )
        model.linears += [
            _linear("linear_attn.in_proj_qkvz", [qkvz], by_hidden, "n", ranks, linear),
            _linear(
                "linear_attn.out_proj",
                [("linear_attn.out_proj", hidden, by_hidden[1])],
                (values, f"linear value heads {values}"),
                "k",
                ranks,
                linear,
            ),
        ]
        model.left_out.append(LeftOut("linear_attn.in_proj_ba", "both engines take it to have no block-FP8 weights"))
    _add_mlp(model, config, serving, layers)
    model.unknown.append("the MTP layer has the same shapes; its fc is taken to be unquantised")
    return model


def _generic(config: Config, serving: Serving) -> Model:
    """An architecture that has no rule here, read as a plain decoder; says what that leaves open."""
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
    dense, sparse = _dense_and_sparse(config, layers)
    if dense:
        intermediate = config.number("intermediate_size")
        how = f"intermediate_size {intermediate}"
        _add_gated(model, "mlp", hidden, intermediate, how, serving.tp, dense)
    if not sparse:
        return
    name = _expert_count_field(config)
    count, topk = config.number(name or "n_routed_experts"), config.number("num_experts_per_tok")
    intermediate = config.number("moe_intermediate_size")
    shared = config.number("n_shared_experts", 0, least=0)
    shared_width, how = shared * intermediate, f"n_shared_experts {shared} · moe_intermediate_size {intermediate}"
    if not shared:
        shared_width = config.number("shared_expert_intermediate_size", 0, least=0)
        how = f"shared_expert_intermediate_size {shared_width}"
    fused = (shared or 1) if shared_width and serving.fuses_shared_experts(config, shared) else 0
    if shared_width and not fused:
        module = "mlp.shared_experts" if shared else "mlp.shared_expert"
        _add_gated(model, module, hidden, shared_width, how, serving.shared_ranks, sparse)
    experts = _experts(count, topk + fused, hidden, intermediate, sparse, name or "n_routed_experts")
    model.experts.append(replace(experts, fused=fused))


def _add_gated(
    model: Model, module: str, hidden: int, intermediate: int, how: str, ranks: int, layers: _Layers
) -> None:
    """``gate_up_proj`` and ``down_proj`` of a gated MLP."""
    by_hidden = (hidden, f"hidden_size {hidden}")
    gate_up = [(f"{module}.{name}_proj", intermediate, how) for name in ("gate", "up")]
    down = [(f"{module}.down_proj", hidden, by_hidden[1])]
    model.linears += [
        _linear(f"{module}.gate_up_proj", gate_up, by_hidden, "n", ranks, layers),
        _linear(f"{module}.down_proj", down, (intermediate, how), "k", ranks, layers),
    ]


def _experts(count: int, topk: int, hidden: int, intermediate: int, layers: _Layers, name: str) -> Experts:
    return Experts("mlp.experts", count, topk, hidden, intermediate, layers, f"{name} {count}")


def _expert_count_field(config: Config) -> str | None:
    return next((name for name in ("n_routed_experts", "num_experts", "num_local_experts") if config.has(name)), None)


def _dense_and_sparse(config: Config, layers: _Layers) -> tuple[_Layers, _Layers]:
    """Layers with a dense MLP, and those with experts.

    ``first_k_dense_replace`` and ``moe_layer_freq``: vLLM 0.33.0 ``models/deepseek_v2.py``, ``glm4_moe.py``;
    ``mlp_only_layers`` and ``decoder_sparse_step``: ``models/qwen3_moe.py``.
    """
    if _expert_count_field(config) is None:
        return layers, ()
    if not config.has("moe_intermediate_size"):
        raise ModelError(f"{config.path}: moe_intermediate_size: missing; {config.architecture} has experts")
    first = config.number("first_k_dense_replace", 0, least=0)
    only = set(config.numbers("mlp_only_layers"))
    step = config.number("decoder_sparse_step", 1)
    freq = config.number("moe_layer_freq", 1) if isinstance(config.fields.get("moe_layer_freq"), int) else 1
    sparse = tuple(
        number
        for number in layers
        if number >= first and number not in only and (number + 1) % step == 0 and number % freq == 0
    )
    return tuple(number for number in layers if number not in sparse), sparse


#: ``architectures[0]`` → its layers. A new family is one function and its line here.
FAMILIES: dict[str, Callable[[Config, Serving], Model]] = {
    "DeepseekV3ForCausalLM": _mla,  # DeepSeek V3, R1, V3.1; Kimi-K2 too
    "DeepseekV32ForCausalLM": _mla,
    "GlmMoeDsaForCausalLM": _mla,  # GLM-5
    "DeepseekV4ForCausalLM": _v4,
    "Qwen3ForCausalLM": _gqa,
    "Qwen3MoeForCausalLM": _gqa,
    "Glm4MoeForCausalLM": _gqa,  # GLM-4.5, 4.6, 4.7
    "Qwen3NextForCausalLM": _qwen3_next,
}
