"""The compilations of one build, on so many compilers at once, each busy to the end."""

from __future__ import annotations

import heapq
import itertools
import shutil
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Literal

from cachebuilder.compiling import check as code
from cachebuilder.compiling import units
from cachebuilder.compiling.front_end import FrontEnd, FrontEnds
from cachebuilder.compiling.units import Unit
from cachebuilder.cuda import ptx
from cachebuilder.cuda.processes import Processes
from cachebuilder.cuda.ptx import KernelPtx, PtxError
from cachebuilder.cuda.toolchain import Toolchain, cubin_command, ptx_command
from cachebuilder.deepgemm.entries import SOURCE
from cachebuilder.deepgemm.installation import Installation
from cachebuilder.errors import CompileError
from cachebuilder.planning.make import Kernel

#: nvcc's own times, in a compilation's folder.
_PHASES = "phases.csv"

Step = Literal["headers", "ptx", "cubin", "check"]


@dataclass(frozen=True)
class Task:
    """One call of a compiler.

    Attributes:
        step: ``headers`` for a held front end until it has read them, ``ptx`` for sources to PTX, ``cubin`` for one
            kernel's PTX to its cubin, ``check`` for one kernel as DeepGEMM's own nvcc call makes it.
        job: which of the parallel compilers, from 0.
        start, seconds: since compiling began, and how long.
        phases: nvcc's own, (name, seconds), where it told them.
    """

    step: Step
    job: int
    start: float
    seconds: float
    kernels: tuple[Kernel, ...]
    phases: tuple[tuple[str, float], ...] = ()


@dataclass(order=True, frozen=True)
class _Ready:
    """What could start; the smallest is the one that takes longest.

    Attributes:
        finish: takes the result in the pool's own thread, and may make more ready.
        fail: takes the compiler's output instead, where it refused.
    """

    minus_seconds: float
    start: Callable[[], Any] = field(compare=False)
    finish: Callable[[Any], None] = field(compare=False)
    fail: Callable[[str], None] = field(compare=False)


class Pool:
    """``jobs`` compilers at once, each on a thread that waits for it.

    Of all that could start, what takes longest does: a large kernel's ptxas that starts last is waited for alone.

    Args:
        keep: called with each kernel and its cubin, from the thread that calls `run`.
        front_ends: those of this build; without, every unit is compiled from its first line.
        tell: called with the share of the work that is done, by `units`' cost model, after each call that ended.
    """

    def __init__(
        self,
        toolchain: Toolchain,
        installation: Installation,
        scratch: Path,
        jobs: int,
        keep: Callable[[Kernel, bytes], None],
        front_ends: FrontEnds | None = None,
        tell: Callable[[float], None] = lambda share: None,
    ) -> None:
        self._toolchain = toolchain
        self._installation = installation
        self._scratch = scratch
        self._keep = keep
        self._tell = tell
        self._spent = self._work = self._share = 0.0
        self._front_ends = front_ends
        self._processes = front_ends.processes if front_ends else Processes()
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
        self.failures: list[tuple[Kernel, str]] = []
        self.own: dict[str, bytes] = {}

    def run(self, work: Sequence[Unit], check: Collection[Kernel] = ()) -> None:
        """Compile all units, and each of ``check`` as DeepGEMM would besides.

        ``failures`` are then the kernels that failed, each with its compiler's output; ``own`` the cubins of ``check``
        by entry; ``tasks`` the calls that ended well, in the order in which they ended.
        """
        with self._threads:
            try:
                for kernel in check:
                    seconds = units.Unit((kernel,)).seconds + units.PTXAS_SECONDS
                    self._add(seconds, partial(self._alone, kernel), partial(self._checked, kernel), lambda _: None)
                for family in _families(work):
                    self._add_family(family)
                while self._ready or self._running:
                    while self._ready and len(self._running) < self._jobs:
                        next_one = heapq.heappop(self._ready)
                        self._running[self._threads.submit(next_one.start)] = next_one
                    done, _ = wait(self._running, return_when=FIRST_COMPLETED)
                    for future in done:
                        ended = self._running.pop(future)
                        self._spent -= ended.minus_seconds
                        try:
                            result = future.result()
                        except (CompileError, PtxError) as error:
                            ended.fail(str(error))
                        else:
                            ended.finish(result)
                        # Rounded: sums of the same parts in another order differ in their last bit, and all is 1.
                        self._share = max(self._share, min(round(self._spent / self._work, 9), 1.0))
                        self._tell(self._share)
            except BaseException:
                self._processes.stop()
                raise

    def _add(
        self, seconds: float, start: Callable[[], Any], finish: Callable[[Any], None], fail: Callable[[str], None]
    ) -> None:
        self._work += seconds
        heapq.heappush(self._ready, _Ready(-seconds, start, finish, fail))

    def _add_family(self, family: Sequence[Unit]) -> None:
        """Units that begin alike: behind their front end, where one is there or there are many of them."""
        first = family[0].kernels[0]
        held = self._front_ends
        if held and (len(family) > 1 or held.expected(first.source, first.flags)):
            front_end = held.of(first.source, first.flags)
            seconds = units.UNIT_SECONDS + family[0].seconds
            finish = partial(self._add_units, family, front_end)
            self._add(seconds, partial(self._open, front_end, family), lambda _: finish(), lambda _: finish())
        else:
            self._add_units(family, None)

    def _open(self, front_end: FrontEnd, family: Sequence[Unit]) -> None:
        with self._noted("headers", tuple(kernel for unit in family for kernel in unit.kernels)):
            front_end.open()

    def _add_units(self, added: Iterable[Unit], front_end: FrontEnd | None) -> None:
        for unit in added:
            self._work += unit.ptxas_guess  # until its PTX is there
            self._add(
                unit.seconds,
                partial(self.to_ptx, unit, front_end),
                partial(self._has_ptx, unit, front_end),
                partial(self._unit_failed, unit, front_end),
            )

    def _unit_failed(self, unit: Unit, front_end: FrontEnd | None, output: str) -> None:
        """One bad kernel fails its whole unit: halve until it is alone."""
        self._work -= unit.ptxas_guess
        if len(unit.kernels) == 1:
            self.failures.append((unit.kernels[0], output))
        else:
            self._add_units(unit.halves(), front_end)

    def _has_ptx(self, unit: Unit, front_end: FrontEnd | None, modules: Sequence[KernelPtx]) -> None:
        """Make each kernel's cubin of its module.

        The order in which a kernel declares its strings decides where its code finds them. Where all kernels of a unit
        use the same ones the order is that of each alone; else those that use any are compiled alone.
        """
        self._work -= unit.ptxas_guess
        mixed = len({module.strings for module in modules}) > 1
        for kernel, module in zip(unit.kernels, modules, strict=True):
            if mixed and module.strings:
                self._add_units([Unit((kernel,))], front_end)
            else:
                self._add(
                    units.ptxas_seconds(module.text),
                    partial(self._to_cubin, kernel, module),
                    partial(self._keep, kernel),
                    partial(self._kernel_failed, kernel),
                )

    def _kernel_failed(self, kernel: Kernel, output: str) -> None:
        self.failures.append((kernel, output))

    def _checked(self, kernel: Kernel, own: bytes) -> None:
        self.own[kernel.entry] = own

    @contextmanager
    def _folder(self) -> Iterator[Path]:
        folder = self._scratch / str(next(self._folders))
        folder.mkdir()
        yield folder
        shutil.rmtree(folder)

    @contextmanager
    def _noted(self, step: Step, kernels: tuple[Kernel, ...], phases: Path | None = None) -> Iterator[None]:
        """Note when a compiler ran, on which job, and what nvcc says of its phases."""
        job, start = self._free.get(), time.monotonic()  # there are as many as threads: one is free
        try:
            yield
        finally:
            self._free.put(job)
        seconds = time.monotonic() - start
        told = phases_of(phases.read_text()) if phases else ()
        self.tasks.append(Task(step, job, start - self._started, seconds, kernels, told))

    def to_ptx(self, unit: Unit, front_end: FrontEnd | None = None) -> list[KernelPtx]:
        """Each kernel's module, in the unit's order.

        Raises:
            CompileError: nvcc refuses, or makes other kernels than the sources name.
            PtxError: PTX of an unknown form.
        """
        with self._folder() as folder:
            if front_end and front_end.takes(unit.body):
                with self._noted("ptx", unit.kernels):
                    front_end.compile(unit.body, folder)
            else:
                (folder / SOURCE).write_text(unit.source)
                # A relative include path: __FILE__ in the headers' assertions then reads the same wherever DeepGEMM is.
                (folder / "include").symlink_to(self._installation.include)
                command = ptx_command(self._toolchain, SOURCE, "kernel.ptx", unit.flags, "include")
                with self._noted("ptx", unit.kernels, folder / _PHASES):
                    self._processes.run([*command, "--time", _PHASES], folder)
            modules = ptx.split((folder / "kernel.ptx").read_text())
        check_order(unit, modules)
        return modules

    def _to_cubin(self, kernel: Kernel, module: KernelPtx) -> bytes:
        with self._folder() as folder:
            (folder / "kernel.ptx").write_text(module.text)
            command = cubin_command(self._toolchain, "kernel.ptx", "kernel.cubin", kernel.flags)
            with self._noted("cubin", (kernel,), folder / _PHASES):
                self._processes.run([*command, "--time", _PHASES], folder)
            return (folder / "kernel.cubin").read_bytes()

    def _alone(self, kernel: Kernel) -> bytes:
        with self._folder() as folder, self._noted("check", (kernel,)):
            return code.compile_alone(kernel, self._toolchain, self._installation, self._processes, folder)


def _families(work: Iterable[Unit]) -> list[list[Unit]]:
    """Units with the same includes and flags, in their order."""
    found: dict[tuple[str, tuple[str, ...]], list[Unit]] = {}
    for unit in work:
        found.setdefault((unit.head, unit.flags), []).append(unit)
    return list(found.values())


def phases_of(table: str) -> tuple[tuple[str, float], ...]:
    """(phase, seconds) out of what nvcc writes for ``--time``: the phases of one source, in their order.

    A line holds the source, the phase, its files, the architecture, the tool, a number and its unit, between commas;
    no file of ours has a comma in its name.
    """
    rows = [[cell.strip() for cell in line.split(",")] for line in table.splitlines()]
    return tuple((row[1], float(row[6]) / 1000) for row in rows if len(row) == 8 and row[1] and row[7] == "ms")


def check_order(unit: Unit, modules: Sequence[KernelPtx]) -> None:
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
