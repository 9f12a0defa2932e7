"""A Hugging Face ``config.json``: its fields, and how its checkpoint is quantised."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cachebuilder.authoring.derive.size import Size
from cachebuilder.common.reading import read_named
from cachebuilder.errors import ModelError

#: The weight block that both engines' DeepGEMM paths take: BLOCK × BLOCK elements (N × K) share one scale.
BLOCK = 128

_MAX_BYTES = 16 << 20  # modules_to_not_convert of a large model alone is hundreds of kilobytes


#: Where the text model's fields are in a multimodal model's config: names of objects, from the outermost inwards.
_TEXT_CONFIGS = (("text_config",), ("llm_config",), ("language_config",), ("thinker_config", "text_config"))


class Fields(Mapping[str, Any]):
    """A JSON object that knows which of its fields were read.

    Attributes:
        read: names that were asked for, also of fields that it does not have.
    """

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = values
        self.read: set[str] = set()

    def __getitem__(self, name: str) -> Any:
        self.read.add(name)
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    @property
    def unread(self) -> list[str]:
        """Names of the fields that nobody asked for."""
        return [name for name in self._values if name not in self.read]


@dataclass(frozen=True)
class Config:
    """A model's configuration.

    Attributes:
        path: the file, for errors.
        fields: those of the text model, which is the whole model unless it is multimodal.
        around: the fields around the text model of a multimodal model; else empty.
        quantization: ``quantization_config``; empty where the checkpoint is not quantised.
        architecture: the class of the text model, as ``DeepseekV3ForCausalLM``.
    """

    path: Path
    fields: Fields
    quantization: Fields
    architecture: str
    around: Fields = field(default_factory=lambda: Fields({}))

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
        objects = next((found for names in _TEXT_CONFIGS if (found := _nested(tree, names))), [tree])
        fields = Fields(objects[-1])
        # In a multimodal model the text part serves the tokens, and the families know the class of that part.
        architectures = fields.get("architectures") or tree.get("architectures")
        if not isinstance(architectures, list) or not architectures or not isinstance(architectures[0], str):
            raise ModelError(
                f"{path}: architectures: wanted a list with the model's class, found {short(architectures)}"
            )
        candidates = (each.get("quantization_config") for each in (tree, *reversed(objects)))
        quantization: Any = next((value for value in candidates if value), {})
        if not isinstance(quantization, dict):
            raise ModelError(f"{path}: quantization_config: wanted an object, found {short(quantization)}")
        around = {name: value for each in objects[:-1] for name, value in each.items()}
        return cls(path, fields, Fields(quantization), architectures[0], Fields(around))

    def value(self, name: str) -> tuple[str, Any]:
        """A field's name and value, which is None where it is missing.

        Of names with ``|`` between them, the first that is there counts. ``a.b`` is the field b of the object a. Raises
        ModelError where two of the names have different values.
        """
        values = {}
        for alternative in name.split("|"):
            head, _, rest = alternative.partition(".")
            value = self.fields.get(head)
            if rest and value is not None:
                value = value.get(rest) if isinstance(value, dict) else None
            if value is not None:
                values[alternative] = value
        first = next(iter(values), name.partition("|")[0])
        for other in values:
            if values[other] != values[first]:
                raise ModelError(
                    f"{self.path}: {first}, {other}: wanted one value, found {short(values[first])} and "
                    f"{short(values[other])}"
                )
        return first, values.get(first)

    def has(self, name: str) -> bool:
        """Whether the config has the field, with another value than null."""
        return self.value(name)[1] is not None

    def number(self, name: str, default: int | None = None, *, least: int = 1, most: int = 1 << 30) -> Size:
        """An integer field with its name; see `value`.

        Raises ModelError where it is missing, too small, too large or no integer.
        """
        name, value = self.value(name)
        if value is None:
            value = default
        if value is None:
            raise ModelError(f"{self.path}: {name}: missing; {self.architecture} needs it")
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise ModelError(f"{self.path}: {name}: wanted an integer from {least} to {most}, found {short(value)}")
        return Size(value, f"{name} {value}")

    def count(self, name: str, *, missing: bool = False) -> Size:
        """An integer field that may be null or 0; 0 for an empty name, and where ``missing`` fields count as 0.

        Raises ModelError for anything else.
        """
        if not name or (missing and name not in self.fields):
            return Size(0, "0")
        return self.number(name, 0 if name in self.fields else None, least=0)

    def flag(self, name: str, default: bool) -> bool:
        """A field that is true or false. Raises ModelError for anything else."""
        value = self.fields.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise ModelError(f"{self.path}: {name}: wanted true or false, found {short(value)}")
        return value

    def entries(self, name: str, count: int) -> list[Any]:
        """A field that is a list with an entry for each layer.

        Raises ModelError where it is missing, no list, or shorter than the ``count`` decoder layers.
        """
        value = self.fields.get(name)
        if not isinstance(value, list) or len(value) < count:
            length = f"a list of {len(value)}" if isinstance(value, list) else short(value)
            raise ModelError(f"{self.path}: {name}: wanted an entry for each of the {count} layers, found {length}")
        return value

    def numbers(self, name: str) -> tuple[int, ...]:
        """A field that is a list of integers; empty where it is missing. Raises ModelError for anything else."""
        value = self.fields.get(name) or []
        if not isinstance(value, list) or any(isinstance(item, bool) or not isinstance(item, int) for item in value):
            raise ModelError(f"{self.path}: {name}: wanted a list of integers, found {short(value)}")
        return tuple(value)

    @property
    def unconverted(self) -> tuple[str, ...]:
        """Modules that the checkpoint keeps unquantised, as it names them."""
        for name in ("ignored_layers", "modules_to_not_convert", "ignore", "exclude_modules"):
            if value := self.quantization.get(name):
                if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
                    raise ModelError(
                        f"{self.path}: quantization_config.{name}: wanted a list of names, found {short(value)}"
                    )
                return tuple(value)
        return ()


def _nested(tree: Mapping[str, Any], names: tuple[str, ...]) -> list[Mapping[str, Any]]:
    """``tree`` and the objects that ``names`` lead to, the last one innermost; empty where one is not there."""
    objects = [tree]
    for name in names:
        value = objects[-1].get(name)
        if not isinstance(value, dict):
            return []
        objects.append(value)
    return objects


def short(value: object) -> str:
    """``value`` for an error: not longer than 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
