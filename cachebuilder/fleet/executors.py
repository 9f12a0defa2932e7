"""Who does a fleet's jobs: processes of this machine, one after the other. `on_ray` is the other way."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol

from cachebuilder.common.progress import Progress, no_progress
from cachebuilder.errors import CacheBuilderError
from cachebuilder.fleet.process import Worker
from cachebuilder.fleet.protocol import Answer, Job


@dataclass(frozen=True)
class Task:
    """A job, and the engine in whose environment it is done."""

    engine: str
    job: Job


class Executor(Protocol):
    """Does tasks.

    Attributes:
        is_parallel: many tasks run at once, each on one core; otherwise each one has all cores of this machine.
    """

    is_parallel: bool

    def run(self, tasks: Sequence[Task]) -> Iterator[tuple[Task, Answer | CacheBuilderError]]:
        """Each task with its answer or its error, as soon as it has one."""


class Local:
    """One worker process for each engine, whose jobs use all cores.

    Args:
        pythons: each engine's interpreter.
    """

    is_parallel = False

    def __init__(
        self,
        pythons: Mapping[str, str],
        progress: Progress = no_progress,
        notice: Callable[[str], object] = lambda text: None,
    ) -> None:
        self._workers = {engine: Worker(python) for engine, python in pythons.items()}
        self._progress, self._notice = progress, notice

    def __enter__(self) -> Local:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for worker in self._workers.values():
            worker.close()

    def run(self, tasks: Sequence[Task]) -> Iterator[tuple[Task, Answer | CacheBuilderError]]:
        """As of `Executor`."""
        for task in tasks:
            try:
                yield task, self._workers[task.engine].do(task.job, self._progress, self._notice)
            except CacheBuilderError as error:
                yield task, error
