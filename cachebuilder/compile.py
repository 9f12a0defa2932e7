"""Compile every kernel of a plan, in parallel, through the store, to bytes that depend on nothing but their inputs.

Kernels go to nvcc in units that share a front-end pass (`units`), with DeepGEMM's own flags, to PTX. The PTX is taken
apart into one canonical module a kernel (`ptx`), and each becomes a cubin by itself. The machine code is the one of a
single nvcc call, which `check` compares; the names of internal globals are not.
"""

from __future__ import annotations

import contextlib
import hashlib
import heapq
import io
import itertools
import json
import os
import resource
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Literal

from cachebuilder import ptx, units
from cachebuilder.deepgemm.entries import SOURCE
from cachebuilder.deepgemm.installation import Installation
from cachebuilder.errors import CompileError
from cachebuilder.paths import scratch_folder
from cachebuilder.plan import Kernel
from cachebuilder.ptx import KernelPtx, PtxError
from cachebuilder.store import CubinStore
from cachebuilder.toolchain import Toolchain, cubin_command, host_compiler_text, ptx_command
from cachebuilder.units import Unit

#: The code that makes a cubin of a source: a store serves only what the same code made.
_RECIPE = ("compile.py", "ptx.py", "toolchain.py", "units.py")

#: nvcc's own times, in a compilation's folder.
_PHASES = "phases.csv"

#: Variables with which nvcc and its host compiler would take other flags or headers than DeepGEMM's.
_FOREIGN_FLAGS = ("NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS", "CPATH", "C_INCLUDE_PATH", "CPLUS_INCLUDE_PATH")


@dataclass(frozen=True)
class Task:
    """One call of nvcc.

    Attributes:
        step: ``ptx`` for sources to PTX, ``cubin`` for one kernel's PTX to its cubin.
        job: which of the parallel compilers, from 0.
        start, seconds: since compiling began, and how long.
        phases: nvcc's own, (name, seconds), where it told them.
    """

    step: Literal["ptx", "cubin"]
    job: int
    start: float
    seconds: float
    kernels: tuple[Kernel, ...]
    phases: tuple[tuple[str, float], ...]


@dataclass
class Report:
    """What compiling took: kernels compiled, how many the store had, seconds of wall clock and of children's CPU.

    ``tasks`` are the calls of nvcc that ended well, in the order in which they ended.
    """

    compiled: list[Kernel] = field(default_factory=list)
    reused: int = 0
    wall_seconds: float = 0.0
    cpu_seconds: float = 0.0
    jobs: int = 0
    tasks: list[Task] = field(default_factory=list)
    failures: list[tuple[Kernel, str]] = field(default_factory=list)


class Processes:
    """The compilers that are running, so that an interrupt ends them all, with what they started."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: set[subprocess.Popen[bytes]] = set()
        self._stopped = False

    def run(self, command: Sequence[str], folder: Path) -> None:
        """Run to the end; raises `CompileError` with the compiler's output."""
        environment = {name: value for name, value in os.environ.items() if name not in _FOREIGN_FLAGS}
        with self._lock:
            if self._stopped:
                raise CompileError("interrupted")
            process = subprocess.Popen(
                command,
                cwd=folder,
                env=environment | {"TMPDIR": str(folder)},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            self._running.add(process)
        output, _ = process.communicate()
        with self._lock:
            self._running.discard(process)
        if process.returncode:
            text = output.decode(errors="replace").strip()
            raise CompileError(text or f"{command[0]} ended with {process.returncode}")

    def stop(self) -> None:
        """End all that run and start no more."""
        with self._lock:
            self._stopped = True
            for process in self._running:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)


def compile_all(
    kernels: Sequence[Kernel],
    toolchain: Toolchain,
    installation: Installation,
    store: CubinStore,
    jobs: int | None = None,
    progress: Callable[[int, int, float], None] = lambda done, total, share: None,
    grouped: bool = True,
) -> tuple[dict[str, bytes], Report]:
    """Compile ``kernels``; returns each entry's cubin.

    Args:
        jobs: compilers at once; the processor count this process may use when left out.
        progress: called with (kernels done, kernels in all, share of the work done) after each call of nvcc. Kernels
            come late, after their unit's front end: the share goes by `units`' cost model, what the store had aside.
        grouped: let kernels share a front-end pass; the bytes are the same either way.

    Raises:
        CompileError: at least one kernel did not compile; the others are finished and in the store first, and the
            text holds each one's compiler output.
        ToolchainError: nvcc has no host compiler.
    """
    started, cpu = time.monotonic(), _children_cpu()
    report = Report()
    cubins: dict[str, bytes] = {}
    keys = _keys(kernels, toolchain, installation)
    for kernel in kernels:
        if (cubin := store.get(keys[kernel.entry])) is not None:
            cubins[kernel.entry] = cubin
    report.reused = len(cubins)
    progress(len(cubins), len(kernels), 0.0)
    missing = [kernel for kernel in kernels if kernel.entry not in cubins]
    report.jobs = jobs = jobs or available_cores()

    def keep(kernel: Kernel, cubin: bytes) -> None:
        store.put(keys[kernel.entry], cubin)
        cubins[kernel.entry] = cubin
        report.compiled.append(kernel)

    if missing:
        work = units.group(missing, jobs) if grouped else units.separate(missing)
        with scratch_folder() as scratch:
            pool = _Pool(
                toolchain, installation, scratch, jobs, keep, lambda share: progress(len(cubins), len(kernels), share)
            )
            report.failures, report.tasks = pool.run(work), pool.tasks
    report.wall_seconds, report.cpu_seconds = time.monotonic() - started, _children_cpu() - cpu
    if report.failures:
        parts = [f"{kernel.entry}:\n{output}" for kernel, output in report.failures]
        raise CompileError(
            f"{len(parts)} of {len(kernels)} kernels did not compile, the others are in the store\n" + "\n".join(parts)
        )
    return cubins, report


