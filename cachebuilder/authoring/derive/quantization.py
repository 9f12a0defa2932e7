"""How a checkpoint is quantised: which of its modules have FP8 weights by blocks, and which it keeps as they were."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any

from cachebuilder.authoring.derive.config import Config, short
from cachebuilder.errors import ModelError

#: The weight block that both engines' DeepGEMM paths take: BLOCK × BLOCK elements (N × K) share one scale.
BLOCK = 128

#: ModelOpt's names of FP8 weights by blocks of 128 × 128 (vLLM 0.33.0 layers/quantization/modelopt.py,
#: ``_BLOCK_FP8_MOE_ALGOS``; SGLang 0.5.23 layers/quantization/modelopt_quant.py, ``_BLOCK_FP8_ALGOS``).
_MODELOPT_BLOCK = ("FP8_PB_WO", "FP8_BLOCK_SCALES")

#: What may stand before the text model's layers in a multimodal checkpoint. The towers of other modalities have layers
#: with the same numbers and names, behind names of their own.
_TEXT_PREFIX = re.compile(r"^(?:(?:model|language_model|text_model|thinker|llm)\.)+(?=layers\.|mtp\.)")


@dataclass(frozen=True)
class Group:
    """Modules that are quantised alike.

    Attributes:
        targets: names, patterns (``re:…``), or the class ``Linear``, which is every layer that no group names.
        other: what they are, where they are not FP8 by blocks of 128 × 128.
    """

    targets: tuple[str, ...]
    other: str = ""

    def names(self, module: str) -> bool:
        """Whether a target is this module's name, or a pattern of it."""
        return any(target == module or pattern_match(target, module) for target in self.targets)


@dataclass(frozen=True)
class Checkpoint:
    """How a checkpoint's modules are quantised.

    Attributes:
        text: for the manifest's comment.
        method: ``fp8``, ``compressed-tensors`` or ``modelopt``.
        groups: empty: all modules are FP8 by blocks, except those in `unquantized`.
        unquantized: names and patterns of the modules that stay as they were, as the checkpoint has them.
        refusal: no module is FP8 by blocks, for the reason that this gives.
    """

    text: str
    method: str
    groups: tuple[Group, ...] = ()
    unquantized: tuple[str, ...] = ()
    refusal: ModelError | None = None

    def other(self, module: str) -> str:
        """What ``module``'s weights are where they are not FP8 by blocks; empty where they are."""
        if not self.groups:
            return ""
        group = next((group for group in self.groups if group.names(module)), None)
        group = group or next((group for group in self.groups if "Linear" in group.targets), None)
        return group.other if group else "the checkpoint quantises other modules only"

    @cached_property
    def names(self) -> frozenset[str]:
        """The unquantised modules' names, those of the text model's layers beginning with ``model.layers.``."""
        return frozenset(
            _TEXT_PREFIX.sub(lambda found: "" if found.string[found.end() :].startswith("mtp.") else "model.", entry)
            for entry in self.unquantized
        )

    def names_end(self, module: str) -> bool:
        """Whether an entry of the unquantised modules is ``module``, or the last components of its name."""
        return any(module == entry or module.endswith(f".{entry}") for entry in self.unquantized)

    @cached_property
    def of_experts(self) -> str:
        """Those of the names that have to do with experts, as one text to search."""
        return "\n".join(name for name in self.names if "experts" in name)

    @cached_property
    def patterns(self) -> tuple[str, ...]:
        """The entries that are patterns: ``re:…`` or with an asterisk."""
        return tuple(entry for entry in self.unquantized if entry.startswith("re:") or "*" in entry)

    def matches_pattern(self, module: str) -> bool:
        """Whether a pattern of the unquantised modules matches."""
        return any(
            pattern_match(entry, module) if entry.startswith("re:") else fnmatchcase(module, entry)
            for entry in self.patterns
        )

    def names_component(self, module: str) -> bool:
        """Whether a name of the unquantised modules is ``module``, or consecutive components of it."""
        parts = module.split(".")
        runs = (".".join(parts[i:j]) for i in range(len(parts)) for j in range(i + 1, len(parts) + 1))
        return any(run in self.names for run in runs)


