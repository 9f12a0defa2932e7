"""Compile every kernel of a plan, in parallel, through the store, to bytes that depend on nothing but their inputs.

Kernels go to nvcc in units that share a front-end pass (`units`), with DeepGEMM's own flags, to PTX. The PTX is taken
apart into one canonical module a kernel (`cuda.ptx`), and each becomes a cubin by itself. The machine code is that of a
single nvcc call, which `check` compares; the names of internal globals differ.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import resource
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import TracebackType

from cachebuilder.common.cache import scratch_folder
from cachebuilder.common.code import code_digest
from cachebuilder.common.progress import Progress, no_progress
from cachebuilder.compiling import check, units
from cachebuilder.compiling.front_end import FrontEnds
from cachebuilder.compiling.record import CompilerCall
from cachebuilder.compiling.steps import Steps
from cachebuilder.compiling.store import CubinStore, NoStore
from cachebuilder.cuda.toolchain import host_compiler_text
from cachebuilder.errors import CompileError
from cachebuilder.manifest.inputs import Inputs
from cachebuilder.planning.plan import Kernel

#: The folders whose code makes a cubin of a source: the store serves only what the same code made.
CODE = ("common", "compiling", "cuda")


@dataclass(frozen=True)
class CompileOptions:
    """How to compile. The bytes of an artifact are the same whatever is chosen.

    Attributes:
        jobs: compilers at once; none for every core that this process may use.
        use_store: keep compiled kernels in the user's cache folder, and take them from there.
        grouped: let kernels share the compiler's front end.
        check_code: of the kernels compiled now, compare this many random ones with what nvcc makes of them alone.
    """

    jobs: int | None = None
    use_store: bool = True
    grouped: bool = True
    check_code: int = 1

    @property
    def store(self) -> CubinStore:
        """Where compiled kernels are kept."""
        return CubinStore() if self.use_store else NoStore()


@dataclass
class Compiled:
    """What compiling gave and what it took.

    Attributes:
        cubins: each entry's cubin.
        compiled: the kernels that were compiled now.
        reused: how many the store had.
        checked: how many kernels' code was compared with what nvcc makes of them alone.
        wall_seconds, cpu_seconds: of the wall clock, and of all compilers' CPU.
        calls: the compilers' calls that ended well, in the order in which they ended.
    """

    jobs: int
    cubins: dict[str, bytes] = field(default_factory=dict)
    compiled: list[Kernel] = field(default_factory=list)
    reused: int = 0
    checked: int = 0
    wall_seconds: float = 0.0
    cpu_seconds: float = 0.0
    calls: list[CompilerCall] = field(default_factory=list)


class Compiler:
    """The compilers of one build; leaving the context ends those that still run.

    Raises:
        ToolchainError: nvcc has no host compiler.
    """

    def __init__(
        self, inputs: Inputs, options: CompileOptions = CompileOptions(), store: CubinStore | None = None
    ) -> None:
        self._options = options
        self._store = store or options.store
        self._jobs = options.jobs or available_cores()
        self._front_ends = FrontEnds(inputs, self._jobs)
        # All that a cubin's bytes depend on, but for its source and its flags.
        self._key_parts = [
            code_digest(CODE),
            inputs.toolchain.version_text,
            host_compiler_text(),
            inputs.installation.include_digest,
        ]

    def __enter__(self) -> Compiler:
        self._front_ends.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._front_ends.__exit__(kind, error, traceback)

    def expect(self, source: str, flags: tuple[str, ...]) -> None:
        """Prepare for a kernel that will be compiled: start its front end, unless the store has the kernel."""
        if self._options.grouped and self._store.get(self._key(source, flags)) is None:
            self._front_ends.expect(source, flags)

    def compile(self, kernels: Sequence[Kernel], progress: Progress = no_progress) -> Compiled:
        """Compile ``kernels``. Ends the front ends: a `Compiler` compiles once.

        Args:
            progress: the step is "compile", the units are kernels. Kernels come late, after their unit's front end, so
                the share goes by the cost model of `units`.

        Raises:
            CompileError: at least one kernel did not compile; the others are finished and in the store first, and the
                text holds each one's compiler output. Or one kernel's code is not what nvcc makes of it alone: the
                text names the kernel and the section.
        """
        started, cpu = time.monotonic(), _children_cpu()
        result = Compiled(self._jobs)
        keys = {kernel.entry: self._key(kernel.source, kernel.flags) for kernel in kernels}
        for entry, key in keys.items():
            if (cubin := self._store.get(key)) is not None:
                result.cubins[entry] = cubin
        result.reused = len(result.cubins)
        missing = [kernel for kernel in kernels if kernel.entry not in result.cubins]

        def report(share: float) -> None:
            progress("compile", len(result.cubins), len(kernels), share)

        def keep(kernel: Kernel, cubin: bytes) -> None:
            self._store.put(keys[kernel.entry], cubin)
            result.cubins[kernel.entry] = cubin
            result.compiled.append(kernel)

        report(0.0)
        grouped = self._options.grouped
        with scratch_folder() as scratch:
            steps = Steps(self._front_ends, scratch, keep, report, hold=grouped)
            compare = random.sample(missing, min(self._options.check_code, len(missing)))
            steps.run(units.group(missing, self._jobs) if grouped else units.separate(missing), compare)
            self._front_ends.close()  # their CPU counts
        result.calls, result.checked = steps.calls, len(steps.alone)
        result.wall_seconds, result.cpu_seconds = time.monotonic() - started, _children_cpu() - cpu
        if steps.failures:
            raise _failed(steps.failures, len(kernels))
        for kernel in compare:
            if cubin := steps.alone.get(kernel.entry):
                check.require_equal(kernel, cubin, result.cubins[kernel.entry])
        return result

    def _key(self, source: str, flags: tuple[str, ...]) -> str:
        """A kernel's key in the store."""
        return hashlib.sha256(json.dumps([*self._key_parts, flags, source]).encode()).hexdigest()


def compile_kernels(
    inputs: Inputs,
    kernels: Sequence[Kernel],
    options: CompileOptions = CompileOptions(),
    store: CubinStore | None = None,
    progress: Progress = no_progress,
) -> Compiled:
    """Compile ``kernels`` with a `Compiler` of their own. Raises what `Compiler.compile` raises."""
    with Compiler(inputs, options, store) as compiler:
        return compiler.compile(kernels, progress)


def _failed(failures: Sequence[tuple[Kernel, str]], count: int) -> CompileError:
    """What nvcc said, once for all kernels of which it said the same."""
    entries: dict[str, list[str]] = {}
    for kernel, output in failures:
        entries.setdefault(output, []).append(kernel.entry)
    parts = [f"{', '.join(names)}:\n{output}" for output, names in entries.items()]
    missing = re.search(r"fatal error: (\S+): No such file", "\n".join(entries))
    return CompileError(
        f"{len(failures)} of {count} kernels did not compile, the others are in the store\n" + "\n".join(parts),
        hint=f"nvcc finds no {missing[1]}: install that part of its CUDA toolkit, or name a whole one with --nvcc"
        if missing
        else None,
    )


def available_cores() -> int:
    """How many processors this process may use."""
    return len(os.sched_getaffinity(0))


def _children_cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime
