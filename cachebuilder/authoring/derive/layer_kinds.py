"""Which of a model's layers are of a kind: with attention, with experts, with a linear-attention state.

Each function here answers with the numbers of the layers, from the fields of the config that say so. Draft layers, of
multi-token prediction, are numbered after the decoder's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from cachebuilder.authoring.derive.config import Config
from cachebuilder.errors import ModelError

Numbers = tuple[int, ...]

#: Kinds of attention whose projections are the same: they differ in which keys a query sees.
_SAME_SHAPES = ("full_attention", "sliding_attention", "chunked_attention")


@dataclass(frozen=True)
class Layers:
    """A model's layers.

    Attributes:
        draft_prefix: what stands before the number of a draft layer in the checkpoint's names; where it is not the
            decoder's, these numbers start at 0.
    """

    decoder: Numbers
    draft: Numbers = ()
    draft_prefix: str = "model.layers."

    @property
    def all(self) -> Numbers:
        """The decoder's layers, then the draft layers."""
        return self.decoder + self.draft

    def name(self, number: int) -> str:
        """What stands before a module's name in the checkpoint, as ``model.layers.3.``."""
        if number in self.draft and self.draft_prefix != "model.layers.":
            return f"{self.draft_prefix}{number - len(self.decoder)}."
        return f"model.layers.{number}."


Where = Callable[[Config, Layers], Numbers]


def everywhere(config: Config, layers: Layers) -> Numbers:
    """All layers."""
    return layers.all


def draft(config: Config, layers: Layers) -> Numbers:
    """The draft layers."""
    return layers.draft


def attending(config: Config, layers: Layers) -> Numbers:
    """All layers, which have the same attention. Raises ModelError where ``layer_types`` has another kind."""
    kinds = config.entries("layer_types", len(layers.decoder)) if config.has("layer_types") else []
    if others := sorted({str(kind) for kind in kinds} - set(_SAME_SHAPES)):
        raise ModelError(
            f"{config.path}: layer_types: wanted {', '.join(_SAME_SHAPES)}, found {', '.join(others)}: no rule here "
            f"reads these layers of {config.architecture}",
            hint="record the engine (cachebuilder record), or observe it (cachebuilder observe)",
        )
    return layers.all


def listed(field: str, *values: object, drafts: bool = False) -> Where:
    """Layers for which the list ``field`` has one of ``values``. ``drafts``: draft layers are of this kind."""

    def where(config: Config, layers: Layers) -> Numbers:
        entries = config.entries(field, len(layers.decoder))
        return tuple(
            number for number in layers.all if (entries[number] in values if number < len(entries) else drafts)
        )

    return where


def other_than(where: Where) -> Where:
    """The layers that ``where`` does not name."""

    def others(config: Config, layers: Layers) -> Numbers:
        named = where(config, layers)
        return tuple(number for number in layers.all if number not in named)

    return others


def decoder_only(where: Where) -> Where:
    """The layers that ``where`` names, without the draft layers."""
    return lambda config, layers: tuple(number for number in where(config, layers) if number in layers.decoder)


def gated_attention(config: Config, layers: Layers) -> Numbers:
    """Of Qwen3-Next and Qwen3.5: ``layer_types``, else each ``full_attention_interval``-th layer; the draft layers.

    SGLang 0.5.23 ``srt/configs/qwen3_next.py`` (``layers_block_type``); vLLM 0.33.0 reads transformers' layer_types.
    """
    interval = config.number("full_attention_interval", 4)
    if config.has("layer_types"):
        return listed("layer_types", "full_attention", drafts=True)(config, layers)
    return tuple(number for number in layers.decoder if (number + 1) % interval == 0) + layers.draft


def last_of_group(config: Config, layers: Layers) -> Numbers:
    """Of Ling and Ring 2.5: the last of each ``layer_group_size`` layers, and the draft layers, have full attention."""
    size = config.number("layer_group_size")
    return tuple(number for number in layers.decoder if (number + 1) % size == 0) + layers.draft