def read_checkpoint(config: Config, engine: str, modelopt: tuple[str, ...]) -> Checkpoint:
    """How ``config``'s checkpoint is quantised; with a `refusal` where no linear layer of it reaches DeepGEMM.

    A model with an indexer calls DeepGEMM for the logits, whatever its weights are.

    Args:
        modelopt: see `Serving.modelopt`.
    """
    try:
        return _read(config, engine, modelopt)
    except ModelError as error:
        others = (Group(("Linear",), "its weights are not FP8 by blocks of 128 × 128"),)
        return Checkpoint("not FP8 by blocks", "", others, (), error)


def _read(config: Config, engine: str, modelopt: tuple[str, ...]) -> Checkpoint:
    """The checkpoint's form.

    ``fp8`` is the checkpoint format of DeepSeek and Qwen. Both engines send its linear layers to DeepGEMM where its
    blocks are 128 × 128 and its activations dynamic (vLLM 0.25.0 to 0.33.0
    ``model_executor/layers/quantization/fp8.py``; SGLang 0.5.23 ``srt/layers/quantization/fp8_utils.py``,
    ``_deepgemm_block_fp8_supported``). ``compressed-tensors`` with the strategy ``block`` ends in the same functions
    (``compressed_tensors_w8a8_fp8.py`` in each engine), and so do the linear layers of ``modelopt`` with FP8_PB_WO
    (vLLM 0.25.0 ``ModelOptFp8PbWoLinearMethod`` and 0.33.0 ``resolve`` in ``modelopt.py``; SGLang 0.5.23
    ``modelopt_quant.py`` in mixed precision only).

    Raises ModelError where no layer of this checkpoint reaches DeepGEMM, or where no rule here reads it; the text says
    which of the two.
    """
    quantization, unquantized = config.quantization, config.unconverted
    method = quantization.get("quant_method")
    if not quantization:
        raise _refusal(config, "its weights are not quantised (no quantization_config)")
    if method == "fp8":
        return Checkpoint(_check_fp8(config, engine), "fp8", (), unquantized)
    if method in ("compressed-tensors", "compressed_tensors"):
        text = "compressed-tensors, FP8 by blocks of [128, 128]"
        return Checkpoint(text, "compressed-tensors", _compressed_tensors_groups(config), unquantized)
    if method == "modelopt":
        algo, groups = _modelopt_groups(config, modelopt)
        return Checkpoint(f"modelopt, {algo}", "modelopt", groups, unquantized)
    # vLLM 0.33.0 sends MXFP8 experts to DeepGEMM on SM100 (fused_moe/experts/deep_gemm_moe.py, _supports_quant_scheme).
    raise _refusal(config, f"its quant_method is {method!r}", read=method != "mxfp8")


def _check_fp8(config: Config, engine: str) -> str:
    quantization = config.quantization
    block, activations = quantization.get("weight_block_size"), quantization.get("activation_scheme", "dynamic")
    if block is None:
        raise _refusal(config, "its FP8 weights have one scale a tensor (no weight_block_size)")
    if block == [32, 32] and engine == "sglang":
        raise _refusal(
            config,
            "its FP8 weights have one scale for each block of [32, 32]: SGLang sends them to DeepGEMM",
            read=False,
        )
    if block != [BLOCK, BLOCK]:
        raise _refusal(config, f"its FP8 weights have one scale for each block of {block}")
    if activations != "dynamic":
        raise _refusal(config, f"its activations are quantised with {activations} scales")
    return f"quant_method fp8, weight_block_size {block}"


def _compressed_tensors_groups(config: Config) -> tuple[Group, ...]:
    entries = config.quantization.get("config_groups")
    if not isinstance(entries, dict) or not entries:
        raise _refusal(config, "its compressed-tensors format names no config_groups")
    groups = []
    for name, entry in entries.items():
        weights = entry.get("weights") if isinstance(entry, dict) else None
        if not isinstance(weights, dict):
            raise _refusal(config, f"its compressed-tensors {name} quantises no weights")
        targets = entry.get("targets") or ["Linear"]
        if not isinstance(targets, list):
            raise ModelError(f"{config.path}: {name}.targets: wanted a list of names, found {short(targets)}")
        groups.append(Group(tuple(map(str, targets)), _other_weights(weights, entry.get("input_activations"))))
    if all(group.other for group in groups):
        group = groups[0]
        raise _refusal(config, f"its compressed-tensors {group.other} ({', '.join(group.targets)})")
    return tuple(groups)


