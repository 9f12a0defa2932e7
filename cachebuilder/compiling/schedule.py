"""Work on so many workers at once, each busy to the end: of all that could start, what takes longest starts first."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any

from cachebuilder.errors import CompileError


@dataclass(order=True, frozen=True)
class _Ready:
    """What could start; the smallest is the one that takes longest."""

    minus_seconds: float
    start: Callable[[], Any] = field(compare=False)
    finish: Callable[[Any], None] = field(compare=False)
    fail: Callable[[str], None] = field(compare=False)


class Schedule:
    """Runs what is added on ``workers`` threads.

    A large piece that starts last would be waited for alone, so it starts first.

    Args:
        on_share: called with the share of the work that is done, 0 to 1, after each piece.
        stop: ends all pieces that run. It is called where `run` is interrupted, which would wait for them otherwise.
    """

    def __init__(self, workers: int, on_share: Callable[[float], None], stop: Callable[[], None]) -> None:
        self._workers = workers
        self._on_share = on_share
        self._stop = stop
        self._ready: list[_Ready] = []
        self._running: dict[Future[Any], _Ready] = {}
        self._spent = self._work = self._share = 0.0

    def add(
        self, seconds: float, start: Callable[[], Any], finish: Callable[[Any], None], fail: Callable[[str], None]
    ) -> None:
        """Add a piece of work that can start now.

        Args:
            seconds: what it will cost, by the caller's cost model.
            start: does it, on a thread.
            finish: takes the result in the thread of `run`, and may add more.
            fail: takes the message of the `CompileError` that ``start`` raised instead.
        """
        self._work += seconds
        heapq.heappush(self._ready, _Ready(-seconds, start, finish, fail))

    def expect(self, seconds: float) -> None:
        """Count work that will be added later; a negative number takes an expectation back."""
        self._work += seconds

    def run(self) -> None:
        """Work until nothing is left."""
        with ThreadPoolExecutor(self._workers) as threads:
            try:
                while self._ready or self._running:
                    self._start(threads)
                    ended, _ = wait(self._running, return_when=FIRST_COMPLETED)
                    for future in ended:
                        self._end(future, self._running.pop(future))
            except BaseException:
                self._stop()
                raise

    def _start(self, threads: ThreadPoolExecutor) -> None:
        while self._ready and len(self._running) < self._workers:
            piece = heapq.heappop(self._ready)
            self._running[threads.submit(piece.start)] = piece

    def _end(self, future: Future[Any], piece: _Ready) -> None:
        self._spent -= piece.minus_seconds
        try:
            result = future.result()
        except CompileError as error:
            piece.fail(str(error))
        else:
            piece.finish(result)
        # Sums of the same numbers in another order differ in their last bit: rounded, so that all of the work is 1.
        # A unit that is halved adds work: the share never falls.
        self._share = max(self._share, min(round(self._spent / self._work, 9), 1.0))
        self._on_share(self._share)
