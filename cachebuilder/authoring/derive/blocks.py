"""The parts that decoder layers are made of: attention, feed-forward networks, experts.

A block is data: the names of the config's fields that its sizes come from, and the arithmetic. `families` puts blocks
together. ``at`` is the block's name below the decoder layer; ``on`` says which layers have it.

Both engines fuse alike: vLLM 0.33.0 ``model_executor/layers/linear.py``, SGLang 0.5.23 ``srt/layers/linear.py``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

from cachebuilder.authoring.derive.config import Config
from cachebuilder.authoring.derive.layer_kinds import Layers, Numbers, Where, attending, everywhere
from cachebuilder.authoring.derive.layers import Experts, Linears, Model, Part, layers_text
from cachebuilder.authoring.derive.quantization import BLOCK
from cachebuilder.authoring.derive.serving import Serving
from cachebuilder.authoring.derive.size import Size
from cachebuilder.errors import ModelError
from cachebuilder.ops.device import round_up


class Block(Protocol):
    """Adds its layers to a model."""

    def add(self, model: Model, config: Config, serving: Serving, layers: Layers) -> None:
        """Add this block's linear layers, experts and calls. Raises ModelError for a field that makes no sense."""


@dataclass(frozen=True)
class Attention:
    """Grouped-query attention: ``qkv_proj`` and ``o_proj``. Ranks beyond the number of K and V heads hold copies.

    Attributes:
        heads_by_layer: the field with a number of query heads for each layer, where the config has it.
        gate: the field that says whether the query's projection also holds a gate of its size; ``True``: it does.
        head_gate: the field that says whether ``g_proj`` gives one gate for each head: true or ``per-head``; one for
            each of the query's elements: ``per-element``.
        own_gate: the layer that gives a gate of the query's size.
        split_in: engines that do not fuse query, key and value.
        fused: the checkpoint has one weight for query, key and value.
        checked: an engine refuses a division within a block (MiMo-V2's ``qkv_proj`` has ``skip_block_quant_check`` in
            SGLang 0.5.23).
    """

    heads: str = "num_attention_heads"
    kv_heads: str = "num_key_value_heads"
    dim: str = "head_dim"
    value_dim: str = ""
    heads_by_layer: str = ""
    gate: str | bool = False
    head_gate: str = ""
    own_gate: str = ""
    split_in: tuple[str, ...] = ()
    fused: bool = False
    checked: bool = True
    at: str = "self_attn"
    names: tuple[str, str] = ("qkv_proj", "o_proj")
    on: Where = attending

    def add(self, model: Model, config: Config, serving: Serving, layers: Layers) -> None:
        """Add both projections, and the gates' where the config has them."""
        numbers, heads = self.on(config, layers), config.number(self.heads)
        if not self.heads_by_layer or not config.has(self.heads_by_layer):
            self._add_layers(model, config, serving, (numbers, heads))
            return
        counts = dict(zip(layers.decoder, config.numbers(self.heads_by_layer), strict=False))
        if missing := [number for number in numbers if number not in counts]:
            raise ModelError(
                f"{config.path}: {self.heads_by_layer}: wanted an entry for each layer, found none for {missing[0]}"
            )
        for count in sorted(set(counts.values())):
            some = tuple(number for number in numbers if counts[number] == count)
            self._add_layers(model, config, serving, (some, Size(count, f"{self.heads_by_layer} {count}")))

    def _add_layers(self, model: Model, config: Config, serving: Serving, kind: tuple[Numbers, Size]) -> None:
        """Add those of the layers ``kind[0]``, which have ``kind[1]`` query heads."""
        numbers, heads = kind
        hidden, kv_heads = config.number("hidden_size"), config.number(self.kv_heads)
        dim = config.number(self.dim, hidden // heads if self.dim == "head_dim" else None)
        value_dim = config.number(self.value_dim, dim) if self.value_dim else dim
        gated = self.gate if isinstance(self.gate, bool) else config.flag(self.gate, True)
        by_head = config.fields.get(self.head_gate) if self.head_gate else None
        if not numbers:
            return
        linears, (qkv, out) = Linears(numbers, serving.ranks.attention), self.names
        q = heads * dim
        weights = (f"{self.at}.{qkv}",) * 3 if self.fused else tuple(f"{self.at}.{name}_proj" for name in "qkv")
        parts = [
            Part(weights[0], Size(2, "2 (query and gate)") * q if gated else q),
            Part(weights[1], kv_heads * dim, least=dim),
            Part(weights[2], kv_heads * value_dim, least=value_dim),
        ]
        if serving.name in self.split_in:
            if linears.ranks > kv_heads:
                raise ModelError(
                    f"{self.at}.k_proj: {serving.name} copies no heads here: wanted at most {kv_heads.how} ranks, "
                    f"found {linears.ranks}"
                )
            model.linears += [linears.column(part.name, [part], hidden) for part in parts]
        else:
            model.linears.append(replace(linears.column(f"{self.at}.{qkv}", parts, hidden), checked=self.checked))
        model.linears.append(linears.row(f"{self.at}.{out}", hidden, heads * value_dim))
        if self.own_gate:
            model.linears.append(linears.column(f"{self.at}.{self.own_gate}", q, hidden))
        elif by_head in (True, "per-head", "per-element"):
            model.linears.append(linears.column(f"{self.at}.g_proj", q if by_head == "per-element" else heads, hidden))
        elif by_head not in (None, False, "disabled"):
            raise ModelError(
                f"{config.path}: {self.head_gate}: wanted true, false, per-head or per-element, found {by_head!r:.40}"
            )


@dataclass(frozen=True)
class InterleavedQkv:
    """MiMo-V2.5's checkpoints, which hold ``qkv_proj`` as so many ranks' parts as there are K and V heads.

    vLLM 0.33.0 pads K and V of fewer ranks to whole blocks (``_fused_qkv_kv_chunk_rows``, models/mimo_v2.py); SGLang
    0.5.23 loads them on a divisor of these ranks only (``get_mimo_v2_fused_qkv_expected_tp_size``).
    """

    def add(self, model: Model, config: Config, serving: Serving, layers: Layers) -> None:
        """Add nothing. Raises ModelError where the layer's shape is another one than `Attention` says."""
        if config.fields.get("attention_projection_layout") != "fused_qkv":
            return
        parts, ranks = config.number("num_key_value_heads"), serving.ranks.attention
        if serving.name == "vllm" and ranks < parts and serving.at_least("0.33.0"):
            raise ModelError(f"self_attn.qkv_proj: no rule here reads parts of {parts.how} on {ranks} ranks")
        if serving.name == "sglang" and parts % ranks:
            raise ModelError(f"self_attn.qkv_proj: wanted a divisor of {parts.how}, found {ranks} ranks of attention")


@dataclass(frozen=True)
class Mla:
    """Multi-head latent attention, and V3.2's indexer where the config has ``index_topk``.

    vLLM 0.33.0 ``models/deepseek_v2.py`` (``DeepseekV2MLAAttention``, ``Indexer``), ``models/deepseek_v32``; SGLang
    0.5.23 ``models/deepseek_v2.py``, ``layers/attention/dsa/dsa_indexer.py``.

    Attributes:
        of: what stands before the names of the config's fields.
        indexed: these layers are those with the indexer.
        gate: the field of the kind of gate that ``g_proj`` gives, if there is one.
        out: the output projection's name.
    """

    at: str = "self_attn"
    of: str = ""
    indexed: bool = True
    gate: str = ""
    out: str = "o_proj"
    on: Where = everywhere

    def add(self, model: Model, config: Config, serving: Serving, layers: Layers) -> None:
        """Add the projections. ``kv_b_proj`` is also called for context that is in the cache."""
        numbers, at = self.on(config, layers), self.at
        if self.of and not numbers:
            return
        hidden, heads = config.number("hidden_size"), config.number(f"{self.of}num_attention_heads")
        nope, rope = (
            config.number(f"{self.of}qk_{name}_head_dim", least=least) for name, least in (("nope", 1), ("rope", 0))
        )
        value, kv_rank = config.number(f"{self.of}v_head_dim"), config.number(f"{self.of}kv_lora_rank")
        sparse = self.indexed and config.has("index_topk")
        attention = Linears(numbers, serving.ranks.attention)
        q, kv_a = heads * (nope + rope), kv_rank + rope
        if config.has(f"{self.of}q_lora_rank"):
            q_rank = config.number(f"{self.of}q_lora_rank")
            fused = [Part(f"{at}.q_a_proj", q_rank), Part(f"{at}.kv_a_proj_with_mqa", kv_a)]
            model.linears += [
                attention.replicated(f"{at}.fused_qkv_a_proj", fused, hidden),
                attention.column(f"{at}.q_b_proj", q, q_rank),
            ]
        else:
            model.linears += [
                attention.column(f"{at}.q_proj", q, hidden),
                attention.replicated(f"{at}.kv_a_proj_with_mqa", kv_a, hidden),
            ]
        kv_b = attention.column(f"{at}.kv_b_proj", heads * (nope + value), kv_rank)
        if prefix := serving.prefix_tokens(config, sparse):
            kv_b = replace(kv_b, tokens=prefix, note=f"Also called for context in the cache, up to {prefix} tokens.")
        model.linears += [kv_b, attention.row(f"{at}.{self.out}", hidden, heads * value)]
        if sparse:
            Indexer(f"{at}.indexer", on=self.on).add(model, config, serving, layers)
        if kind := config.fields.get(f"{self.of}{self.gate}") if self.gate else None:
            if kind not in ("headwise", "head_wise", "elementwise", "element_wise"):
                raise ModelError(f"{config.path}: {self.of}{self.gate}: no rule here reads {kind!r:.40}")
            # A gate for each head spans at most one block of the checkpoint, so no rank has a part of it: dots3-note
            # (headwise), and Ling 3 since vLLM 0.33.0 (models/bailing_moe_v3.py, replicate_g_proj).
            by_head = kind.startswith("head")
            undivided = by_head and (kind == "headwise" or (heads <= BLOCK and serving.at_least("0.33.0")))
            whole = replace(attention, ranks=1) if undivided else attention
            gates = heads if by_head else heads * value
            model.linears.append(
                whole.replicated(f"{at}.g_proj", gates, hidden)
                if whole.ranks == 1
                else whole.column(f"{at}.g_proj", gates, hidden)
            )


@dataclass(frozen=True)
class Indexer:
    """The indexer of sparse attention: FP8 projections of the queries and, in some engines, of the keys; its logits.

    Attributes:
        v4: DeepSeek V4's, else V3.2's.
    """

    at: str
    v4: bool = False
    on: Where = everywhere

    def add(self, model: Model, config: Config, serving: Serving, layers: Layers) -> None:
        """Add the projections and the calls of the logits."""
        numbers = self.on(config, layers)
        heads, dim = config.number("index_n_heads"), config.number("index_head_dim")
        q_rank, hidden = config.number("q_lora_rank"), config.number("hidden_size")
        indexer = Linears(numbers, 1)
        queries = indexer.replicated(f"{self.at}.wq_b", heads * dim, q_rank)
        model.linears.append(queries if self.v4 else replace(queries, beside=serving.indexer_beside()))
        if not self.v4 and serving.projects_indexer_keys(config):
            model.linears.append(indexer.replicated(f"{self.at}.wk", dim, hidden))
        model.calls += serving.indexer_logits(self.v4).calls(heads, f"{self.at}, {layers_text(numbers)}")


@dataclass(frozen=True)
class Mlp:
    """A dense gated MLP: ``gate_up_proj`` and ``down_proj``, divided among all tensor parallel ranks.

    Attributes:
        split_in: engines that do not fuse gate and up.
        padded: each rank's part is padded to whole blocks of the checkpoint.
    """

    width: str = "intermediate_size"
    at: str = "mlp"
    split_in: tuple[str, ...] = ()
    padded: bool = False
    on: Where = everywhere

    def add(self, model: Model, config: Config, serving: Serving, layers: Layers) -> None:
        """Add both projections."""
        numbers = self.on(config, layers)
        if config.has(self.width) or numbers:  # a model whose layers all have experts may have this field, too
            hidden, width = config.number("hidden_size"), config.number(self.width)
            if numbers:
                linears = Linears(numbers, serving.ranks.dense)
                width = _whole_blocks(width, linears.ranks) if self.padded else width
                model.linears += linears.gated_mlp(self.at, hidden, width, serving.name not in self.split_in)


@dataclass(frozen=True)
class Projection:
    """One more linear layer, whole on each rank or with its N divided.

    Attributes:
        n, k: as multiples of ``hidden_size``.
    """

    at: str
    n: int = 1
    k: int = 2
    divided: bool = False
    on: Where = everywhere

    def add(self, model: Model, config: Config, serving: Serving, layers: Layers) -> None:
        """Add the layer."""
        hidden = config.number("hidden_size")
        if numbers := self.on(config, layers):
            linears = Linears(numbers, serving.tp if self.divided else 1)
            add = linears.column if self.divided else linears.replicated
            model.linears.append(add(self.at, self.n * hidden if self.n > 1 else hidden, self.k * hidden))


@dataclass(frozen=True)
class Moe:
    """Routed experts and, where the config has one, the shared expert.

    Attributes:
        experts: the field of the number of experts.
        topk, width: the fields of how many experts a token goes to, and of an expert's width.
        shared: the field of the number of shared experts; empty: there is one, if it has a width.
        shared_width: the field of a shared expert's width; where it is missing, it is as wide as a routed one.
        whole: engines in which each rank has the whole shared expert when tokens are spread over the ranks
            (``is_sequence_parallel`` in vLLM, ``parallel_group="replicated"`` in SGLang).
        dense: the block of the layers without experts.
        split_in: engines that do not fuse a shared expert's gate and up.
        padded: each rank's part of a shared expert is padded to whole blocks of the checkpoint.
    """

    experts: str = "n_routed_experts|num_experts|num_local_experts"
    topk: str = "num_experts_per_tok"
    width: str = "moe_intermediate_size"
    shared: str = ""
    shared_width: str = ""
    shared_at: str = "mlp.shared_experts"
    whole: tuple[str, ...] = ("vllm", "sglang")
    dense: Mlp | None = Mlp()
    split_in: tuple[str, ...] = ()
    padded: bool = False
    at: str = "mlp"
    on: Where = everywhere

    def add(self, model: Model, config: Config, serving: Serving, layers: Layers) -> None:
        """Add the experts, and the MLP of the layers without them."""
        count, numbers = config.number(self.experts), self.on(config, layers)
        if self.dense:
            replace(self.dense, on=lambda *_: tuple(n for n in layers.all if n not in numbers)).add(
                model, config, serving, layers
            )
        hidden, width, topk = config.number("hidden_size"), config.number(self.width), config.number(self.topk)
        shared, one = config.count(self.shared), config.count(self.shared_width, missing=bool(self.shared))
        whole = shared * (one or width) if self.shared else one
        if not numbers:
            raise ModelError(
                f"{config.path}: wanted a layer with the {count.how}, found none: the fields that name the layers with "
                "experts leave none"
            )
        fused = (shared or 1) if whole and serving.fuses_shared_experts(config, shared) else 0
        if whole and not fused:
            ranks = serving.ranks.shared if serving.name in self.whole else serving.tp
            linears = Linears(numbers, ranks)
            whole = _whole_blocks(whole, ranks) if self.padded else whole
            model.linears += linears.gated_mlp(self.shared_at, hidden, whole, serving.name not in self.split_in)
        routed = Experts(count, topk + fused, hidden, width, numbers, fused, module=f"{self.at}.experts")
        model.experts.append(routed)


def _whole_blocks(width: Size, ranks: int) -> Size:
    """``width`` with each rank's part padded to whole blocks."""
    padded = round_up(width, BLOCK * ranks)
    return width if padded == width else Size(padded, f"({width.how}, padded to whole blocks on each rank)")
