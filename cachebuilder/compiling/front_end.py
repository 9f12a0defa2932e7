"""Front ends that have read the headers once and compile many sources that begin with them.

Of the CPU that nvcc takes for one kernel, most goes into preprocessing and parsing CUTLASS. A held front end
(`front_end.c`) has done that, and is forked for each source: each fork is nvcc's own cicc, that has read that source
from its first line to its last. It costs about 0.55 s of CPU instead of 2 s, so that units may be
small where there are many cores, and its start need not wait for the plan's end.

Held so far: cicc of CUDA 13.0, 13.1 and 13.5. A compiler that cannot be held compiles each source from its beginning.
"""

from __future__ import annotations

import contextlib
import itertools
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

#: Between two looks whether a compiler still runs, in seconds.
_PATIENCE = 0.02

#: Macros that the preprocessor does not list (GCC 12, "Standard Predefined Macros"), and its operators.
_UNLISTED = frozenset(
    f"__{name}__"
    for name in ("BASE_FILE", "COUNTER", "DATE", "FILE", "FILE_NAME", "INCLUDE_LEVEL", "LINE", "TIME", "TIMESTAMP")
) | {"_Pragma"}
_DEFINED = re.compile(r"^#define (\w+)", re.MULTILINE)
_WORD = re.compile(r"[A-Za-z_]\w*")


class FrontEnd:
    """One held front end, for sources that begin with the same includes and are compiled with the same flags."""

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
        self._tried = False
        self._fifo: int | None = None
        self._held = False
        self._macros: frozenset[str] = frozenset()
        self._process: subprocess.Popen[bytes] | None = None

    def open(self) -> bool:
        """Read the headers, if nobody has yet; whether this compiler could be held after them."""
        with self._opening:
            if not self._tried:
                self._tried = True
                # Whoever compiles from the beginning sees what was wrong.
                with contextlib.suppress(CompileError, InstallationError):
                    self._open()
            return self._held

    def _open(self) -> None:
        library = native.shared_library("front_end.so", "front end", [_LIBRARY_SOURCE])
        (self._folder / SOURCE).write_text(self._head + "\n")
        (self._folder / "include").symlink_to(self._inputs.installation.include)
        requests, held = self._folder / "requests", self._folder / "held"
        os.mkfifo(requests)
        # For reading, too: opening does not wait then, and the FIFO's end is the end of this process.
        self._fifo = os.open(requests, os.O_RDWR | os.O_CLOEXEC)
        environment = {
            "FRONT_END_REQUESTS": str(requests),
            "FRONT_END_HELD": str(held),
            "LD_PRELOAD": _preloaded(library),
        }
        with (self._folder / "log.txt").open("wb") as log:
            command = self._inputs.toolchain.ptx_command(SOURCE, "kernel.ptx", self._flags, "include")
            self._process = self._processes.start(command, self._folder, log, environment)
        command = self._inputs.toolchain.macros_command(SOURCE, "macros.txt", self._flags, "include")
        self._processes.run(command, self._folder)
        listed = _DEFINED.findall((self._folder / "macros.txt").read_text())
        self._macros = _UNLISTED.union(listed)
        while not held.exists():
            if self._process.poll() is not None:
                return
            time.sleep(_PATIENCE)
        self._held = True

    def takes(self, body: str) -> bool:
        """Whether sources that go on with ``body`` can be compiled here: the preprocessor would leave it as it is."""
        return self._held and "#" not in body and self._macros.isdisjoint(_WORD.findall(body))

    def compile(self, body: str, folder: Path) -> None:
        """Compile the head and ``body`` to ``folder / "kernel.ptx"``.

        Raises:
            CompileError: with the compiler's output.
        """
        assert self._fifo is not None and self._process is not None
        line = self._head.count("\n") + 1
        (folder / "rest.ii").write_text(f'# {line} "{SOURCE}"\n{body}')
        os.mkfifo(folder / "status")
        answer = os.open(folder / "status", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            os.write(self._fifo, f"{folder}\n".encode())
            status = self._wait(answer)
        finally:
            os.close(answer)
        if status != 0:
            logs = [self._folder / "log.txt", folder / "log.txt"]  # of the headers, of the rest
            text = "".join(log.read_text(errors="replace") for log in logs if log.exists()).strip()
            ended = "with the process it was forked from" if status is None else os.waitstatus_to_exitcode(status)
            raise CompileError(text or f"nvcc's front end ended {ended}")

    def _wait(self, answer: int) -> int | None:
        """The child's wait status; None where all have died before it was said."""
        assert self._process is not None
        poll = select.poll()
        poll.register(answer, select.POLLIN)
        while not poll.poll(1000 * _PATIENCE):
            if self._process.poll() is not None and not poll.poll(0):
                return None
        text = os.read(answer, 16)
        return int(text) if text else None

    def close(self) -> None:
        """End the held compiler; what it is forked for is finished first."""
        with self._opening:
            self._tried = True
            self._held = False
            if self._fifo is not None:
                os.close(self._fifo)
                self._fifo = None
            if self._process is not None:
                self._process.wait()
                self._processes.ended(self._process)


def _preloaded(library: Path) -> str:
    return " ".join(filter(None, [str(library), os.environ.get("LD_PRELOAD")]))


class FrontEnds:
    """All held front ends of one build; leaving the context ends them.

    Args:
        jobs: no more than this many are started before they are needed.
    """

    def __init__(self, inputs: Inputs, jobs: int) -> None:
        self.inputs = inputs
        self.jobs = jobs
        self.processes = Processes()
        self._lock = threading.Lock()
        self._known: dict[tuple[str, tuple[str, ...]], FrontEnd] = {}
        self._threads: list[threading.Thread] = []
        self._scratch = scratch_folder()

    def __enter__(self) -> FrontEnds:
        self._folder = self._scratch.__enter__()
        self._numbers = itertools.count()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is not None:
            self.processes.stop()
        self.close()
        self._scratch.__exit__(kind, error, traceback)

    def expect(self, source: str, flags: tuple[str, ...]) -> None:
        """A source is going to be compiled: start its front end in the background, if there is none yet."""
        key = split_source(source)[0], flags
        with self._lock:
            if key in self._known or len(self._known) >= self.jobs:
                return
        thread = threading.Thread(target=self.of(source, flags).open, daemon=True)
        thread.start()
        self._threads.append(thread)

    def of(self, source: str, flags: tuple[str, ...]) -> FrontEnd:
        """The front end for a source, not opened yet if nobody expected it."""
        head = split_source(source)[0]
        with self._lock:
            if (found := self._known.get((head, flags))) is None:
                folder = self._folder / str(next(self._numbers))
                folder.mkdir()
                found = FrontEnd(self.inputs, self.processes, head, flags, folder)
                self._known[head, flags] = found
            return found

    def expected(self, source: str, flags: tuple[str, ...]) -> bool:
        """Whether there is one already."""
        return (split_source(source)[0], flags) in self._known

    def close(self) -> None:
        """End them all."""
        for thread in self._threads:
            thread.join()
        for front_end in self._known.values():
            front_end.close()