@dataclass(order=True, frozen=True)
class _Ready:
    """A call of nvcc that could start; the smallest is the one that takes longest."""

    minus_seconds: float
    item: Unit | Kernel = field(compare=False)
    start: Callable[[], Any] = field(compare=False)


class _Pool:
    """The compilations of one build: units to PTX, kernels to cubins, on ``jobs`` threads that wait for processes.

    Of all that could start, what takes longest does: a large kernel's ptxas that starts last is waited for alone.
    """

    def __init__(
        self,
        toolchain: Toolchain,
        installation: Installation,
        scratch: Path,
        jobs: int,
        keep: Callable[[Kernel, bytes], None],
        tell: Callable[[float], None],
    ) -> None:
        self._toolchain = toolchain
        self._installation = installation
        self._scratch = scratch
        self._keep = keep
        self._tell = tell
        self._spent = self._work = 0.0  # by the cost model, seconds
        self._processes = Processes()
        self._threads = ThreadPoolExecutor(jobs)
        self._jobs = jobs
        self._ready: list[_Ready] = []
        self._running: dict[Future[Any], _Ready] = {}
        self._folders = itertools.count()
        self._started = time.monotonic()
        self._free: SimpleQueue[int] = SimpleQueue()
        for job in range(jobs):
            self._free.put(job)
        self.tasks: list[Task] = []

    def run(self, work: Sequence[Unit]) -> list[tuple[Kernel, str]]:
        """Compile all units; returns the kernels that failed, each with its compiler's output."""
        failures: list[tuple[Kernel, str]] = []
        with self._threads:
            try:
                for unit in work:
                    self._add(unit)
                    self._work += unit.ptxas_guess
                while self._ready or self._running:
                    while self._ready and len(self._running) < self._jobs:
                        next_one = heapq.heappop(self._ready)
                        self._running[self._threads.submit(next_one.start)] = next_one
                    done, _ = wait(self._running, return_when=FIRST_COMPLETED)
                    for future in done:
                        ended = self._running.pop(future)
                        self._spent -= ended.minus_seconds
                        self._finish(future, ended.item, failures)
                        self._tell(min(self._spent / self._work, 1.0))
            except BaseException:
                self._processes.stop()
                raise
        return failures

    def _add(self, unit: Unit) -> None:
        self._push(_Ready(-unit.seconds, unit, partial(self._to_ptx, unit)))

    def _push(self, ready: _Ready) -> None:
        self._work -= ready.minus_seconds
        heapq.heappush(self._ready, ready)

    def _finish(self, future: Future[Any], item: Unit | Kernel, failures: list[tuple[Kernel, str]]) -> None:
        try:
            result = future.result()
        except (CompileError, PtxError) as error:
            if isinstance(item, Kernel):
                failures.append((item, str(error)))
            elif len(item.kernels) == 1:
                failures.append((item.kernels[0], str(error)))
            else:  # one bad kernel fails its whole unit: halve until it is alone
                for half in item.halves():
                    self._add(half)
            return
        if isinstance(item, Kernel):
            self._keep(item, result)
        else:
            # The order in which a kernel declares its strings decides where its code finds them. Where all kernels of a
            # unit use the same ones the order is that of each alone; else those that use any are compiled alone.
            mixed = len({module.strings for module in result}) > 1
            self._work -= item.ptxas_guess  # what is known now, or guessed anew, is added below
            for kernel, module in zip(item.kernels, result, strict=True):
                if mixed and module.strings:
                    alone = Unit((kernel,))
                    self._add(alone)
                    self._work += alone.ptxas_guess
                else:
                    seconds = units.ptxas_seconds(module.text)
                    self._push(_Ready(-seconds, kernel, partial(self._to_cubin, kernel, module)))

    def _folder(self) -> Path:
        folder = self._scratch / str(next(self._folders))
        folder.mkdir()
        return folder

    def _call(
        self, step: Literal["ptx", "cubin"], command: Sequence[str], folder: Path, kernels: tuple[Kernel, ...]
    ) -> None:
        """Run nvcc and note when, on which job, and what it says of its phases."""
        job, start = self._free.get(), time.monotonic()  # there are as many as threads: one is free
        try:
            self._processes.run([*command, "--time", _PHASES], folder)
        finally:
            self._free.put(job)
        seconds = time.monotonic() - start
        phases = phases_of((folder / _PHASES).read_text())
        self.tasks.append(Task(step, job, start - self._started, seconds, kernels, phases))

    def _to_ptx(self, unit: Unit) -> list[KernelPtx]:
        """Each kernel's module, in the unit's order."""
        folder = self._folder()
        (folder / SOURCE).write_text(unit.source())
        # A relative include path: __FILE__ in the headers' assertions then reads the same wherever DeepGEMM is.
        (folder / "include").symlink_to(self._installation.include)
        command = ptx_command(self._toolchain, SOURCE, "kernel.ptx", unit.flags, "include")
        self._call("ptx", command, folder, unit.kernels)
        modules = ptx.split((folder / "kernel.ptx").read_text())
        shutil.rmtree(folder)
        _check_order(unit, modules)
        return modules

    def _to_cubin(self, kernel: Kernel, module: KernelPtx) -> bytes:
        folder = self._folder()
        (folder / "kernel.ptx").write_text(module.text)
        command = cubin_command(self._toolchain, "kernel.ptx", "kernel.cubin", kernel.flags)
        self._call("cubin", command, folder, (kernel,))
        cubin = (folder / "kernel.cubin").read_bytes()
        shutil.rmtree(folder)
        return cubin


