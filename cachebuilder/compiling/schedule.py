"""A fixed number of workers that take, of all the work that can start, the longest piece first."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any

from cachebuilder.errors import CompileError


@dataclass(order=True, frozen=True)
class _Piece:
    """A piece of work that can start. `heapq` pops the smallest one first: that is the longest piece."""

    minus_seconds: float
    start: Callable[[], Any] = field(compare=False)
    finish: Callable[[Any], None] = field(compare=False)
    fail: Callable[[str], None] = field(compare=False)


class Schedule:
    """Runs the pieces that are added on ``workers`` threads.

    The longest piece starts first. If it started last, all other workers would idle until it ended.

    Args:
        on_share: called with the share of the work that is done, 0 to 1, after each piece.
        stop: ends all running pieces. It is called when `run` is interrupted, which otherwise waits for them.
    """

    def __init__(self, workers: int, on_share: Callable[[float], None], stop: Callable[[], None]) -> None:
        self._workers = workers
        self._on_share = on_share
        self._stop = stop
        self._ready: list[_Piece] = []
        self._running: dict[Future[Any], _Piece] = {}
        # Seconds by the caller's cost model: of the pieces that have ended, and of all work known so far.
        self._ended_seconds = self._known_seconds = 0.0
        self._share = 0.0

    def add(
        self, seconds: float, start: Callable[[], Any], finish: Callable[[Any], None], fail: Callable[[str], None]
    ) -> None:
        """Add a piece of work that can start now.

        Args:
            seconds: what it will cost, by the caller's cost model.
            start: does the work, on a worker's thread.
            finish: called with the result of ``start`` in the thread of `run`; may add more work.
            fail: called instead if ``start`` raises a `CompileError`, with its message; may add more work.
        """
        self._known_seconds += seconds
        heapq.heappush(self._ready, _Piece(-seconds, start, finish, fail))

    def expect(self, seconds: float) -> None:
        """Count work that will be added later; a negative number takes an expectation back."""
        self._known_seconds += seconds

    def run(self) -> None:
        """Work until no piece is left."""
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

    def _end(self, future: Future[Any], piece: _Piece) -> None:
        self._ended_seconds -= piece.minus_seconds
        try:
            result = future.result()
        except CompileError as error:
            piece.fail(str(error))
        else:
            piece.finish(result)
        # The same numbers summed in another order differ in the last bit: rounding makes the final share exactly 1.
        # A failed unit is halved, which adds work: `max` keeps the share from falling.
        share = min(round(self._ended_seconds / self._known_seconds, 9), 1.0)
        self._share = max(self._share, share)
        self._on_share(self._share)
