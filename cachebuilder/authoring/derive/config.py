"""A Hugging Face ``config.json``: its fields, and how its checkpoint is quantised."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cachebuilder.authoring.derive.size import Size
from cachebuilder.common.reading import read_named
from cachebuilder.errors import ModelError

#: The weight block that both engines' DeepGEMM paths take: BLOCK × BLOCK elements (N × K) share one scale.
BLOCK = 128

_MAX_BYTES = 16 << 20  # modules_to_not_convert of a large model alone is hundreds of kilobytes


@dataclass(frozen=True)
class Config:
    """A model's configuration.

    Attributes:
        path: the file, for errors.
        fields: those of the text model, which is the whole model unless it is multimodal.
        quantization: ``quantization_config``; empty where the checkpoint is not quantised.
        architecture: the class of the text model, as ``DeepseekV3ForCausalLM``.
    """

    path: Path
    fields: Mapping[str, Any]
    quantization: Mapping[str, Any]
    architecture: str

    @classmethod
    def read(cls, path: Path) -> Config:
        """Read ``path``, a ``config.json`` or the folder that holds one.

        Raises:
            ModelError: the file cannot be read, is no JSON, or is no model's configuration.
        """
        file = path / "config.json" if path.is_dir() else path
        try:
            data = read_named(file, _MAX_BYTES)
        except OSError as error:
            raise ModelError(
                f"{file}: cannot be read: {error.strerror}", hint="give a local config.json: nothing is downloaded"
            ) from error
        try:
            tree = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise ModelError(f"{file}: not JSON: {error}") from None
        if not isinstance(tree, dict):
            raise ModelError(f"{file}: wanted a JSON object, found {type(tree).__name__}")
        return cls.of(tree, file)

    @classmethod
    def of(cls, tree: Mapping[str, Any], path: Path) -> Config:
        """The configuration in ``tree``. Raises ModelError where it is not a model's."""
        text = tree.get("text_config")
        fields = text if isinstance(text, dict) else tree
        # In a multimodal model the text part serves the tokens, and the families know the class of that part.
        architectures = fields.get("architectures") or tree.get("architectures")
        if not isinstance(architectures, list) or not architectures or not isinstance(architectures[0], str):
            raise ModelError(
                f"{path}: architectures: wanted a list with the model's class, found {_short(architectures)}"
            )
        quantization = tree.get("quantization_config") or fields.get("quantization_config") or {}
        if not isinstance(quantization, dict):
            raise ModelError(f"{path}: quantization_config: wanted an object, found {_short(quantization)}")
        return cls(path, fields, quantization, architectures[0])

    def has(self, name: str) -> bool:
        """Whether the config has the field, with another value than null."""
        return self.fields.get(name) is not None

    def number(self, name: str, default: int | None = None, *, least: int = 1, most: int = 1 << 30) -> Size:
        """An integer field with its name. Raises ModelError where it is missing, too small, too large or no integer."""
        value = self.fields.get(name)
        if value is None:
            value = default
        if value is None:
            raise ModelError(f"{self.path}: {name}: missing; {self.architecture} needs it")
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise ModelError(f"{self.path}: {name}: wanted an integer from {least} to {most}, found {_short(value)}")
        return Size(value, f"{name} {value}")

    def numbers(self, name: str) -> tuple[int, ...]:
        """A field that is a list of integers; empty where it is missing. Raises ModelError for anything else."""
        value = self.fields.get(name) or []
        if not isinstance(value, list) or any(isinstance(item, bool) or not isinstance(item, int) for item in value):
            raise ModelError(f"{self.path}: {name}: wanted a list of integers, found {_short(value)}")
        return tuple(value)

    @property
    def unconverted(self) -> tuple[str, ...]:
        """Modules that the checkpoint keeps unquantised, as it names them."""
        for name in ("ignored_layers", "modules_to_not_convert", "ignore"):
            if value := self.quantization.get(name):
                if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
                    raise ModelError(
                        f"{self.path}: quantization_config.{name}: wanted a list of names, found {_short(value)}"
                    )
                return tuple(value)
        return ()


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


