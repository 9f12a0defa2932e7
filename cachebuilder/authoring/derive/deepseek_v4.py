"""DeepSeek V4's layers: a fused low-rank input projection, a grouped low-rank output projection, hyper-connections.

vLLM 0.33.0 ``models/deepseek_v4/attention.py``, ``compressor.py``, ``nvidia/model.py``, ``nvidia/mtp.py``,
``quant_config.py``; SGLang 0.5.23 ``models/deepseek_v4.py``, ``deepseek_v4_nextn.py``. The compressor's projection is
unquantised in both.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from cachebuilder.authoring.derive.blocks import Indexer
from cachebuilder.authoring.derive.config import Config, short
from cachebuilder.authoring.derive.layer_kinds import Layers, Numbers
from cachebuilder.authoring.derive.layers import Call, Experts, LeftOut, Linear, Linears, Model, Part, layers_text
from cachebuilder.authoring.derive.serving import Serving
from cachebuilder.authoring.derive.size import Size
from cachebuilder.errors import ModelError


@dataclass(frozen=True)
class HyperConnections:
    """The mixing of a token's ``hc_mult`` streams before each layer; none without that field."""

    def add(self, model: Model, config: Config, serving: Serving, layers: Layers) -> None:
        """Add the call that projects all streams of a token."""
        if config.has("hc_mult"):
            streams, hidden = config.number("hc_mult"), config.number("hidden_size")
            n, k = streams * (streams + 2), streams * hidden
            what = f"hyper-connections, {layers_text(layers.all)}: N = {n.how}; K = {k.how}"
            model.calls.append(Call("tf32_hc_prenorm_gemm", {"n": n, "k": k}, what))
            if serving.name == "vllm" and serving.at_least("0.32.0"):
                # The first layer's streams are all the embedding: mhc_pre_broadcast_tilelang, nvidia/model.py.
                what = (
                    f"hyper-connections, {layers_text(layers.decoder[:1])}: N = {n.how}; K = {hidden.how}: one stream"
                )
                model.calls.append(Call("tf32_hc_prenorm_gemm", {"n": n, "k": hidden}, what))


@dataclass(frozen=True)
class DraftProjections:
    """``e_proj`` and ``h_proj`` of the draft layers; DSpark's draft layers have two others instead."""

    def add(self, model: Model, config: Config, serving: Serving, layers: Layers) -> None:
        """Add both. h_proj takes a token's streams as so many rows (SGLang 0.5.23 models/deepseek_v4_nextn.py)."""
        if not layers.draft:
            return
        hidden, linears = config.number("hidden_size"), Linears(layers.draft, 1)
        if serving.name == "vllm" and config.has("dspark_block_size"):
            model.linears += self._dspark(config, serving, linears)
            return
        rows = config.number("hc_mult", 1) * serving.largest_m
        h_proj = linears.replicated("mtp.h_proj", [Part("h_proj", hidden)], hidden)
        model.linears += [
            linears.replicated("mtp.e_proj", [Part("e_proj", hidden)], hidden),
            replace(h_proj, tokens=rows, note=f"Up to {rows} rows: hc_mult rows a token."),
        ]

    def _dspark(self, config: Config, serving: Serving, linears: Linears) -> list[Linear]:
        """The projection of the target's hidden states, and that of all stages' keys and values from it.

        vLLM 0.25.0 to 0.33.0 ``models/deepseek_v4/nvidia/dspark.py``: three stages, whatever num_nextn_predict_layers
        is. Before 0.32.0, each stage's own ``fused_wqa_wkv`` projects its keys and values.
        """
        targets, stages = config.numbers("dspark_target_layer_ids"), config.number("n_mtp_layers", 3)
        hidden, dim = config.number("hidden_size"), config.number("head_dim")
        keys = [Part(f"mtp.{stage}.attn.wkv", dim) for stage in range(stages)]
        wide = Size(len(targets), f"{len(targets)} target layers") * hidden
        own = [linears.replicated("mtp.context_wkv_proj", keys, hidden)] if serving.at_least("0.32.0") else []
        return [linears.replicated("mtp.0.main_proj", hidden, wide), *own]


