"""Where an op asks for a kernel: the part of a plan that an artifact's index keeps."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Range(_Frozen):
    """Points first, first + step, … last of an op's variable."""

    first: int
    last: int
    step: int


class Selection(_Frozen):
    """Where one op asks for one kernel: at these points, with this many SMs."""

    op: int
    sm_count: int
    ranges: tuple[Range, ...]
