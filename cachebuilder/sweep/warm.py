"""Children that start from a process which has imported torch already, for callers that need several of them."""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Protocol

from cachebuilder.sweep.fork_server import READY, Request

#: A process reads variables with these beginnings only when it starts, or when it imports torch.
_READ_AT_START = ("LD_", "PYTHON", "OMP_", "GOMP_", "KMP_", "MKL_")


class Child(Protocol):
    """A running child."""

    def wait(self, seconds: float) -> int | None:
        """Its exit code, negative for a signal; None if it still runs after so many seconds."""

    def kill(self) -> None:
        """End it, and what it started."""


class Process:
    """A child that is a program of its own."""

    def __init__(self, command: list[str], environment: Mapping[str, str], log: Path) -> None:
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,  # Ctrl-C reaches the parent only, which ends the child
            )

    def wait(self, seconds: float) -> int | None:
        """As of `Child`."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(seconds)
        return self._process.returncode

    def kill(self) -> None:
        """As of `Child`."""
        with contextlib.suppress(ProcessLookupError):  # the child may have ended in the meantime
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


class Server:
    """A `fork_server`, started with the first request, and its one running child."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._started_with: dict[str, str] = {}

    def start(self, folder: Path, environment: Mapping[str, str], log: Path) -> Child | None:
        """Start a sweep; None if it cannot be done here, since the server cannot import torch, or has ended."""
        at_start = {name: value for name, value in environment.items() if name.startswith(_READ_AT_START)}
        if at_start != self._started_with:
            self.kill()
        if self._process is None:
            self._started_with = at_start
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "cachebuilder.sweep.program", "fork_server"],
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                start_new_session=True,
            )
            if self._read_line() != READY:
                self.kill()
                return None
        assert self._process.stdin is not None
        request = Request(folder=str(folder), log=str(log), environment=dict(environment))
        try:
            self._process.stdin.write(request.model_dump_json() + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:  # somebody ended the server
            self.kill()
            return None
        return self

    def wait(self, seconds: float) -> int | None:
        """As of `Child`."""
        assert self._process is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)  # type: ignore[arg-type]
            if not selector.select(seconds):
                return None
        line = self._read_line()
        return int(line) if line else -signal.SIGKILL  # no answer: the server was killed

    def kill(self) -> None:
        """As of `Child`. The next request starts another server."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.communicate()
            self._process = None

    def _read_line(self) -> str:
        assert self._process is not None and self._process.stdout is not None
        return self._process.stdout.readline().strip()


_server: ContextVar[Server | None] = ContextVar("server", default=None)


@contextmanager
def kept() -> Iterator[None]:
    """Within the context, torch is imported once for all sweeps on the virtual GPU, which run one after the other."""
    if _server.get() is not None:
        yield
        return
    server = Server()
    token = _server.set(server)
    try:
        yield
    finally:
        _server.reset(token)
        server.kill()


def start(module: str, folder: Path, environment: Mapping[str, str], log: Path) -> Child:
    """Start ``cachebuilder.sweep.<module>`` with the job in ``folder``.

    Args:
        environment: the child's whole environment.
        log: gets its output.
    """
    server = _server.get()
    if server is not None and module == "child" and (child := server.start(folder, environment, log)):
        return child
    # -P: no module of the working folder
    return Process([sys.executable, "-P", "-m", "cachebuilder.sweep.program", module, str(folder)], environment, log)
