"""A worker process in an engine's environment, as the driver sees it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from cachebuilder import errors
from cachebuilder.common.progress import Progress, no_progress
from cachebuilder.errors import CacheBuilderError, InstallationError
from cachebuilder.fleet.environments import package_path
from cachebuilder.fleet.protocol import LINE, Answer, Failed, Job, Notice, Step

_LAST_BYTES = 2000
_END_SECONDS = 10
#: How often a job is tried whose worker is killed: by a person, or because the machine's memory is full.
_TRIES = 3


class _Killed(InstallationError):
    """A signal has ended a worker."""


class Worker:
    """A worker, started with its first job and used for all that follow.

    Args:
        python: the interpreter of the engine's environment.
    """

    def __init__(self, python: str) -> None:
        self._python = python
        self._process: subprocess.Popen[str] | None = None

    def do(
        self, job: Job, progress: Progress = no_progress, notice: Callable[[str], object] = lambda text: None
    ) -> Answer:
        """Have a job done. If a signal ends the worker, another one does the job.

        Raises:
            CacheBuilderError: the job's own error.
            InstallationError: the environment lacks a package that the worker needs, or the worker was ended.
        """
        for tries_left in reversed(range(_TRIES)):
            try:
                return self._do(job, progress, notice)
            except _Killed as killed:
                if not tries_left:
                    raise InstallationError(f"{killed}; this happened {_TRIES} times", hint=killed.hint) from None
        raise AssertionError("the last try returns or raises")

    def close(self) -> None:
        """End the worker, which ends the compilers that it has started."""
        process, self._process = self._process, None
        if process is None:
            return
        process.send_signal(signal.SIGINT)
        try:
            process.communicate(timeout=_END_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()

    def _do(self, job: Job, progress: Progress, notice: Callable[[str], object]) -> Answer:
        process = self._process or self._start()
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(job.model_dump_json() + "\n")
            process.stdin.flush()
        except BrokenPipeError:
            raise self._ended() from None
        for text in process.stdout:
            line = LINE.validate_json(text)
            if isinstance(line, Step):
                progress(line.step, line.done, line.total, line.share)
            elif isinstance(line, Notice):
                notice(line.text)
            else:
                return require_done(line)
        raise self._ended()

    def _start(self) -> subprocess.Popen[str]:
        environment = dict(os.environ)
        if not self._is_this_python():
            environment["PYTHONPATH"] = package_path()
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115
        self._process = subprocess.Popen(
            [self._python, "-P", "-m", "cachebuilder.fleet.worker"],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )
        return self._process

    def _is_this_python(self) -> bool:
        return Path(self._python) == Path(sys.executable)

    def _ended(self) -> CacheBuilderError:
        """The error for a worker that ended without an answer."""
        assert self._process is not None
        code = self._process.wait()
        self._errors.seek(max(0, self._errors.seek(0, os.SEEK_END) - _LAST_BYTES))
        text = self._errors.read().decode(errors="replace").strip()
        self._process = None
        if code < 0:
            hint = "see whether the machine's memory is full: dmesg says which processes the kernel has ended"
            return _Killed(f"{self._python}: signal {-code} ended the worker:\n{text}".rstrip(":\n"), hint=hint)
        needs: str | None = None
        if "ModuleNotFoundError" in text:
            needs = "install cachebuilder's needs in that environment: pip install 'cachebuilder[observe,ship]'"
        return InstallationError(f"{self._python}: the worker ended with {code}:\n{text}", hint=needs)


def require_done(answer: Answer) -> Answer:
    """The answer of a job that was done. Raises the error of one that failed."""
    if not isinstance(answer, Failed):
        return answer
    kind = getattr(errors, answer.error, CacheBuilderError)
    raise kind(answer.message, hint=answer.hint)