def phases_of(table: str) -> tuple[tuple[str, float], ...]:
    """(phase, seconds) out of what nvcc writes for ``--time``: the phases of one source, in their order.

    A line holds the source, the phase, its files, the architecture, the tool, a number and its unit, between commas;
    no file of ours has a comma in its name.
    """
    rows = [[cell.strip() for cell in line.split(",")] for line in table.splitlines()]
    return tuple((row[1], float(row[6]) / 1000) for row in rows if len(row) == 8 and row[1] and row[7] == "ms")


def _check_order(unit: Unit, modules: Sequence[KernelPtx]) -> None:
    """Nvcc writes kernels in the order of their instantiation; every one's template arguments must say so too.

    Raises:
        CompileError: another number of kernels, or one whose arguments are not its source's.
    """
    if len(modules) != len(unit.kernels):
        raise CompileError(f"wanted {len(unit.kernels)} kernels in the compiled source, found {len(modules)}")
    for kernel, module in zip(unit.kernels, modules, strict=True):
        wanted = units.literals(kernel.source)
        if module.literals[: len(wanted)] != wanted:  # defaulted arguments follow
            raise CompileError(f"wanted a kernel with template arguments {wanted}, found {module.name}")


def check(
    kernels: Sequence[Kernel], cubins: Mapping[str, bytes], toolchain: Toolchain, installation: Installation
) -> None:
    """Compile ``kernels`` as DeepGEMM itself would, in one nvcc call each, and compare what the GPU reads.

    Raises:
        CompileError: a section of code or constants differs; names the kernel and the section.
    """
    with scratch_folder() as scratch:
        for kernel in kernels:
            (scratch / SOURCE).write_text(kernel.source)
            include = f"-I{installation.include}"
            command = [str(toolchain.nvcc), SOURCE, "--cubin", "--output-file", "own.cubin", *kernel.flags, include]
            Processes().run(command, scratch)
            own, ours = code_sections((scratch / "own.cubin").read_bytes()), code_sections(cubins[kernel.entry])
            if different := sorted(name for name in own | ours if own.get(name) != ours.get(name)):
                raise CompileError(
                    f"{kernel.entry}: the code is not what nvcc makes of it alone, in {', '.join(different)}",
                    hint="build with --separate, and report the kernel",
                )


def code_sections(cubin: bytes) -> dict[str, bytes]:
    """What the GPU executes and the constants it reads: the ELF sections ``.text…`` and ``.nv.constant…``."""
    from elftools.elf.elffile import ELFFile

    sections = ELFFile(io.BytesIO(cubin)).iter_sections()
    return {s.name: s.data() for s in sections if s.name.startswith((".text", ".nv.constant"))}


def _keys(kernels: Sequence[Kernel], toolchain: Toolchain, installation: Installation) -> dict[str, str]:
    """Each entry's key in the store: a digest of all that its cubin's bytes depend on."""
    recipe = hashlib.sha256(b"".join(Path(__file__).with_name(name).read_bytes() for name in _RECIPE)).hexdigest()
    common = [recipe, toolchain.version_text, host_compiler_text(), installation.include_digest]
    return {
        kernel.entry: hashlib.sha256(json.dumps([*common, kernel.flags, kernel.source]).encode()).hexdigest()
        for kernel in kernels
    }


def available_cores() -> int:
    """Processors this process may use."""
    return len(os.sched_getaffinity(0))


def _children_cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime
