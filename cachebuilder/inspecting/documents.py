"""What the verbs print with ``--json``, field by field: their schemas are made from these records.

Fields are added; none is renamed or taken away without a line in the changelog. Nothing here is slow to import.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from cachebuilder.deepgemm.source import Shape
from cachebuilder.planning.selection import Selection
from cachebuilder.restoring.compatibility import Difference
from cachebuilder.restoring.folder import Damage


class Document:
    """Base of what one verb prints."""

    def text(self) -> str:
        """As JSON."""
        return json.dumps(asdict(self), indent=1)  # type: ignore[call-overload]


@dataclass(frozen=True)
class Copy:
    """A DeepGEMM: its folder and its own version."""

    path: str
    version: str


@dataclass(frozen=True)
class MissingKernel:
    """A kernel that serving would compile.

    Attributes:
        entry: its folder in the cache; ``sources[i]`` of the manifest where that is not known.
        damaged: the cache has it, but not with the bytes that its index lists.
    """

    entry: str
    name: str
    damaged: bool
    selected_by: tuple[Selection, ...]


@dataclass(frozen=True)
class RefusedCall:
    """A call that failed for another reason than a missing kernel; ``op`` is its position, ``value`` the point."""

    op: int
    sm_count: int
    value: int
    text: str


@dataclass(frozen=True)
class Replayed:
    """One manifest, replayed.

    Attributes:
        ops: as the manifest gives them.
        hits: entries that were found whole.
        unlisted: those of ``hits`` that are in no artifact's index.
    """

    manifest: str
    ops: tuple[dict[str, Any], ...]
    calls: int
    hits: tuple[str, ...]
    unlisted: tuple[str, ...]
    missing: tuple[MissingKernel, ...]
    refusals: tuple[RefusedCall, ...]
    differences: tuple[Difference, ...]


@dataclass(frozen=True)
class Verify(Document):
    """``verify --json``.

    Attributes:
        complete: serving would compile nothing, and every file is whole.
        entries: how many the artifacts list.
        on_gpu: with ``--device cuda``: the report, whose schema is ``report``.
    """

    complete: bool
    target: str
    deep_gemm: Copy
    entries: int
    damage: tuple[Damage, ...]
    replays: tuple[Replayed, ...]
    on_gpu: dict[str, Any] | None


@dataclass(frozen=True)
class MissedKernel:
    """A kernel that was asked for and not found.

    Attributes:
        first, last: seconds since 1970, UTC.
        shape: what its source says.
        advice: what to add to the manifest.
        source: the text of ``kernel.cu``.
    """

    kernel: str
    count: int
    first: int | None
    last: int | None
    artifacts: tuple[str, ...]
    shape: Shape | None
    advice: str
    source: str | None


@dataclass(frozen=True)
class Misses(Document):
    """``misses --json``, the most often missed first."""

    unreadable_lines: int
    misses: tuple[MissedKernel, ...]