def _other_weights(weights: Mapping[str, Any], activations: object) -> str:
    """What a compressed-tensors group is where it is not FP8 by blocks with dynamic activations; empty where it is."""
    bits, kind, strategy = (weights.get(name) for name in ("num_bits", "type", "strategy"))
    if (bits, kind) != (8, "float"):
        return f"weights are {'INT4' if (bits, kind) == (4, 'int') else f'{bits}-bit {kind}'}"
    structure = weights.get("block_structure")
    if strategy != "block" or structure != [BLOCK, BLOCK]:
        return (
            f"FP8 weights have other scales: {f'{strategy} {structure}' if structure else f'one for each {strategy}'}"
        )
    if not isinstance(activations, dict) or not activations.get("dynamic"):
        return "activations are not quantised dynamically"
    return ""


def _modelopt_groups(config: Config, algos: tuple[str, ...]) -> tuple[str, tuple[Group, ...]]:
    algo = str(config.quantization.get("quant_algo")).upper()
    if algo == "FP8_PB_WO" and algo in algos:
        if not any(fnmatchcase("lm_head", entry) for entry in config.unconverted):
            raise ModelError(
                f"{config.path}: no rule here reads a quantised LM head: wanted lm_head in exclude_modules, found "
                f"{short(list(config.unconverted))}",
                hint="observe the engine (cachebuilder observe), or record it (cachebuilder record)",
            )
        # ModelOptFp8MoEMethod, vLLM 0.25.0 to 0.33.0: whatever the linear layers' algorithm is.
        experts = "vLLM takes ModelOpt's experts to have one scale a tensor"
        return algo, (Group((r"re:.*\.experts$",), experts), Group(("Linear",)))
    layers = config.quantization.get("quantized_layers")
    if algo != "MIXED_PRECISION" or not isinstance(layers, dict) or algo not in algos:
        read = algo not in ("MXFP8", *_MODELOPT_BLOCK)
        raise _refusal(config, f"its quant_method is 'modelopt' with {algo}", read=read)
    by_algo: dict[str, list[str]] = {}
    for name, entry in layers.items():
        if not isinstance(entry, dict):
            raise ModelError(f"{config.path}: quantized_layers.{name}: wanted an object, found {short(entry)}")
        by_algo.setdefault(str(entry.get("quant_algo")).upper(), []).append(_TEXT_PREFIX.sub("model.", name))
    if not set(by_algo).intersection(_MODELOPT_BLOCK):
        raise _refusal(config, f"its quant_method is 'modelopt' with {', '.join(sorted(by_algo))}")
    return algo, tuple(
        Group(tuple(names), "" if name in _MODELOPT_BLOCK else f"weights are {name}") for name, names in by_algo.items()
    )


def _refusal(config: Config, reason: str, read: bool = True) -> ModelError:
    """``read``: the engine does not send such weights to DeepGEMM; else it may, and no rule here reads them."""
    wanted = f"wanted FP8 weights with one scale for each block of {BLOCK} × {BLOCK}, but {reason}"
    if not read:
        return ModelError(
            f"{config.path}: no rule here reads this checkpoint of {config.architecture}: {wanted}",
            hint="record the engine (cachebuilder record), or observe it (cachebuilder observe)",
        )
    return ModelError(
        f"{config.path}: {config.architecture} would not reach DeepGEMM: {wanted}",
        hint="this checkpoint needs no DeepGEMM cache; serve the model's block-FP8 checkpoint, if it has one",
    )


def pattern_match(entry: str, module: str) -> bool:
    """Whether a ``re:`` entry of compressed-tensors matches; other entries and invalid patterns match nothing."""
    if not entry.startswith("re:"):
        return False
    try:
        return re.match(entry[3:], module) is not None
    except re.error:
        return False
