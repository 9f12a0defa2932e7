"""The compilers that are running, so that an interrupt ends them all, with what they started."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

from cachebuilder.errors import CompileError

#: Variables with which nvcc and its host compiler would take other flags or headers than DeepGEMM's.
_FOREIGN_FLAGS = ("NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS", "CPATH", "C_INCLUDE_PATH", "CPLUS_INCLUDE_PATH")


class Processes:
    """Compilers of one build, each in a process group of its own."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: set[subprocess.Popen[bytes]] = set()
        self._stopped = False

    def run(self, command: Sequence[str], folder: Path) -> None:
        """Run to the end; raises `CompileError` with the compiler's output."""
        process = self.start(command, folder, subprocess.PIPE)
        output, _ = process.communicate()
        self.ended(process)
        if process.returncode:
            text = output.decode(errors="replace").strip()
            raise CompileError(text or f"{command[0]} ended with {process.returncode}")

    def start(
        self,
        command: Sequence[str],
        folder: Path,
        output: int | IO[bytes],
        environment: Mapping[str, str] | None = None,
    ) -> subprocess.Popen[bytes]:
        """Start in ``folder``, with all that is printed going to ``output``; whoever waits for it says `ended`.

        Raises:
            CompileError: all was stopped before.
        """
        kept = {name: value for name, value in os.environ.items() if name not in _FOREIGN_FLAGS}
        with self._lock:
            if self._stopped:
                raise CompileError("interrupted")
            process = subprocess.Popen(
                command,
                cwd=folder,
                env=kept | {"TMPDIR": str(folder)} | dict(environment or {}),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            self._running.add(process)
        return process

    def ended(self, process: subprocess.Popen[bytes]) -> None:
        """It was waited for."""
        with self._lock:
            self._running.discard(process)

    def stop(self) -> None:
        """End all that run and start no more."""
        with self._lock:
            self._stopped = True
            for process in self._running:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
