"""What a store of results is that several builders share: plans and compiled kernels, each under its key."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class Results(Protocol):
    """Results by name, for example ``plans/<key>``. A key is a digest of everything that the result depends on."""

    def get(self, names: Sequence[str]) -> dict[str, bytes]:
        """Those of ``names`` that are there and whole, with their bytes."""

    def absent(self, names: Sequence[str]) -> list[str]:
        """Those of ``names`` that are not there and may be put there."""

    def put(self, name: str, data: bytes) -> None:
        """Store a result. One that is there already must be the same."""
