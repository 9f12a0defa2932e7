"""Progress: one protocol for everything that takes long."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """What a caller passes to watch: called now and then as a step goes on.

    Args:
        step: the step's name, as "plan" or "compile".
        done: units done: calls, kernels or bytes.
        total: units in all; 0 while that is unknown.
        share: the share of the work that is done, 0 to 1, where that is not done / total.
    """

    def __call__(self, step: str, done: int, total: int, share: float | None = None) -> None:
        """Take one report."""


def no_progress(step: str, done: int, total: int, share: float | None = None) -> None:
    """Nobody watches."""
