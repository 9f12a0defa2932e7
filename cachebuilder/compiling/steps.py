"""The compiler calls of one build: units to PTX, each kernel's PTX to its cubin, and kernels alone, to compare."""

from __future__ import annotations

import itertools
import shutil
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from queue import SimpleQueue

from cachebuilder.compiling import check, units
from cachebuilder.compiling.front_end import FrontEnd, FrontEnds
from cachebuilder.compiling.record import CompilerCall, Phase, Step
from cachebuilder.compiling.schedule import Schedule
from cachebuilder.compiling.units import Unit
from cachebuilder.cuda import ptx
from cachebuilder.cuda.ptx import KernelPtx
from cachebuilder.deepgemm.entries import SOURCE
from cachebuilder.errors import CompileError
from cachebuilder.planning.plan import Kernel

#: The file in a compilation's folder where nvcc writes how long its phases took.
_PHASES = "phases.csv"


class Steps:
    """The compiler calls of one build.

    Attributes:
        calls: the calls that succeeded, in the order in which they ended.
        failures: the kernels that failed, each with its compiler's output.
        alone: by entry, the cubins of the kernels that were compiled alone, to compare.

    Args:
        front_ends: those of this build.
        scratch: a folder for the compilers' working files.
        on_cubin: called with each kernel and its cubin, in the thread that calls `run`.
        on_share: called with the share of the work that is done, by the cost model of `units`.
        hold: use held front ends; otherwise every unit is compiled from its first line.
    """

    def __init__(
        self,
        front_ends: FrontEnds,
        scratch: Path,
        on_cubin: Callable[[Kernel, bytes], None],
        on_share: Callable[[float], None] = lambda share: None,
        hold: bool = True,
    ) -> None:
        self._inputs = front_ends.inputs
        self._front_ends = front_ends
        self._processes = front_ends.processes
        self._scratch = scratch
        self._on_cubin = on_cubin
        self._hold = hold
        self._schedule = Schedule(front_ends.jobs, on_share, self._processes.stop)
        self._folder_numbers = itertools.count()
        self._started = time.monotonic()
        self._free_jobs: SimpleQueue[int] = SimpleQueue()
        for job in range(front_ends.jobs):
            self._free_jobs.put(job)
        self.calls: list[CompilerCall] = []
        self.failures: list[tuple[Kernel, str]] = []
        self.alone: dict[str, bytes] = {}

    def run(self, work: Sequence[Unit], compare: Collection[Kernel] = ()) -> None:
        """Compile all units, and compile each kernel of ``compare`` a second time, as DeepGEMM would."""
        for kernel in compare:
            seconds = Unit((kernel,)).seconds + units.PTXAS_SECONDS
            self._schedule.add(seconds, partial(self._alone, kernel), partial(self._keep_alone, kernel), lambda _: None)
        for family in _families(work):
            self._add_family(family)
        self._schedule.run()

    def _add_family(self, family: Sequence[Unit]) -> None:
        """Add units with the same headers.

        They wait for a held front end if one has started already, or if several units will share it.
        """
        first = family[0].kernels[0]
        shared = len(family) > 1 or self._front_ends.expected(first.source, first.flags)
        if not (self._hold and shared):
            self._add_units(family, None)
            return
        front_end = self._front_ends.of(first.source, first.flags)

        def add_units(_: object) -> None:
            self._add_units(family, front_end)

        seconds = units.UNIT_SECONDS + family[0].seconds
        self._schedule.add(seconds, partial(self._open, front_end, family), add_units, add_units)

    def _open(self, front_end: FrontEnd, family: Sequence[Unit]) -> None:
        with self._recorded("headers", tuple(kernel for unit in family for kernel in unit.kernels)):
            front_end.open()

    def _add_units(self, added: Iterable[Unit], front_end: FrontEnd | None) -> None:
        for unit in added:
            self._schedule.expect(unit.ptxas_guess)
            self._schedule.add(
                unit.seconds,
                partial(self.to_ptx, unit, front_end),
                partial(self._add_kernels, unit, front_end),
                partial(self._unit_failed, unit, front_end),
            )

    def _unit_failed(self, unit: Unit, front_end: FrontEnd | None, output: str) -> None:
        """Halve a failed unit until the bad kernel is alone: one bad kernel fails its whole unit."""
        self._schedule.expect(-unit.ptxas_guess)
        if len(unit.kernels) == 1:
            self._kernel_failed(unit.kernels[0], output)
        else:
            self._add_units(unit.halves(), front_end)

    def _add_kernels(self, unit: Unit, front_end: FrontEnd | None, modules: Sequence[KernelPtx]) -> None:
        """Add what makes each kernel's cubin from its module.

        The order in which a module declares strings decides their addresses. If all kernels of a unit use the same
        strings, the order is the same as in each kernel compiled alone. Otherwise every kernel that uses strings is
        compiled alone.
        """
        self._schedule.expect(-unit.ptxas_guess)
        strings_differ = len({module.strings for module in modules}) > 1
        for kernel, module in zip(unit.kernels, modules, strict=True):
            if strings_differ and module.strings:
                self._add_units([Unit((kernel,))], front_end)
            else:
                self._schedule.add(
                    units.ptxas_seconds(module.text),
                    partial(self._to_cubin, kernel, module),
                    partial(self._on_cubin, kernel),
                    partial(self._kernel_failed, kernel),
                )

    def _kernel_failed(self, kernel: Kernel, output: str) -> None:
        self.failures.append((kernel, output))

    def _keep_alone(self, kernel: Kernel, cubin: bytes) -> None:
        self.alone[kernel.entry] = cubin

    @contextmanager
    def _folder(self) -> Iterator[Path]:
        """A folder for one compiler call."""
        folder = self._scratch / str(next(self._folder_numbers))
        folder.mkdir()
        yield folder
        shutil.rmtree(folder)

    @contextmanager
    def _recorded(self, step: Step, kernels: tuple[Kernel, ...], phases: Path | None = None) -> Iterator[None]:
        """Record when a compiler ran, in which of the parallel jobs, and how long nvcc's phases took.

        Args:
            phases: the file in which nvcc writes its phases; None if it writes none.
        """
        job, start = self._free_jobs.get(), time.monotonic()  # never waits: there is a job for each thread
        try:
            yield
        finally:
            self._free_jobs.put(job)
        seconds = time.monotonic() - start
        self.calls.append(
            CompilerCall(
                step=step,
                job=job,
                start=round(start - self._started, 3),
                seconds=round(seconds, 3),
                entries=tuple(kernel.entry for kernel in kernels),
                phases=phases_of(phases.read_text()) if phases else (),
            )
        )

    def to_ptx(self, unit: Unit, front_end: FrontEnd | None = None) -> list[KernelPtx]:
        """Compile a unit; returns each kernel's module, in the unit's order.

        Raises:
            CompileError: nvcc refuses a source, makes other kernels than the sources name, or writes PTX of an unknown
                form.
        """
        with self._folder() as folder:
            if front_end and front_end.takes(unit.body):
                with self._recorded("ptx", unit.kernels):
                    front_end.compile(unit.body, folder)
            else:
                (folder / SOURCE).write_text(unit.source)
                # The include path is relative: __FILE__ in the headers' assertions then holds no path of this machine.
                (folder / "include").symlink_to(self._inputs.installation.include)
                command = self._inputs.toolchain.ptx_command(SOURCE, "kernel.ptx", unit.flags, "include")
                with self._recorded("ptx", unit.kernels, folder / _PHASES):
                    self._processes.run([*command, "--time", _PHASES], folder)
            modules = ptx.split((folder / "kernel.ptx").read_text())
        check_order(unit, modules)
        return modules

    def _to_cubin(self, kernel: Kernel, module: KernelPtx) -> bytes:
        with self._folder() as folder:
            (folder / "kernel.ptx").write_text(module.text)
            command = self._inputs.toolchain.cubin_command("kernel.ptx", "kernel.cubin", kernel.flags)
            with self._recorded("cubin", (kernel,), folder / _PHASES):
                self._processes.run([*command, "--time", _PHASES], folder)
            return (folder / "kernel.cubin").read_bytes()

    def _alone(self, kernel: Kernel) -> bytes:
        with self._folder() as folder, self._recorded("check", (kernel,)):
            return check.compile_alone(kernel, self._inputs, self._processes, folder)


