"""Retries of transfers: how often to try again, and how long to wait before each try."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from cachebuilder.common.progress import Progress, no_progress
from cachebuilder.errors import TransferError

T = TypeVar("T")

VARIABLE = "CACHEBUILDER_RETRIES"
_DEFAULT = 5
_FIRST_WAIT, _LONGEST_WAIT = 0.5, 30.0


@dataclass(frozen=True)
class Watcher:
    """The two calls that report on a transfer: its bytes, and a line for each failed try or refused artifact."""

    progress: Progress = no_progress
    notice: Callable[[str], object] = lambda text: None


@dataclass(frozen=True)
class Patience:
    """How slowly an answer may come.

    Attributes:
        seconds: the time for the headers, and what the body may lag behind its rate.
        bytes_per_second: the rate at which the body must come, on average since the request was sent.
    """

    seconds: float = 60.0
    bytes_per_second: int = 16 << 10


class Again(Exception):
    """A failure that another try may mend.

    Attributes:
        error: what to raise after the last try.
        after: seconds that the other side asked to wait.
        moved: the failed try transferred a good part, so it counts as the first failure.
    """

    def __init__(self, error: TransferError, after: float | None = None, moved: bool = False) -> None:
        super().__init__(str(error))
        self.error = error
        self.after = after
        self.moved = moved


@dataclass(frozen=True)
class Retries:
    """How often to try again, the first wait in seconds, and how slowly an answer may come.

    Each wait is about twice the one before, partly random, and at most 30 seconds long, even if the other side asks
    for more. No wait depends on the time of day, which may be wrong here or there.
    """

    count: int = _DEFAULT
    first_wait: float = _FIRST_WAIT
    watcher: Watcher = field(default_factory=Watcher)
    patience: Patience = Patience()

    def run(self, action: Callable[[], T]) -> T:
        """Call ``action`` until it works. Raises its last error, a `TransferError`."""
        failures = 0
        while True:
            try:
                return action()
            except Again as again:
                failures = 1 if again.moved else failures + 1
                if failures > self.count:
                    raise again.error from None
                wait = min(self.first_wait * 2 ** (failures - 1), _LONGEST_WAIT) * random.uniform(0.5, 1.0)
                if again.after is not None:
                    wait = min(max(wait, again.after), _LONGEST_WAIT)
                self.watcher.notice(f"retry {failures} of {self.count} in {wait:.1f} s: {again.error}")
                time.sleep(wait)


def from_environment(watcher: Watcher) -> Retries:
    """The retries that ``CACHEBUILDER_RETRIES`` asks for. Raises `TransferError` if its value is not a count."""
    value = os.environ.get(VARIABLE) or str(_DEFAULT)
    if not (value.isascii() and value.isdigit() and int(value) <= 100):
        raise TransferError(f"{VARIABLE}: wanted a number from 0 to 100, found {value!r}")
    return Retries(int(value), watcher=watcher)
