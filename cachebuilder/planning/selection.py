"""Where an op asks for a kernel: the part of a plan that an artifact's index keeps."""

from __future__ import annotations

from dataclasses import dataclass

from cachebuilder.common.records import Record, fields, inside, integer, several

_RANGE = frozenset(("first", "last", "step"))
_SELECTION = frozenset(("op", "sm_count", "ranges"))


@dataclass(frozen=True)
class Range(Record):
    """Points first, first + step, … last of an op's variable."""

    first: int
    last: int
    step: int

    @classmethod
    def model_validate(cls, value: object, where: str = "") -> Range:
        """Three whole numbers."""
        found = fields(value, where, _RANGE)
        return cls(integer(found["first"], where), integer(found["last"], where), integer(found["step"], where))


@dataclass(frozen=True)
class Selection(Record):
    """Where one op asks for one kernel: at these points, with this many SMs."""

    op: int
    sm_count: int
    ranges: tuple[Range, ...]

    @classmethod
    def model_validate(cls, value: object, where: str = "") -> Selection:
        """The op's position in the index, the SM count, the ranges."""
        found = fields(value, where, _SELECTION)
        ranges = several(found["ranges"], inside(where, "ranges"), Range.model_validate)
        return cls(integer(found["op"], where), integer(found["sm_count"], where), ranges)