def _families(work: Iterable[Unit]) -> list[list[Unit]]:
    """Units with the same headers and flags, in their order."""
    families: dict[tuple[str, tuple[str, ...]], list[Unit]] = {}
    for unit in work:
        families.setdefault((unit.head, unit.flags), []).append(unit)
    return list(families.values())


def phases_of(table: str) -> tuple[Phase, ...]:
    """Read the phases, in their order, from the table that nvcc's ``--time`` writes for one source.

    A line has eight cells with commas between them: the source, the phase, two files, the architecture, the tool, a
    number and its unit. None of our file names contains a comma.
    """
    rows = [[cell.strip() for cell in line.split(",")] for line in table.splitlines()]
    return tuple(
        Phase(name=row[1], seconds=round(float(row[6]) / 1000, 3))
        for row in rows
        if len(row) == 8 and row[1] and row[7] == "ms"
    )


def check_order(unit: Unit, modules: Sequence[KernelPtx]) -> None:
    """Check that the modules are the unit's kernels, in the same order.

    nvcc writes kernels in the order of their instantiation. Each kernel's template arguments must be those of its
    source.

    Raises:
        CompileError: the number of kernels differs, or a kernel has other template arguments than its source.
    """
    if len(modules) != len(unit.kernels):
        raise CompileError(f"wanted {len(unit.kernels)} kernels in the compiled source, found {len(modules)}")
    for kernel, module in zip(unit.kernels, modules, strict=True):
        arguments = units.literals(kernel.source)
        if module.literals[: len(arguments)] != arguments:  # arguments with a default follow
            raise CompileError(f"wanted a kernel with template arguments {arguments}, found {module.name}")
