"""Record a program: it runs with an empty cache and a compiler that compiles and writes down, and what it asked for is
read afterwards.

The compiler is the frozen nvcc with the policy ``compile``: a recording is a serving process in which every kernel is a
miss. What DeepGEMM put into the cache tells each kernel's name and text, in both generations; the log tells what was
asked for and did not come.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from cachebuilder.cuda.toolchain import Toolchain
from cachebuilder.deepgemm import entries
from cachebuilder.deepgemm.generation import Generation
from cachebuilder.errors import RecordingError, ToolchainError
from cachebuilder.restoring import frozen, misses
from cachebuilder.restoring.environment import has_cuda_home

_ROOT, _LOG = "root", "asked.jsonl"
#: Where each engine is told to take NVRTC, whose compilations nobody sees: DeepGEMM 2.6.1 ``csrc/jit/compiler.hpp``;
#: SGLang 0.5.23 ``srt/layers/deep_gemm_wrapper/compile_utils.py`` sets the first from the second.
_NVRTC = ("DG_JIT_USE_NVRTC", "SGLANG_DG_USE_NVRTC")


@dataclass(frozen=True)
class Recorded:
    """One kernel that DeepGEMM asked for and that was compiled.

    Attributes:
        name: DeepGEMM's name for its family.
        source: the text of ``kernel.cu``.
    """

    name: str
    source: str


@dataclass(frozen=True)
class Recording:
    """What a program asked for.

    Attributes:
        generation: of the cache that it filled; None where it filled none.
        kernels: in the order of their entries' names.
        requests: compilations; several processes ask for one kernel several times.
        failed: kernels that were asked for and are not in the cache: nvcc refused them, or they were cut short.
    """

    generation: Generation | None
    kernels: tuple[Recorded, ...]
    requests: int
    failed: tuple[misses.Miss, ...]


def check_environment(environment: Mapping[str, str]) -> None:
    """Raises `RecordingError` where a program would not ask nvcc at all."""
    for name in _NVRTC:
        if environment.get(name, "").lower() not in ("", "0", "false"):
            raise RecordingError(
                f"{name}={environment[name]}: with NVRTC no compiler is called that could write down what is asked",
                hint=f"unset {name}: cachebuilder builds for nvcc",
            )


def check_compiler(toolchain: Toolchain) -> None:
    """Raises `ToolchainError` for a frozen nvcc, which has nothing to compile with."""
    if frozen.is_frozen(toolchain.nvcc):
        raise ToolchainError(
            f"wanted an nvcc that compiles, found the frozen one of a restored cache: {toolchain.nvcc}",
            hint="name the real one with --nvcc",
        )


def variables(folder: Path, toolchain: Toolchain, environment: Mapping[str, str]) -> dict[str, str]:
    """Prepare ``folder`` for a recording; returns the variables that make a program's DeepGEMM ask there.

    The cache is empty and no other root is looked in, so that every kernel is asked for.
    """
    root = folder / _ROOT
    root.mkdir()
    nvcc = frozen.write(folder / frozen.FOLDER, toolchain.version_text, "an empty cache, being recorded", "")
    given = {
        "DG_JIT_CACHE_DIR": str(root),
        "SGLANG_DG_CACHE_DIR": str(root),  # SGLang overwrites the first with it (environment.py says where)
        "DG_JIT_NVCC_COMPILER": str(nvcc),
        frozen.POLICY_VARIABLE: "compile",
        frozen.NVCC_VARIABLE: str(toolchain.nvcc),
        frozen.LOG_VARIABLE: str(folder / _LOG),
    }
    if not has_cuda_home(environment):
        given["CUDA_HOME"] = str(toolchain.nvcc.parents[1])
    return given


def run(command: Sequence[str], environment: Mapping[str, str]) -> tuple[int, bool]:
    """Run ``command`` to its end; returns its exit code (128 + n where signal n ended it), and whether it was told to
    end by Ctrl-C or SIGTERM, as a server is.

    Ctrl-C reaches the command from the terminal, as it reaches this process, which waits on. SIGTERM and SIGHUP, which
    reach this process alone, are handed on.

    Raises:
        RecordingError: it cannot be run.
    """
    child: subprocess.Popen[bytes] | None = None
    told = False

    def interrupted(number: int, frame: FrameType | None) -> None:
        nonlocal told
        told = True
        if number != signal.SIGINT and child is not None:
            child.send_signal(number)

    # What is ignored, as under nohup, stays so, for the command too.
    handled = [n for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) != signal.SIG_IGN]
    before = {number: signal.signal(number, interrupted) for number in handled}
    try:
        child = subprocess.Popen(command, env=dict(environment))
        code = child.wait()
    except OSError as error:
        raise RecordingError(f"{command[0]}: cannot be run: {error.strerror}") from error
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return (code if code >= 0 else 128 - code), told


def read(folder: Path) -> Recording:
    """What the program that ran with `variables` of ``folder`` asked for.

    Raises:
        ArtifactError: the log cannot be read.
    """
    cache = folder / _ROOT / "cache"
    found: dict[str, Recorded] = {}
    generation: Generation | None = None
    for entry in sorted(cache.iterdir()) if cache.is_dir() else ():
        for kind, files in entries.FILES.items():
            if (name := entries.kernel_name(kind, entry.name)) and all((entry / file).is_file() for file in files):
                generation = kind
                found[entry.name] = Recorded(name, (entry / entries.SOURCE).read_text())
    log = misses.read(folder / _LOG) if (folder / _LOG).exists() else misses.Log((), 0)
    there = {kernel.source for kernel in found.values()}
    return Recording(
        generation,
        tuple(found.values()),
        sum(miss.count for miss in log.misses),
        tuple(miss for miss in log.misses if miss.source not in there),
    )


def require_kernels(recording: Recording, command: str) -> None:
    """Raises `RecordingError` where there is nothing to write down, saying why."""
    if recording.kernels:
        return
    if recording.failed:
        names = ", ".join(sorted({miss.kernel for miss in recording.failed}))
        raise RecordingError(
            f"{command} asked for kernels, and none of them is in the cache that it was given: {names}",
            hint="their compilations failed (see its output), or it set DG_JIT_CACHE_DIR itself",
        )
    raise RecordingError(
        f"{command} asked DeepGEMM's compiler for nothing",
        hint="did it come to a DeepGEMM call? A program that sets DG_JIT_NVCC_COMPILER itself, or has its workers on "
        "another machine, is not seen",
    )


def require_target(recording: Recording, name: str, major: int) -> None:
    """Raises `RecordingError` for kernels of another arch than SM ``major``0, which the GPU ``name`` has."""
    for kernel in recording.kernels:
        arch = re.match(r"sm(\d+)0_", kernel.name)
        if arch and int(arch[1]) != major:
            raise RecordingError(
                f"wanted kernels for {name} (SM{major}0), found {kernel.name}",
                hint="give the GPU that the program ran on: --gpu, or the target of the manifest",
            )


def remove(folder: Path) -> None:
    """Take a recording away that was read and written down."""
    shutil.rmtree(folder, ignore_errors=True)


def compiler_of(environment: Mapping[str, str]) -> Path | None:
    """The compiler that the program itself would take, where its environment names one that compiles."""
    named = environment.get("DG_JIT_NVCC_COMPILER")
    return Path(named) if named and not frozen.is_frozen(Path(named)) and os.access(named, os.X_OK) else None
