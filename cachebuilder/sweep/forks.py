"""Spread the parts of one sweep over forks of the process that has imported torch and DeepGEMM.

Each fork takes the next part from a pipe until none is left, the longest parts first. All forks work in one cache root,
as the processes of an engine do: DeepGEMM makes an entry in a folder of its own and renames it, so an entry that two of
them make at once is there once.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NoReturn

from cachebuilder.common.records import Record
from cachebuilder.sweep.loading import end
from cachebuilder.sweep.protocol import Position, SweepJob
from cachebuilder.sweep.worker import Part, PartResult, Worker

#: A fork costs as much as so many calls.
_WORTH_A_FORK = 400
_NUMBER_BYTES = 4


class _ForkAnswer(Record):
    """What one fork did, and the memory that it shares with no other process."""

    results: tuple[PartResult, ...]
    own_bytes: int


def worth(job: SweepJob, parts: Sequence[Part]) -> int:
    """How many processes are worth their forks."""
    return min(job.processes, len(parts), max(1, sum(map(len, parts)) // _WORTH_A_FORK))


def work(
    worker: Worker, parts: Sequence[Part], folder: Path, positions: Sequence[Position]
) -> tuple[list[PartResult], int]:
    """Have ``worker`` do all ``parts`` in a fork for each of ``positions`` but the first, which is the whole job's.

    Returns the results, and how much memory all forks had for themselves.
    """
    queue, queue_end = os.pipe()
    forks = _Forks(folder, positions)

    def work_at(number: int) -> None:
        os.close(queue_end)
        worker.move_to(positions[number])
        results = tuple(worker.do(parts, _numbers(queue)))
        forks.leave(number, _ForkAnswer(results=results, own_bytes=_own_bytes()))

    numbers = range(1, len(positions))
    for number in numbers:
        forks.start(number, partial(work_at, number))
    os.close(queue)
    with contextlib.suppress(BrokenPipeError):  # all forks have ended
        for part in sorted(range(len(parts)), key=lambda number: -len(parts[number])):
            os.write(queue_end, part.to_bytes(_NUMBER_BYTES, "little"))
    os.close(queue_end)
    forks.wait()
    answers = [forks.answer(number) for number in numbers]
    return [result for answer in answers for result in answer.results], sum(answer.own_bytes for answer in answers)


def _numbers(queue: int) -> Iterator[int]:
    """The numbers that this process gets of those in a pipe that several processes read."""
    while data := os.read(queue, _NUMBER_BYTES):
        yield int.from_bytes(data, "little")


class _Forks:
    """The forks of this process."""

    def __init__(self, folder: Path, positions: Sequence[Position]) -> None:
        self._folder = folder
        self._positions = positions
        self._running: dict[int, int] = {}  # process id → number

    def start(self, number: int, work: Callable[[], None]) -> None:
        """Fork; the fork does ``work`` and ends."""
        sys.stdout.flush()
        if process := os.fork():
            self._running[process] = number
            return
        try:
            work()
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)
        end()

    def leave(self, number: int, answer: _ForkAnswer) -> None:
        """In a fork: write down what it did."""
        self._file(number).write_text(answer.model_dump_json())

    def answer(self, number: int) -> _ForkAnswer:
        """What a fork wrote down."""
        return _ForkAnswer.model_validate_json(self._file(number).read_bytes())

    def _file(self, number: int) -> Path:
        return self._folder / f"fork-{number}.json"

    def wait(self) -> None:
        """Wait until all forks have ended. If one dies, end the others, and then end as it did, at its position."""
        while self._running:
            process, status = os.wait()
            number = self._running.pop(process)
            if status == 0:
                continue
            for other in self._running:
                os.kill(other, signal.SIGKILL)
            whole, own = self._positions[0], self._positions[number]
            whole.op, whole.value = own.op, own.value
            _end_as(os.waitstatus_to_exitcode(status))


def _end_as(exit_code: int) -> NoReturn:
    """End this process as one that ended with ``exit_code``, negative for a signal."""
    sys.stdout.flush()
    if exit_code < 0:
        with contextlib.suppress(OSError):  # SIGKILL cannot be handled
            signal.signal(-exit_code, signal.SIG_DFL)
        os.kill(os.getpid(), -exit_code)
    os._exit(abs(exit_code))


def _own_bytes() -> int:
    """The memory of this process that no other process shares; 0 where the system does not say it."""
    with contextlib.suppress(OSError):
        text = Path("/proc/self/smaps_rollup").read_text()
        return 1024 * sum(int(number) for number in re.findall(r"^Private_\w+: +(\d+) kB$", text, re.MULTILINE))
    return 0
