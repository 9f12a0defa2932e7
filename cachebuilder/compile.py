"""Compile every kernel of a plan, in parallel, through the store, to bytes that depend on nothing but their inputs.

A kernel goes through nvcc twice: to PTX with DeepGEMM's own flags, then from PTX to the cubin. In between, names that
hold a hash of the working folder become canonical (`toolchain.canonical_ptx`). The cubin is the one that a single
nvcc call makes, but for those names: measured equal byte for byte where the folder was the same.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import resource
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path

from cachebuilder.deepgemm.entries import SOURCE
from cachebuilder.deepgemm.installation import Installation
from cachebuilder.errors import CompileError
from cachebuilder.paths import scratch_folder
from cachebuilder.plan import Kernel
from cachebuilder.store import CubinStore
from cachebuilder.toolchain import Toolchain, canonical_ptx, cubin_command, host_compiler_text, ptx_command

#: Raised whenever the way from source to cubin changes, so that no store serves the old way's bytes.
_RECIPE = 1

#: Variables with which nvcc and its host compiler would take other flags or headers than DeepGEMM's.
_FOREIGN_FLAGS = ("NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS", "CPATH", "C_INCLUDE_PATH", "CPLUS_INCLUDE_PATH")


@dataclass
class Report:
    """What compiling took: kernels compiled and taken from the store, seconds of wall clock and of children's CPU."""

    compiled: int = 0
    reused: int = 0
    wall_seconds: float = 0.0
    cpu_seconds: float = 0.0
    failures: list[tuple[Kernel, str]] = field(default_factory=list)


class _Processes:
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
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[dict[str, bytes], Report]:
    """Compile ``kernels``; returns each entry's cubin.

    Args:
        jobs: compilers at once; the processor count this process may use when left out.
        progress: called with (kernels done, kernels in all) after each.

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
    progress(len(cubins), len(kernels))
    missing = [kernel for kernel in kernels if kernel.entry not in cubins]
    if missing:
        _compile_missing(missing, toolchain, installation, store, jobs, keys, cubins, report, progress)
    report.wall_seconds, report.cpu_seconds = time.monotonic() - started, _children_cpu() - cpu
    if report.failures:
        parts = [f"{kernel.entry}:\n{output}" for kernel, output in report.failures]
        raise CompileError(
            f"{len(parts)} of {len(kernels)} kernels did not compile, the others are in the store\n" + "\n".join(parts)
        )
    return cubins, report


def _compile_missing(
    missing: list[Kernel],
    toolchain: Toolchain,
    installation: Installation,
    store: CubinStore,
    jobs: int | None,
    keys: dict[str, str],
    cubins: dict[str, bytes],
    report: Report,
    progress: Callable[[int, int], None],
) -> None:
    processes = _Processes()
    total = len(cubins) + len(missing)
    with scratch_folder() as scratch, ThreadPoolExecutor(jobs or available_cores()) as pool:
        waiting: dict[Future[bytes], Kernel] = {
            pool.submit(_compile_one, kernel, toolchain, installation, scratch / kernel.entry, processes): kernel
            for kernel in missing
        }
        try:
            while waiting:
                done, _ = wait(waiting, return_when=FIRST_COMPLETED)
                for future in done:
                    kernel = waiting.pop(future)
                    try:
                        cubins[kernel.entry] = future.result()
                    except CompileError as error:
                        report.failures.append((kernel, str(error)))
                        continue
                    store.put(keys[kernel.entry], cubins[kernel.entry])
                    report.compiled += 1
                    progress(len(cubins), total)
        except BaseException:
            for future in waiting:
                future.cancel()
            processes.stop()
            raise


def _compile_one(
    kernel: Kernel, toolchain: Toolchain, installation: Installation, folder: Path, processes: _Processes
) -> bytes:
    folder.mkdir()
    (folder / SOURCE).write_text(kernel.source)
    # A relative include path: __FILE__ in the headers' assertions then reads the same wherever DeepGEMM is installed.
    (folder / "include").symlink_to(installation.include)
    ptx, cubin = folder / "kernel.ptx", folder / "kernel.cubin"
    processes.run(ptx_command(toolchain, SOURCE, ptx.name, kernel.flags, "include"), folder)
    text = ptx.read_bytes()
    if (count := text.count(b"\n.entry ") + text.count(b"\n.visible .entry ")) != 1:
        raise CompileError(f"wanted one kernel in the compiled source, found {count}")
    ptx.write_bytes(canonical_ptx(text))
    processes.run(cubin_command(toolchain, ptx.name, cubin.name, kernel.flags), folder)
    return cubin.read_bytes()


def _keys(kernels: Sequence[Kernel], toolchain: Toolchain, installation: Installation) -> dict[str, str]:
    """Each entry's key in the store: a digest of all that its cubin's bytes depend on."""
    common = [_RECIPE, toolchain.version_text, host_compiler_text(), installation.include_digest]
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
