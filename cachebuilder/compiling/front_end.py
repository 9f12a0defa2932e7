"""Held front ends: each parses the headers once, and then compiles many sources that begin with those headers.

Most of the CPU time that nvcc takes for one kernel goes into preprocessing and parsing CUTLASS. A held front end
(`front_end.c`) has done that, and forks for each source. Each fork is nvcc's own cicc, which has then read that source
from its first line to its last. A fork costs about 0.55 s of CPU instead of 2 s. Units may therefore be small on a
machine with many cores, and a front end can start before the plan is complete.

Known to work: cicc of CUDA 13.0, 13.1 and 13.5. If a compiler cannot be held, nvcc compiles each source from its first
line.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import subprocess
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from cachebuilder.common import native
from cachebuilder.common.cache import scratch_folder
from cachebuilder.compiling.units import split_source
from cachebuilder.cuda.processes import Processes
from cachebuilder.deepgemm.entries import SOURCE
from cachebuilder.errors import CompileError, InstallationError
from cachebuilder.manifest.inputs import Inputs

_LIBRARY_SOURCE = Path(__file__).with_name("front_end.c")

#: How often to check that a compiler still runs, in seconds.
_POLL_SECONDS = 0.02

#: Macros that the preprocessor does not list (GCC 12, "Standard Predefined Macros"), and its operators.
_UNLISTED_MACROS = frozenset(
    f"__{name}__"
    for name in ("BASE_FILE", "COUNTER", "DATE", "FILE", "FILE_NAME", "INCLUDE_LEVEL", "LINE", "TIME", "TIMESTAMP")
) | {"_Pragma"}
_DEFINE = re.compile(r"^#define (\w+)", re.MULTILINE)
_WORD = re.compile(r"[A-Za-z_]\w*")


class FrontEnd:
    """One front end, for sources that begin with the same includes and are compiled with the same flags.

    Args:
        head: the text that all these sources begin with, up to and including the last include.
        folder: an empty folder of its own.
    """

    def __init__(
        self,
        inputs: Inputs,
        processes: Processes,
        head: str,
        flags: Sequence[str],
        folder: Path,
    ) -> None:
        self._inputs = inputs
        self._processes = processes
        self._head = head
        self._flags = flags
        self._folder = folder
        self._opening = threading.Lock()
        self._open_attempted = False
        self._request_fifo: int | None = None
        self._held = False
        self._macros: frozenset[str] = frozenset()
        self._process: subprocess.Popen[bytes] | None = None

    def open(self) -> bool:
        """Parse the headers on the first call; returns whether the compiler is held behind them."""
        with self._opening:
            if not self._open_attempted:
                self._open_attempted = True
                # If the headers are wrong, nvcc reports it when it compiles a source from its first line.
                with contextlib.suppress(CompileError, InstallationError):
                    self._open()
            return self._held

    def _open(self) -> None:
        library = native.shared_library("front_end.so", "front end", [_LIBRARY_SOURCE])
        (self._folder / SOURCE).write_text(self._head + "\n")
        (self._folder / "include").symlink_to(self._inputs.installation.include)
        requests, held_file = self._folder / "requests", self._folder / "held"
        os.mkfifo(requests)
        # Opened for reading as well, so that this call does not wait for a reader. The held cicc reads the end of the
        # FIFO when this process closes it or ends.
        self._request_fifo = os.open(requests, os.O_RDWR | os.O_CLOEXEC)
        environment = {
            "FRONT_END_REQUESTS": str(requests),
            "FRONT_END_HELD": str(held_file),
            "LD_PRELOAD": _preloaded(library),
        }
        with (self._folder / "log.txt").open("wb") as log:
            command = self._inputs.toolchain.ptx_command(SOURCE, "kernel.ptx", self._flags, "include")
            self._process = self._processes.start(command, self._folder, log, environment)
        command = self._inputs.toolchain.macros_command(SOURCE, "macros.txt", self._flags, "include")
        self._processes.run(command, self._folder)
        listed_macros = _DEFINE.findall((self._folder / "macros.txt").read_text())
        self._macros = _UNLISTED_MACROS.union(listed_macros)
        while not held_file.exists():
            if self._process.poll() is not None:
                return
            time.sleep(_POLL_SECONDS)
        self._held = True

    def takes(self, body: str) -> bool:
        """Whether the front end is held and can compile ``body``, the text after the includes.

        ``body`` does not pass through the preprocessor here, so it must be text that the preprocessor would not change.
        """
        return self._held and "#" not in body and self._macros.isdisjoint(_WORD.findall(body))

    def compile(self, body: str, folder: Path) -> None:
        """Compile the head and ``body`` to ``folder / "kernel.ptx"``. Call it only where `takes` says yes.

        Raises:
            CompileError: cicc refuses the source, and the text is its output; or cicc was killed.
        """
        assert self._request_fifo is not None and self._process is not None
        line = self._head.count("\n") + 1
        (folder / "rest.ii").write_text(f'# {line} "{SOURCE}"\n{body}')
        os.mkfifo(folder / "status")
        status_fifo = os.open(folder / "status", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            os.write(self._request_fifo, f"{folder}\n".encode())
            status = self._wait(status_fifo)
        finally:
            os.close(status_fifo)
        if status == 0:
            return
        logs = [self._folder / "log.txt", folder / "log.txt"]  # of the headers, of the rest
        output = "".join(log.read_text(errors="replace") for log in logs if log.exists()).strip()
        if output:
            raise CompileError(output)
        if status is None:
            raise CompileError("nvcc's front end was killed")
        raise CompileError(f"nvcc's front end ended with {os.waitstatus_to_exitcode(status)}")

    def _wait(self, status_fifo: int) -> int | None:
        """Wait for the fork that compiles; returns its wait status, or None if the held cicc died first."""
        assert self._process is not None
        poll = select.poll()
        poll.register(status_fifo, select.POLLIN)
        while not poll.poll(1000 * _POLL_SECONDS):
            if self._process.poll() is not None and not poll.poll(0):
                return None
        text = os.read(status_fifo, 16)
        return int(text) if text else None

    def close(self) -> None:
        """End the held compiler, after its forks have finished. It cannot be opened again."""
        with self._opening:
            self._open_attempted = True
            self._held = False
            if self._request_fifo is not None:
                os.close(self._request_fifo)
                self._request_fifo = None
            if self._process is not None:
                self._process.wait()
                self._processes.ended(self._process)


def _preloaded(library: Path) -> str:
    """``LD_PRELOAD`` with ``library`` before what this process preloads."""
    return " ".join(filter(None, [str(library), os.environ.get("LD_PRELOAD")]))


class FrontEnds:
    """All front ends of one build; leaving the context ends them.

    Args:
        jobs: `expect` starts at most this many.
    """

    def __init__(self, inputs: Inputs, jobs: int) -> None:
        self.inputs = inputs
        self.jobs = jobs
        self.processes = Processes()
        self._lock = threading.Lock()
        self._front_ends: dict[tuple[str, tuple[str, ...]], FrontEnd] = {}
        self._threads: list[threading.Thread] = []
        self._scratch = scratch_folder()

    def __enter__(self) -> FrontEnds:
        self._folder = self._scratch.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is not None:
            self.processes.stop()
        self.close()
        self._scratch.__exit__(kind, error, traceback)

    def expect(self, source: str, flags: tuple[str, ...]) -> None:
        """Start the front end of a source that will be compiled, in the background, unless it exists already."""
        with self._lock:
            if self.expected(source, flags) or len(self._front_ends) >= self.jobs:
                return
        thread = threading.Thread(target=self.of(source, flags).open, daemon=True)
        thread.start()
        self._threads.append(thread)

    def of(self, source: str, flags: tuple[str, ...]) -> FrontEnd:
        """The front end for a source. If `expect` did not start it, the caller opens it."""
        head = split_source(source)[0]
        with self._lock:
            if (head, flags) not in self._front_ends:
                folder = self._folder / str(len(self._front_ends))
                folder.mkdir()
                self._front_ends[head, flags] = FrontEnd(self.inputs, self.processes, head, flags, folder)
            return self._front_ends[head, flags]

    def expected(self, source: str, flags: tuple[str, ...]) -> bool:
        """Whether the front end for a source exists already."""
        return (split_source(source)[0], flags) in self._front_ends

    def close(self) -> None:
        """End all front ends."""
        for thread in self._threads:
            thread.join()
        for front_end in self._front_ends.values():
            front_end.close()
