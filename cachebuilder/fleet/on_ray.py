"""A fleet's jobs as tasks of a Ray cluster. Retries, placement and the dashboard are Ray's.

A task runs on one core, in a worker process in its engine's environment. Its result is in the store before it answers,
so a task that is lost with its node is run again, and finds what the first had finished.
"""

from __future__ import annotations

import logging
import re
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any

from cachebuilder.errors import CacheBuilderError, InstallationError, TransferError
from cachebuilder.fleet.executors import Task
from cachebuilder.fleet.process import Worker, require_done
from cachebuilder.fleet.protocol import JOB, LINE, Answer, Failed

#: A task that a node's end takes with it runs again, however often that happens.
_FOREVER = -1
#: The share of an image's resource that a task takes: the resource says where a task can run, not how many can.
_PRESENT = 0.0001
_CONNECT_SECONDS = 10

#: The workers of this Ray process, by interpreter: a Ray process does many tasks, and so does a worker.
_workers: dict[str, Worker] = {}


def run_job(python: str, job: str) -> str:
    """Do a job in the environment of ``python``; both sides are JSON. This is what runs in the cluster."""
    worker = _workers.setdefault(python, Worker(python))
    try:
        return worker.do(JOB.validate_json(job)).model_dump_json()
    except CacheBuilderError as error:
        return Failed(error=type(error).__name__, message=str(error), hint=error.hint).model_dump_json()


def _require_listener(address: str | None) -> None:
    """Raise `OSError` if nobody listens at ``HOST:PORT``: Ray itself tries for ten minutes and more."""
    match = re.fullmatch(r"(?:ray://)?\[?(.+?)\]?:(\d+)", address or "")
    if match:
        socket.create_connection((match[1], int(match[2])), _CONNECT_SECONDS).close()


class OnRay:
    """A Ray cluster.

    Args:
        address: of a running cluster, as ``ray.init`` takes it (``auto``, ``ray://HOST:10001``); None starts one here.
        pythons: each engine's interpreter on the cluster's nodes.
        images: engines whose tasks run only on nodes with a custom resource of the engine's name.
        run: does a job; a benchmark gives another one.

    Raises:
        InstallationError: Ray is not installed.
        TransferError: the cluster cannot be reached.
    """

    is_parallel = True

    def __init__(
        self,
        address: str | None,
        pythons: Mapping[str, str],
        images: frozenset[str] = frozenset(),
        run: Callable[[str, str], str] = run_job,
    ) -> None:
        try:
            import ray
        except ModuleNotFoundError:
            raise InstallationError(
                "wanted ray, found no such package", hint="pip install 'cachebuilder[ray]'"
            ) from None
        self._ray: Any = ray
        self._pythons, self._images = pythons, images
        try:
            _require_listener(address)
            ray.init(address=address or "local", log_to_driver=False, logging_level=logging.ERROR)
        except (OSError, RuntimeError, ValueError) as error:
            raise TransferError(
                f"Ray at {address}: {error}", hint="check that the cluster runs: ray status --address …"
            ) from None
        self._remote = ray.remote(num_cpus=1, max_retries=_FOREVER)(run)

    def __enter__(self) -> OnRay:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._ray.shutdown()

    def run(self, tasks: Sequence[Task]) -> Iterator[tuple[Task, Answer | CacheBuilderError]]:
        """As of `Executor`."""
        waiting = {self._start(task): task for task in tasks}
        while waiting:
            ready, _ = self._ray.wait(list(waiting), num_returns=1)
            for reference in ready:
                yield waiting.pop(reference), self._answer(reference)

    def _start(self, task: Task) -> Any:
        resources = {task.engine: _PRESENT} if task.engine in self._images else {}
        remote = self._remote.options(resources=resources)
        return remote.remote(self._pythons[task.engine], task.job.model_dump_json())

    def _answer(self, reference: Any) -> Answer | CacheBuilderError:
        try:
            line = LINE.validate_json(self._ray.get(reference))
        except self._ray.exceptions.RayError as error:
            return InstallationError(f"Ray could not run a task: {str(error).strip().splitlines()[-1]}")
        try:
            return require_done(line)  # type: ignore[arg-type]  # a task answers with its last line only
        except CacheBuilderError as error:
            return error
