"""Compile every kernel of a plan, in parallel, through the store, to bytes that depend on nothing but their inputs.

Kernels go to nvcc in units that share a front-end pass (`units`), with DeepGEMM's own flags, to PTX. The PTX is taken
apart into one canonical module a kernel (`ptx`), and each becomes a cubin by itself. The machine code is the one of a
single nvcc call, which ``check`` compares (`code`); the names of internal globals are not.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import resource
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from cachebuilder.common.cache import scratch_folder
from cachebuilder.compiling import check as code
from cachebuilder.compiling import units
from cachebuilder.compiling.front_end import FrontEnds
from cachebuilder.compiling.pool import Pool, Task
from cachebuilder.compiling.store import CubinStore
from cachebuilder.cuda.toolchain import Toolchain, host_compiler_text
from cachebuilder.deepgemm.installation import Installation
from cachebuilder.errors import CompileError
from cachebuilder.planning.make import Kernel

#: The code that makes a cubin of a source: a store serves only what the same code made.
_RECIPE = (
    *("compiling/front_end.py", "compiling/front_end.c", "compiling/pool.py", "compiling/units.py"),
    *("cuda/processes.py", "cuda/ptx.py", "cuda/toolchain.py"),
)


@dataclass
class Report:
    """What compiling took: kernels compiled, how many the store had, seconds of wall clock and of children's CPU.

    Attributes:
        checked: how many kernels' code was compared with what nvcc makes of them alone.
        tasks: the compilers' calls that ended well, in the order in which they ended.
    """

    compiled: list[Kernel] = field(default_factory=list)
    reused: int = 0
    checked: int = 0
    wall_seconds: float = 0.0
    cpu_seconds: float = 0.0
    jobs: int = 0
    tasks: list[Task] = field(default_factory=list)


def compile_all(
    kernels: Sequence[Kernel],
    toolchain: Toolchain,
    installation: Installation,
    store: CubinStore,
    jobs: int | None = None,
    progress: Callable[[int, int, float], None] = lambda done, total, share: None,
    grouped: bool = True,
    check: int = 0,
    front_ends: FrontEnds | None = None,
) -> tuple[dict[str, bytes], Report]:
    """Compile ``kernels``; returns each entry's cubin.

    Args:
        jobs: compilers at once; the processor count this process may use when left out.
        progress: called with (kernels done, kernels in all, share of the work done) after each call of nvcc. Kernels
            come late, after their unit's front end: the share goes by `units`' cost model, what the store had aside.
        grouped: let kernels share a front-end pass; the bytes are the same either way.
        check: of the kernels compiled now, compare this many random ones with what nvcc makes of them alone.
        front_ends: those that were started before; they are ended here.

    Raises:
        CompileError: at least one kernel did not compile; the others are finished and in the store first, and the
            text holds each one's compiler output. Or one whose code is not nvcc's: names the kernel and the section.
        ToolchainError: nvcc has no host compiler.
    """
    started, cpu = time.monotonic(), _children_cpu()
    report = Report(jobs=jobs or available_cores())
    cubins: dict[str, bytes] = {}
    key_of = StoreKeys(toolchain, installation)
    keys = {kernel.entry: key_of(kernel.source, kernel.flags) for kernel in kernels}
    for entry, key in keys.items():
        if (cubin := store.get(key)) is not None:
            cubins[entry] = cubin
    report.reused = len(cubins)
    progress(len(cubins), len(kernels), 0.0)
    missing = [kernel for kernel in kernels if kernel.entry not in cubins]

    def keep(kernel: Kernel, cubin: bytes) -> None:
        store.put(keys[kernel.entry], cubin)
        cubins[kernel.entry] = cubin
        report.compiled.append(kernel)

    with ExitStack() as stack:
        scratch = stack.enter_context(scratch_folder())
        held = front_ends or stack.enter_context(FrontEnds(toolchain, installation, report.jobs))
        pool = Pool(
            toolchain,
            installation,
            scratch,
            report.jobs,
            keep,
            held if grouped else None,
            lambda share: progress(len(cubins), len(kernels), share),
        )
        pool.run(
            units.group(missing, report.jobs) if grouped else units.separate(missing),
            random.sample(missing, min(check, len(missing))),
        )
        held.close()  # what they cost counts
    report.tasks, report.checked = pool.tasks, len(pool.own)
    report.wall_seconds, report.cpu_seconds = time.monotonic() - started, _children_cpu() - cpu
    if pool.failures:
        raise _failed(pool.failures, len(kernels))
    for kernel in missing:
        if own := pool.own.get(kernel.entry):
            code.require_equal(kernel, own, cubins[kernel.entry])
    return cubins, report


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


class StoreKeys:
    """A kernel's key in the store: a digest of all that its cubin's bytes depend on.

    Raises:
        ToolchainError: nvcc has no host compiler.
    """

    def __init__(self, toolchain: Toolchain, installation: Installation) -> None:
        folder = Path(__file__).parents[1]
        recipe = hashlib.sha256(b"".join((folder / name).read_bytes() for name in _RECIPE)).hexdigest()
        self._common = [recipe, toolchain.version_text, host_compiler_text(), installation.include_digest]

    def __call__(self, source: str, flags: tuple[str, ...]) -> str:
        """The key for a source and the flags that it is compiled with."""
        return hashlib.sha256(json.dumps([*self._common, flags, source]).encode()).hexdigest()


def available_cores() -> int:
    """Processors this process may use."""
    return len(os.sched_getaffinity(0))


def _children_cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime
