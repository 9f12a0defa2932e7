"""Attention that keeps a state instead of keys and values: its projections, beside those that `blocks` has."""

from __future__ import annotations

from dataclasses import dataclass

from cachebuilder.authoring.derive.config import Config
from cachebuilder.authoring.derive.layer_kinds import Layers, Where
from cachebuilder.authoring.derive.layers import LeftOut, Linears, Model, Part
from cachebuilder.authoring.derive.serving import Serving
from cachebuilder.authoring.derive.size import Size
from cachebuilder.errors import ModelError


@dataclass(frozen=True)
class GatedDeltaNet:
    """Linear attention with a recurrent state, of Qwen3-Next and Qwen3.5.

    vLLM 0.33.0 ``layers/mamba/gdn/qwen_gdn_linear_attn.py``: Qwen3-Next's checkpoint has one weight for query, key,
    value and z, Qwen3.5's has two. Qwen3-Next's ``in_proj_ba`` has no block-FP8 weights: "ba_proj doesn't support
    blockwise fp8 quantization". SGLang 0.5.23 ``models/qwen3_next.py``, ``models/qwen3_5.py``.
    """

    on: Where
    parts: bool = True
    at: str = "linear_attn"

    def add(self, model: Model, config: Config, serving: Serving, layers: Layers) -> None:
        """Add the projections into and out of the state."""
        numbers, hidden = self.on(config, layers), config.number("hidden_size")
        keys = config.number("linear_num_key_heads") * config.number("linear_key_head_dim")
        values = config.number("linear_num_value_heads") * config.number("linear_value_head_dim")
        if not numbers:
            return
        linears, at = Linears(numbers, serving.ranks.attention), self.at
        qkvz: Size | list[Part] = 2 * (keys + values)
        if self.parts:
            sizes = {"qkv": (keys, keys, values), "z": (values,)}
            qkvz = [Part(f"{at}.in_proj_{name}", size) for name, of_name in sizes.items() for size in of_name]
            heads = config.number("linear_num_value_heads")
            ba = [Part(f"{at}.in_proj_{name}", heads) for name in "ba"]
            model.linears.append(linears.column(f"{at}.in_proj_ba", ba, hidden))
        else:
            model.left_out.append(LeftOut(f"{at}.in_proj_ba", "both engines expect it without block-FP8 weights"))
        model.linears += [
            linears.column(f"{at}.in_proj_qkvz", qkvz, hidden),
            linears.row(f"{at}.out_proj", hidden, values),
        ]


@dataclass(frozen=True)
class KimiDelta:
    """Linear attention with Kimi's delta rule, as Ling 3 has it.

    vLLM 0.33.0 ``models/bailing_moe_v3.py`` (``BailingMoeV3KimiDeltaAttention``): query, key, value and beta are fused;
    beta stays apart where the checkpoint keeps it unquantised.
    """

    on: Where
    at: str = "attention"

    def add(self, model: Model, config: Config, serving: Serving, layers: Layers) -> None:
        """Add the projections into and out of the state. Raises ModelError where they are low-rank ones."""
        numbers, at = self.on(config, layers), self.at
        if not numbers:
            return
        if not config.flag("no_kda_lora", False):
            raise ModelError(f"{config.path}: no_kda_lora: wanted true, with which alone vLLM loads it, found false")
        hidden, heads = config.number("hidden_size"), config.number("num_attention_heads")
        width = heads * config.number("head_dim")
        qkv = [Part(f"{at}.{name}_proj", width) for name in "qkv"]
        beta = Part(f"{at}.b_proj", heads)
        entries = config.unconverted
        apart = tuple(
            number
            for number in numbers
            if any(f".{layers.name(number)}{beta.name}".endswith(f".{entry}") for entry in entries)
        )
        for some, fused, own in (
            (apart, ("qkv_proj", qkv), [beta]),
            (tuple(number for number in numbers if number not in apart), ("qkvb_proj", [*qkv, beta]), []),
        ):
            if some:
                linears = Linears(some, serving.ranks.attention)
                model.linears += [
                    linears.column(f"{at}.{fused[0]}", fused[1], hidden),
                    *(linears.column(part.name, [part], hidden) for part in own),
                ]
        linears = Linears(numbers, serving.ranks.attention)
        model.linears += [
            *(linears.column(f"{at}.{name}_proj", width, hidden) for name in "fg"),
            linears.row(f"{at}.o_proj", hidden, width),
        ]