def check_block_fp8(config: Config) -> str:
    """How the checkpoint says that it is block FP8, for the manifest's comment.

    ``fp8`` is the checkpoint format of DeepSeek and Qwen. Both engines send its linear layers to DeepGEMM where its
    blocks are 128 × 128 and its activations dynamic (vLLM 0.25.0 to 0.33.0
    ``model_executor/layers/quantization/fp8.py``; SGLang 0.5.23 ``srt/layers/quantization/fp8_utils.py``,
    ``_deepgemm_block_fp8_supported``). ``compressed-tensors`` with the strategy ``block`` ends in the same functions
    (``compressed_tensors_w8a8_fp8.py`` in each engine).

    Raises ModelError where the engine would not send this model's linear layers to DeepGEMM; the text says why.
    """
    quantization = config.quantization
    method = quantization.get("quant_method")
    if not quantization:
        raise _refusal(config, "its weights are not quantised (no quantization_config)")
    if method == "fp8":
        block, activations = quantization.get("weight_block_size"), quantization.get("activation_scheme", "dynamic")
        if block is None:
            raise _refusal(config, "its FP8 weights have one scale a tensor (no weight_block_size)")
        if block != [BLOCK, BLOCK]:
            raise _refusal(config, f"its FP8 weights have one scale for each block of {block}")
        if activations != "dynamic":
            raise _refusal(config, f"its activations are quantised with {activations} scales")
        return f"quant_method fp8, weight_block_size {block}"
    if method in ("compressed-tensors", "compressed_tensors"):
        return _check_compressed_tensors(config)
    raise _refusal(config, f"its quant_method is {method!r}")


def _check_compressed_tensors(config: Config) -> str:
    groups = config.quantization.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise _refusal(config, "its compressed-tensors format names no config_groups")
    for name, group in groups.items():
        weights = group.get("weights") if isinstance(group, dict) else None
        if not isinstance(weights, dict):
            raise _refusal(config, f"its compressed-tensors {name} quantises no weights")
        bits, kind, strategy = (weights.get(field) for field in ("num_bits", "type", "strategy"))
        targets = ", ".join(map(str, group.get("targets") or [])) or "all layers"
        if (bits, kind) != (8, "float"):
            what = "INT4" if (bits, kind) == (4, "int") else f"{bits}-bit {kind}"
            raise _refusal(config, f"its compressed-tensors weights are {what} ({targets})")
        if strategy != "block" or weights.get("block_structure") != [BLOCK, BLOCK]:
            structure = weights.get("block_structure")
            how = f"{strategy} {structure}" if structure else f"one for each {strategy}"
            raise _refusal(config, f"its compressed-tensors FP8 weights have other scales: {how} ({targets})")
        activations = group.get("input_activations")
        if not isinstance(activations, dict) or not activations.get("dynamic"):
            raise _refusal(config, "its compressed-tensors activations are not quantised dynamically")
    return "compressed-tensors, FP8 by blocks of [128, 128]"


def _refusal(config: Config, reason: str) -> ModelError:
    return ModelError(
        f"{config.path}: {config.architecture} would not reach DeepGEMM: wanted FP8 weights with one scale for each "
        f"block of 128 × 128, but {reason}",
        hint="this checkpoint needs no DeepGEMM cache; serve the model's block-FP8 checkpoint, if it has one",
    )


def path_match(entry: str, module: str) -> bool:
    """Whether ``entry`` is ``module``, or consecutive components of its dotted name."""
    return f".{entry.strip('.')}." in f".{module}."


def pattern_match(entry: str, module: str) -> bool:
    """Whether a ``re:`` entry of compressed-tensors matches; other entries and invalid patterns match nothing."""
    if not entry.startswith("re:"):
        return False
    try:
        return re.match(entry[3:], module) is not None
    except re.error:
        return False
