"""The running compilers of a build. An interrupt ends them all, with the processes that they started."""

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

#: Variables that would give nvcc and its host compiler other flags or headers than DeepGEMM's.
FOREIGN_FLAGS = ("NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS", "CPATH", "C_INCLUDE_PATH", "CPLUS_INCLUDE_PATH")


class Processes:
    """The compilers of one build, each in a process group of its own."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: set[subprocess.Popen[bytes]] = set()
        self._stopped = False

    def run(self, command: Sequence[str], folder: Path) -> None:
        """Run a command in ``folder`` and wait for its end.

        Raises:
            CompileError: it failed, and the text is its output; or `stop` was called before.
        """
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
        """Start a command in ``folder``. The caller waits for its end and then calls `ended`.

        Args:
            output: where both output streams go.
            environment: variables to add to those of this process.

        Raises:
            CompileError: `stop` was called before.
        """
        inherited = {name: value for name, value in os.environ.items() if name not in FOREIGN_FLAGS}
        with self._lock:
            if self._stopped:
                raise CompileError("interrupted")
            process = subprocess.Popen(
                command,
                cwd=folder,
                env=inherited | {"TMPDIR": str(folder)} | dict(environment or {}),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            self._running.add(process)
        return process

    def ended(self, process: subprocess.Popen[bytes]) -> None:
        """Forget a process that has ended and that the caller has waited for."""
        with self._lock:
            self._running.discard(process)

    def stop(self) -> None:
        """Kill all running compilers. No other can be started afterwards."""
        with self._lock:
            self._stopped = True
            for process in self._running:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
