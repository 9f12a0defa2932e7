"""Frozen dataclasses that are read from JSON strictly: what an artifact's index is made of.

The methods have pydantic's names and meanings. Pydantic itself, its import and its schemas, takes longer (150 ms) than
all else that a restore does besides writing files.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Mapping
from typing import Any, Self, TypeVar

T = TypeVar("T")

#: No count or size in an index comes near; a larger one is somebody's attempt.
_MAX_INTEGER = 1 << 40
#: Half a character: no JSON writer of ours escapes anything this way, and no file can hold it.
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


class RecordError(ValueError):
    """JSON that is not the record: ``where`` it is not, and why."""

    def __init__(self, where: str, why: str) -> None:
        super().__init__(f"{where}: {why}" if where else why)
        self.where = where
        self.why = why


class Record:
    """Base of the records. A subclass is a frozen dataclass and says in ``model_validate`` what its fields hold."""

    @classmethod
    def model_validate(cls, value: object, where: str = "") -> Self:
        """The record in a parsed JSON value. Raises `RecordError`."""
        raise NotImplementedError

    @classmethod
    def model_validate_json(cls, data: bytes | str) -> Self:
        """The record in JSON text: UTF-8, no duplicate key, no NaN. Raises `RecordError`."""
        try:
            if isinstance(data, bytes):
                if _SURROGATE.search(data):
                    raise ValueError("a surrogate is escaped")
                data = data.decode()
            parsed = json.loads(data, object_pairs_hook=_no_duplicates, parse_constant=_no_constants)
        except (ValueError, RecursionError) as error:
            raise RecordError("", f"wanted JSON: {error}") from None
        return cls.model_validate(parsed)

    def model_dump(self, *, mode: str = "json", exclude_none: bool = False) -> dict[str, Any]:
        """The record as JSON's own types."""
        dumped = {}
        for name in self.__dataclass_fields__:  # type: ignore[attr-defined]
            value = getattr(self, name)
            if value is not None or not exclude_none:
                dumped[name] = _dump(value, exclude_none)
        return dumped

    def model_dump_json(self, *, indent: int | None = None, exclude_none: bool = False) -> str:
        """The record as JSON text; equal records give equal texts."""
        separators = (",", ":") if indent is None else (",", ": ")
        value = self.model_dump(exclude_none=exclude_none)
        return json.dumps(value, indent=indent, ensure_ascii=False, separators=separators)

    def model_copy(self, *, update: Mapping[str, Any]) -> Self:
        """The same with some fields replaced."""
        return dataclasses.replace(self, **update)  # type: ignore[type-var]


def _dump(value: Any, exclude_none: bool) -> Any:
    if isinstance(value, Record):
        return value.model_dump(exclude_none=exclude_none)
    if isinstance(value, tuple):
        return [_dump(item, exclude_none) for item in value]
    return dict(value) if isinstance(value, dict) else value


def _no_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key occurs twice in one object")
    return found


def _no_constants(name: str) -> object:
    raise ValueError(f"{name} is no JSON")


def fields(value: object, where: str, wanted: frozenset[str], optional: frozenset[str] = frozenset()) -> dict[str, Any]:
    """An object with exactly these keys, those in ``optional`` left out at will."""
    if type(value) is not dict:
        raise RecordError(where, f"wanted an object, found {_kind(value)}")
    if value.keys() != wanted:
        if missing := sorted(wanted - optional - value.keys()):
            raise RecordError(inside(where, missing[0]), "wanted, and not there")
        if more := sorted(value.keys() - wanted):
            raise RecordError(inside(where, more[0][:100]), "not known")
    return value


def inside(where: str, name: str | int) -> str:
    """The place of a part of what is at ``where``."""
    return f"{where}.{name}" if where else str(name)


def text(value: object, where: str) -> str:
    """A string."""
    if type(value) is not str:
        raise RecordError(where, f"wanted a string, found {_kind(value)}")
    return value


def integer(value: object, where: str, most: int = _MAX_INTEGER) -> int:
    """A whole number from 0 to ``most``."""
    if type(value) is not int or not 0 <= value <= most:
        raise RecordError(where, f"wanted a whole number from 0 to {most}, found {_kind(value)}")
    return value


def several(value: object, where: str, read: Callable[[object, str], T], most: int | None = None) -> tuple[T, ...]:
    """A list, each item read by ``read``; at most so many."""
    if type(value) is not list:
        raise RecordError(where, f"wanted a list, found {_kind(value)}")
    if most is not None and len(value) > most:
        raise RecordError(where, f"wanted at most {most}, found {len(value)}")
    return tuple([read(item, f"{where}.{number}") for number, item in enumerate(value)])


def texts(value: object, where: str) -> dict[str, str]:
    """An object of strings."""
    if type(value) is not dict:
        raise RecordError(where, f"wanted an object, found {_kind(value)}")
    return {name: text(item, inside(where, name[:100])) for name, item in value.items()}


def _kind(value: object) -> str:
    return repr(value)[:60] if isinstance(value, str | int | float | None) else f"a {type(value).__name__}"
