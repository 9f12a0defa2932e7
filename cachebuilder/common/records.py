"""Records: frozen pydantic models that are strict about what they read, and the reader of untrusted JSON.

Whatever is read from or written as JSON is a `Record`: an artifact's index, a plan, what ``--json`` prints. Bounds are
declared once, in the field's type, and hold for the reader and for the JSON schema.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Annotated, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from cachebuilder.common.files import write_atomically
from cachebuilder.errors import CacheBuilderError

R = TypeVar("R", bound="Record")


def _line(text: str) -> str:
    if not text.isprintable():
        raise ValueError(f"wanted a line of printable characters, found {text[:60]!r}")
    return text


def _text(text: str) -> str:
    _line(text.replace("\n", "").replace("\t", ""))
    return text


#: A count or a size. No real index comes near the bound; a larger number is an attempt to make a reader allocate.
Count = Annotated[int, Field(ge=0, le=1 << 40)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
#: Text that is printed and becomes part of other texts: no control character, no other line.
Line = Annotated[str, AfterValidator(_line)]
#: The same in lines.
Text = Annotated[str, AfterValidator(_text)]

#: pydantic's words → the house's.
_WORDS = {"Input should be": "wanted", "String should match": "wanted a match of", "Tuple should have": "wanted"}
#: Half a character. No JSON writer of ours escapes anything this way, and no file name or text can hold it.
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


class Record(BaseModel):
    """Base of the records: frozen, no unknown field, no conversion between types."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    def to_json(self) -> str:
        """The record as ``--json`` prints it: indented, a field that is none as null."""
        return self.model_dump_json(indent=1)

    def write(self, path: Path, error: type[CacheBuilderError]) -> None:
        """Put the record at ``path`` as JSON, whole or not at all. Raises ``error`` if it cannot be written."""
        write_atomically(path, self.to_json().encode() + b"\n", error)


class RecordError(ValueError):
    """JSON that is not the record: ``where`` it is wrong, and why."""

    def __init__(self, where: str, why: str) -> None:
        super().__init__(f"{where}: {why}" if where else why)
        self.where = where
        self.why = why


def read(kind: type[R], data: bytes) -> R:
    """Read a record from untrusted JSON: UTF-8, no duplicate key, no NaN, nothing unknown.

    Raises:
        RecordError: the first thing that is wrong; a wrong ``schema_version`` comes before all others.
    """
    try:
        if _SURROGATE.search(data):
            raise ValueError("found half a character, escaped")
        json.loads(
            data.decode(), object_pairs_hook=_check_keys, parse_constant=_refuse_constant, parse_float=_check_float
        )
    except (ValueError, RecursionError) as error:
        raise RecordError("", f"wanted JSON: {error}") from None
    try:
        return kind.model_validate_json(data)
    except ValidationError as error:
        errors = error.errors(include_url=False, include_context=False)
    first = next((e for e in errors if e["loc"] == ("schema_version",)), errors[0])
    raise RecordError(
        ".".join(one_line(str(part)[:100]) for part in first["loc"]), _why(first["type"], first["msg"], first["input"])
    )


def one_line(text: str) -> str:
    """Foreign text for the middle of a line: what would end the line or steer a terminal is printed as its escape."""
    return text if text.isprintable() else repr(text)[1:-1]


def _why(kind: str, message: str, value: object) -> str:
    if kind == "missing":
        return "wanted a value, found none"
    if kind == "extra_forbidden":
        return "unknown field"
    if kind == "value_error":
        return message.removeprefix("Value error, ")
    for words, ours in _WORDS.items():
        message = message.replace(words, ours)
    return f"{message}, found {_shown(value)}"


def _shown(value: object) -> str:
    return repr(value)[:60] if isinstance(value, str | int | float | None) else f"a {type(value).__name__}"


def _check_keys(pairs: list[tuple[str, object]]) -> None:
    """Refuse a key that occurs twice in one object. Keeps nothing, so that a large index is not in memory twice."""
    if len({key for key, _ in pairs}) != len(pairs):
        raise ValueError("a key occurs twice in one object")


def _check_float(text: str) -> float:
    """Refuse 1e999, which is infinite in memory and would be written as ``Infinity``."""
    if not math.isfinite(number := float(text)):
        raise ValueError(f"wanted a finite number, found {text[:60]}")
    return number


def _refuse_constant(name: str) -> object:
    raise ValueError(f"{name} is not JSON")