def of_ling_3(config: Config, layers: Layers) -> Numbers:
    """Of Ling 3: as `last_of_group`, and the layers behind the last whole group (``_is_kda_layer``, vLLM 0.33.0)."""
    size = config.number("layer_group_size")
    return last_of_group(config, layers) + layers.decoder[len(layers.decoder) // size * size :]


def after_dense(config: Config, layers: Layers) -> Numbers:
    """Layers with experts: from ``first_k_dense_replace`` on each ``moe_layer_freq``-th; the draft layers, too.

    vLLM 0.33.0 ``models/deepseek_v2.py``, ``glm4_moe.py``. ``mlp_layer_types`` says the same (transformers 5): GLM-5.2
    has both. Raises ModelError where they disagree.
    """
    types = config.has("mlp_layer_types")
    by_type = listed("mlp_layer_types", "sparse", drafts=True)(config, layers) if types else None
    if by_type is not None and not config.has("first_k_dense_replace"):
        return by_type
    first, frequency = config.number("first_k_dense_replace", least=0), config.number("moe_layer_freq", 1)
    numbers = tuple(number for number in layers.all if number >= first and number % frequency == 0)
    if by_type not in (None, numbers):
        raise ModelError(
            f"{config.path}: mlp_layer_types: wanted experts in the layers that {first.how} and {frequency.how} name, "
            "found others"
        )
    return numbers


def exaone(config: Config, layers: Layers) -> Numbers:
    """Layers with experts of K-EXAONE: ``is_moe_layer`` (vLLM 0.25.0, SGLang) or ``mlp_layer_types`` (vLLM 0.33.0).

    The draft layers are dense (models/exaone_moe_mtp.py).
    """
    if config.has("is_moe_layer") and not config.has("mlp_layer_types"):
        return listed("is_moe_layer", True)(config, layers)
    return decoder_only(after_dense)(config, layers)


def stepped(config: Config, layers: Layers) -> Numbers:
    """Layers with experts: each ``decoder_sparse_step``-th, without ``mlp_only_layers`` (models/qwen3_moe.py)."""
    only_dense, step = set(config.numbers("mlp_only_layers")), config.number("decoder_sparse_step", 1)
    return tuple(number for number in layers.all if number not in only_dense and (number + 1) % step == 0)


def laguna(config: Config, layers: Layers) -> Numbers:
    """Of Laguna: ``mlp_layer_types`` (vLLM 0.33.0, SGLang 0.5.23), else `stepped`, by default all but layer 0.

    vLLM 0.25.0 reads ``mlp_only_layers`` and ``decoder_sparse_step`` alone (transformers_utils/configs/laguna.py).
    """
    by_step = stepped(config, layers) if config.has("mlp_only_layers") else layers.all[1:]
    return listed("mlp_layer_types", "sparse")(config, layers) if config.has("mlp_layer_types") else by_step


def enumerated(config: Config, layers: Layers) -> Numbers:
    """Of Step-3.5: ``mlp_layer_types``, else ``moe_layers_enum``, else all but the first (``_is_moe_layer``)."""
    if config.has("mlp_layer_types"):
        return listed("mlp_layer_types", "sparse")(config, layers)
    if (text := config.fields.get("moe_layers_enum")) is None:
        return layers.decoder[1:]
    try:
        numbers = {int(part) for part in str(text).split(",")}
    except ValueError:
        raise ModelError(f"{config.path}: moe_layers_enum: wanted numbers with commas, found {text!r:.60}") from None
    return tuple(number for number in layers.all if number in numbers)


def between(config: Config, layers: Layers) -> Numbers:
    """Of ERNIE 4.5: ``moe_layer_start_index`` to ``moe_layer_end_index``, each ``moe_layer_interval``-th.

    vLLM 0.33.0 ``models/ernie45_moe.py``; SGLang 0.5.23 ``models/ernie4.py`` counts the interval from the first.
    """
    first = config.number("moe_layer_start_index", 0, least=0)
    last = config.number("moe_layer_end_index", len(layers.decoder) - 1, least=-1)
    if last == -1:
        last = config.number("num_hidden_layers")
    interval = config.number("moe_layer_interval", 1)
    if not config.flag("use_moe", True):
        return ()
    return tuple(number for number in layers.decoder if first <= number <= last and (number + 1) % interval == 0)


def interleaved(config: Config, layers: Layers) -> Numbers:
    """Of Llama 4: each ``interleave_moe_layer_step``-th layer (vLLM 0.33.0 and SGLang 0.5.23 ``models/llama4.py``)."""
    step = config.number("interleave_moe_layer_step")
    return tuple(number for number in layers.all if (number + 1) % step == 0)