@dataclass(frozen=True)
class Attention:
    """Attention over compressed keys, with an indexer in the layers that compress by 4."""

    def add(self, model: Model, config: Config, serving: Serving, layers: Layers) -> None:
        """Add the projections, the grouped output's einsum and its scales at load."""
        hidden, heads, dim = (config.number(name) for name in ("hidden_size", "num_attention_heads", "head_dim"))
        q_rank, o_rank, groups = (config.number(name) for name in ("q_lora_rank", "o_lora_rank", "o_groups"))
        attention = Linears(layers.all, serving.ranks.attention)
        fused = [Part("self_attn.wq_a", q_rank), Part("self_attn.wkv", dim)]
        model.linears += [
            attention.replicated("attn.fused_wqa_wkv", fused, hidden),
            attention.column("attn.wq_b", [Part("self_attn.wq_b", heads * dim)], q_rank),
            attention.row("attn.wo_b", [Part("self_attn.wo_b", hidden)], groups * o_rank),
        ]
        ranks, per_group = serving.ranks.attention, heads * dim // groups
        if groups % ranks:
            raise ModelError(
                f"attn.wo_a: wanted o_groups a multiple of the {ranks} ranks that share them, found {groups}"
            )
        # Both engines: float32 scales on SM90, packed ones for each row from SM100 on (vLLM 0.33.0
        # models/deepseek_v4/nvidia/ops/o_proj.py, compute_fp8_einsum_recipe; SGLang 0.5.23 models/deepseek_v4.py,
        # _fp8_wo_a_einsum, on unless SGLANG_OPT_FP8_WO_A_GEMM=0).
        scales = {} if serving.gpu.major == 9 else {"scales": "packed", "recipe": [1, 1, 128]}
        over = f" / {ranks} ranks = {groups // ranks}" if ranks > 1 else ""
        what = (
            f"attn.wo_a, {layers_text(layers.all)}: h = {groups.how}{over}; d = {o_rank.how}; "
            f"r = {(heads * dim).how} / {groups.how} = {per_group}"
        )
        model.calls.append(Call("fp8_einsum", {"h": groups // ranks, "d": o_rank, "r": per_group, **scales}, what))
        model.calls += serving.grouped_output_at_load("attn.wo_a", groups // ranks, o_rank, per_group)
        # Layers that compress by 4 have an indexer (vLLM 0.33.0, models/deepseek_v4/attention.py).
        ratios = config.numbers("compress_ratios")
        indexed = tuple(number for number in layers.all if number < len(ratios) and ratios[number] == 4)
        if not ratios:
            model.unknown.append("compress_ratios is missing: this assumes an indexer in every layer")
            indexed = layers.all
        if indexed:
            Indexer("self_attn.indexer", v4=True, on=lambda *_: indexed).add(model, config, serving, layers)


@dataclass(frozen=True)
class RoutedExperts:
    """Routed experts in MXFP4, or in FP8, and the FP8 shared expert."""

    def add(self, model: Model, config: Config, serving: Serving, layers: Layers) -> None:
        """Add the experts: FP8 ones as other models' experts, MXFP4 ones in the engines' mega-MoE only."""
        hidden, intermediate = config.number("hidden_size"), config.number("moe_intermediate_size")
        shared = config.number("n_shared_experts", 0, least=0)
        if shared and not serving.fuses_into_mega_moe(shared):
            linears = Linears(layers.all, serving.ranks.shared)
            model.linears += linears.gated_mlp("mlp.shared_experts", hidden, shared * intermediate)
        count, topk = config.number("n_routed_experts"), config.number("num_experts_per_tok")
        mxfp4 = config.fields.get("expert_dtype", "fp4") != "fp8"
        routed = Experts(count, topk, hidden, intermediate, layers.all, clamp=_clamp(config), mxfp4=mxfp4)
        if not routed.mxfp4:
            model.experts.append(routed)
        elif serving.mega_moe:
            model.calls += serving.mega_moe_calls(routed, shared, _hashed(config, layers))
        else:
            # vLLM 0.33.0 models/deepseek_v4/quant_config.py: expert_dtype fp4 (the default) is Mxfp4MoEMethod.
            why = (
                "which function runs them is the engine's choice at start: add fp8_fp4_mega_moe or "
                "m_grouped_fp8_fp4_gemm_nt_contiguous by hand, or record the engine"
            )
            model.left_out.append(LeftOut(f"routed experts ({routed.count} of MXFP4 weights, on SM100)", why))


def _clamp(config: Config) -> float | None:
    """The limit of the experts' activation, by default that of transformers 5.24.0, configuration_deepseek_v4.py."""
    limit = config.fields.get("swiglu_limit", 10.0)
    if limit is None:
        return None
    if isinstance(limit, bool) or not isinstance(limit, int | float) or not limit > 0:
        raise ModelError(f"{config.path}: swiglu_limit: wanted a number above 0, found {short(limit)}")
    return float(limit)


def _hashed(config: Config, layers: Layers) -> Numbers:
    """The first layers, in which a token's hash chooses the experts (vLLM 0.33.0 models/deepseek_v4/nvidia/model.py).

    Three by default (transformers 5.24.0, configuration_deepseek_v4.py).
    """
    kinds = config.fields.get("mlp_layer_types")
    count = kinds.count("hash_moe") if isinstance(kinds, list) else config.number("num_hash_layers", 3, least=0)
    return layers.decoder[:count]
