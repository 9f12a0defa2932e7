"""Trying again: how often, how long to wait in between, and telling it."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from cachebuilder.errors import TransferError

T = TypeVar("T")

VARIABLE = "CACHEBUILDER_RETRIES"
_DEFAULT = 5
_FIRST_WAIT, _LONGEST_WAIT = 0.5, 30.0


def _no_progress(step: str, done: int, total: int) -> None:
    pass


def _no_notice(text: str) -> None:
    pass


@dataclass(frozen=True)
class Watcher:
    """Who is told: bytes done of bytes in all for a step, and a line where something is worth one."""

    progress: Callable[[str, int, int], object] = _no_progress
    notice: Callable[[str], object] = _no_notice


class Again(Exception):
    """What failed may work in a moment.

    Attributes:
        error: what to say where it never does.
        after: seconds that the other side asked to wait; None where it did not.
        moved: something was got before it failed, so it counts as the first failure.
    """

    def __init__(self, error: TransferError, after: float | None = None, moved: bool = False) -> None:
        super().__init__(str(error))
        self.error = error
        self.after = after
        self.moved = moved


@dataclass(frozen=True)
class Retries:
    """How often to try again, and the first wait in seconds; each next one is twice as long, and a little random.

    Waits are never told by a clock of the day, which may be wrong; what the other side asks for is kept within bounds.
    """

    count: int = _DEFAULT
    first_wait: float = _FIRST_WAIT
    watcher: Watcher = field(default_factory=Watcher)

    def run(self, action: Callable[[], T]) -> T:
        """``action`` until it works; raises its last error, a `TransferError`."""
        failed = 0
        while True:
            try:
                return action()
            except Again as again:
                failed = 1 if again.moved else failed + 1
                if failed > self.count:
                    raise again.error from None
                wait = min(self.first_wait * 2 ** (failed - 1), _LONGEST_WAIT) * random.uniform(0.5, 1.0)
                if again.after is not None:
                    wait = min(max(wait, again.after), _LONGEST_WAIT)
                self.watcher.notice(f"again in {wait:.1f} s ({failed} of {self.count}): {again.error}")
                time.sleep(wait)


def from_environment(watcher: Watcher) -> Retries:
    """As ``CACHEBUILDER_RETRIES`` says. Raises `TransferError` where it is no count."""
    text = os.environ.get(VARIABLE) or str(_DEFAULT)
    if not (text.isascii() and text.isdigit() and int(text) <= 100):
        raise TransferError(f"{VARIABLE}: wanted a number from 0 to 100, found {text!r}")
    return Retries(int(text), watcher=watcher)
