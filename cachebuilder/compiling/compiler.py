"""Compile every kernel of a plan in parallel. Equal inputs give equal bytes, and the store keeps every cubin.

nvcc compiles kernels to PTX with DeepGEMM's own flags, in units that share one pass of the front end (`units`).
`cuda.ptx` splits that PTX into one canonical module for each kernel, and each module becomes a cubin by itself. Its
machine code equals that of a single nvcc call, which `check` compares; only the names of internal globals differ.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
import resource
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import TracebackType

from cachebuilder.common.cache import scratch_folder
from cachebuilder.common.code import code_digest
from cachebuilder.common.cores import available_cores
from cachebuilder.common.progress import Progress, no_progress
from cachebuilder.common.results import Results
from cachebuilder.compiling import check, heads, units
from cachebuilder.compiling.front_end import FrontEnds
from cachebuilder.compiling.record import CompilerCall
from cachebuilder.compiling.steps import Steps
from cachebuilder.compiling.store import CubinStore, NoStore, SharedCubins
from cachebuilder.cuda.toolchain import host_compiler_text
from cachebuilder.errors import CompileError
from cachebuilder.manifest.inputs import Inputs
from cachebuilder.planning.plan import Kernel

#: What DeepGEMM asks for, unless DG_JIT_CPP_STANDARD says otherwise.
_STANDARD = "-std=c++20"

#: The folders whose code turns a source into a cubin: the store serves only cubins that the same code made.
CODE = ("common", "compiling", "cuda")


@dataclass(frozen=True)
class CompileOptions:
    """How to compile. No option changes the artifact's bytes.

    Attributes:
        jobs: how many compilers run at once; None for one on each core that this process may use.
        use_store: keep compiled kernels in the user's cache folder, and take them from there.
        grouped: let kernels share the compiler's front end.
        check_code: how many of the newly compiled kernels, chosen at random, to compare with what nvcc makes of each
            alone.
        shared: where other builders keep what they compiled; None for no such place.
    """

    jobs: int | None = None
    use_store: bool = True
    grouped: bool = True
    check_code: int = 1
    shared: Results | None = None

    @property
    def store(self) -> CubinStore:
        """Where compiled kernels are kept."""
        own = CubinStore() if self.use_store else NoStore()
        return own if self.shared is None else SharedCubins(own, self.shared)


@dataclass
class Compiled:
    """The cubins, and what it took to compile them.

    Attributes:
        jobs: how many compilers ran at once.
        cubins: each entry's cubin.
        compiled: the kernels that were compiled now.
        reused: how many kernels came from the store.
        checked: how many kernels' code was compared with what nvcc makes of each alone.
        wall_seconds, cpu_seconds: elapsed time, and the CPU time of all compilers together.
        calls: the compiler calls that succeeded, in the order in which they ended.
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
    """The compilers of one build; leaving the context ends every compiler that still runs.

    Raises:
        ToolchainError: nvcc has no host compiler.
    """

    def __init__(
        self, inputs: Inputs, options: CompileOptions = CompileOptions(), store: CubinStore | None = None
    ) -> None:
        self._options = options
        self._store = store or options.store
        self._jobs = options.jobs or available_cores()
        self._inputs = inputs
        self._key_parts = key_parts(inputs)

    def __enter__(self) -> Compiler:
        self._front_ends = FrontEnds(self._inputs, self._jobs)
        self._front_ends.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._front_ends.__exit__(kind, error, traceback)

    def expect(self, source: str, flags: tuple[str, ...]) -> None:
        """Prepare for a kernel that will be compiled: start its front end unless the store has the kernel."""
        if self._options.grouped and self._store.get(kernel_key(self._key_parts, source, flags)) is None:
            self._front_ends.expect(source, flags)

    def prepare(self) -> None:
        """Prepare for a plan that is being made: start the front ends that an earlier build of these ops needed."""
        if self._options.grouped:
            for head in heads.read(self._inputs)[: max(1, self._jobs // 2)]:  # torch is imported at the same time
                self._front_ends.expect(head.text, head.flags)

    def compile(self, kernels: Sequence[Kernel], progress: Progress = no_progress) -> Compiled:
        """Compile ``kernels``. Ends the front ends: a `Compiler` compiles once.

        Args:
            progress: the step is "compile", the units are kernels. A kernel is finished only after its unit's front
                end, so the share follows the cost model of `units`.

        Raises:
            CompileError: at least one kernel did not compile: the text holds the compiler's output for each, and all
                others are compiled and stored first. Or a kernel's code differs from what nvcc makes of it alone: the
                text names the kernel and the sections.
        """
        started, cpu_before = time.monotonic(), _children_cpu()
        result = Compiled(self._jobs)
        keys = {kernel.entry: kernel_key(self._key_parts, kernel.source, kernel.flags) for kernel in kernels}
        stored = self._store.get_all(list(keys.values()))
        result.cubins = {entry: stored[key] for entry, key in keys.items() if key in stored}
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
        if grouped and missing:
            heads.keep(self._inputs, kernels)
        elif not missing:
            self._front_ends.processes.stop()  # what was prepared for is in the store
        with scratch_folder() as scratch:
            steps = Steps(self._front_ends, scratch, keep, report, hold=grouped)
            compare = random.sample(missing, min(self._options.check_code, len(missing)))
            steps.run(units.group(missing, self._jobs) if grouped else units.separate(missing), compare)
            self._front_ends.close()  # a process's CPU time counts only once it has ended
        result.calls, result.checked = steps.calls, len(steps.alone)
        result.wall_seconds, result.cpu_seconds = time.monotonic() - started, _children_cpu() - cpu_before
        if steps.failures:
            raise _compile_error(steps.failures, len(kernels))
        for kernel in compare:
            if cubin := steps.alone.get(kernel.entry):
                check.require_equal(kernel, cubin, result.cubins[kernel.entry])
        return result


def key_parts(inputs: Inputs) -> tuple[str, ...]:
    """Everything that a cubin's bytes depend on, except its source and its flags.

    Raises:
        ToolchainError: nvcc has no host compiler.
    """
    compilers = inputs.toolchain.version_text, host_compiler_text()
    return code_digest(CODE), *compilers, inputs.installation.include_digest


def kernel_key(parts: tuple[str, ...], source: str, flags: tuple[str, ...]) -> str:
    """A kernel's key in the store; ``parts`` are `key_parts`."""
    return hashlib.sha256(json.dumps([*parts, flags, source]).encode()).hexdigest()


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


def _compile_error(failures: Sequence[tuple[Kernel, str]], count: int) -> CompileError:
    """One error for all failures, which holds each output of nvcc once, after the entries that it is about."""
    entries_of: dict[str, list[str]] = {}
    for kernel, output in failures:
        entries_of.setdefault(output, []).append(kernel.entry)
    lines = [f"{len(failures)} of {count} kernels did not compile; all others are in the store"]
    lines += [f"{', '.join(entries)}:\n{output}" for output, entries in entries_of.items()]
    hint = None
    missing_header = re.search(r"fatal error: (\S+): No such file", "\n".join(entries_of))
    if missing_header:
        header = missing_header[1]
        hint = f"nvcc cannot find {header}: install that part of its CUDA toolkit, or name a complete one with --nvcc"
    elif other := {flag for kernel, _ in failures for flag in kernel.flags if flag.startswith("-std=")} - {_STANDARD}:
        hint = f"DeepGEMM's headers are written for {_STANDARD}, found {min(other)}: remove DG_JIT_CPP_STANDARD"
    return CompileError("\n".join(lines), hint=hint)


def _children_cpu() -> float:
    """The CPU seconds of all child processes that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime
