"""The points at which an op asks for a kernel: the part of a plan that an artifact's index keeps."""

from __future__ import annotations

from typing import Annotated

from pydantic import FailFast

from cachebuilder.common.records import Count, Record


class Range(Record):
    """The values first, first + step, … last of an op's variable."""

    first: Count
    last: Count
    step: Count


class Selection(Record):
    """Where one op asks for one kernel.

    Attributes:
        op: the op's position in the manifest.
        sm_count: the SM count at which it was swept.
        ranges: the values of its variable that select the kernel, ascending.
    """

    op: Count
    sm_count: Count
    ranges: Annotated[tuple[Range, ...], FailFast()]
