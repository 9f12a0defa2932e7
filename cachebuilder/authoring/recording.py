"""Runs a program with an empty cache and a compiler that keeps a log, and reads what the program asked for.

The compiler is the frozen nvcc with the policy ``compile``: to it, a recording is a serving process in which every
kernel is a miss. In both generations, what DeepGEMM put into the cache gives each kernel's name and text; the log gives
the kernels that were asked for and did not come.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from cachebuilder.common.reading import read_named
from cachebuilder.cuda import toolchain as toolchains
from cachebuilder.cuda.toolchain import Toolchain
from cachebuilder.deepgemm import entries
from cachebuilder.deepgemm.generation import Generation
from cachebuilder.errors import RecordingError, ToolchainError
from cachebuilder.restoring import frozen, misses
from cachebuilder.restoring.environment import has_cuda_home

_ROOT, _LOG = "root", "asked.jsonl"
#: A manifest's sources are no longer.
_MAX_SOURCE_BYTES = 1 << 16
#: The variables by which DeepGEMM compiles with NVRTC, in its own process: DeepGEMM 2.6.1 ``csrc/jit/compiler.hpp``;
#: SGLang 0.5.23 ``srt/layers/deep_gemm_wrapper/compile_utils.py`` sets the first from the second.
_NVRTC = ("DG_JIT_USE_NVRTC", "SGLANG_DG_USE_NVRTC")


@dataclass(frozen=True)
class RecordedKernel:
    """A kernel that DeepGEMM asked for and that was compiled: the name of its family, and the text of ``kernel.cu``."""

    name: str
    source: str


@dataclass(frozen=True)
class Recording:
    """What a program asked for.

    Attributes:
        program: the name of its file, printable.
        exit_code: the program's own; 128 + n where signal n ended it.
        stopped: Ctrl-C, SIGTERM or SIGHUP ended it, as it ends a server.
        generation: of the cache that it filled; None where it filled none.
        kernels: in the order of their entries' names.
        requests: compilations; several processes may ask for one kernel several times.
        failed: kernels that were asked for and are not in the cache: nvcc refused them, or was interrupted.
    """

    program: str
    exit_code: int
    stopped: bool
    generation: Generation | None
    kernels: tuple[RecordedKernel, ...]
    requests: int
    failed: tuple[misses.Miss, ...]

    def check_kernels(self) -> Generation:
        """The generation of its kernels. Raises `RecordingError` where there are none, and says why."""
        if self.generation:
            return self.generation
        command = f"{self.program} (exit code {self.exit_code})"
        if self.failed:
            names = ", ".join(sorted({miss.kernel for miss in self.failed}))
            raise RecordingError(
                f"{command} asked for kernels, but none of them is in its cache: {names}",
                hint="their compilations failed (see the output), or the program set DG_JIT_CACHE_DIR itself",
            )
        raise RecordingError(
            f"{command} asked DeepGEMM's compiler for nothing",
            hint="did it come to a DeepGEMM call? A program that sets DG_JIT_NVCC_COMPILER itself, or has its workers "
            "on another machine, cannot be recorded",
        )

    def check_target(self, gpu: str, major: int) -> None:
        """Raise `RecordingError` for kernels of another arch than SM ``major``0, which ``gpu`` has."""
        for kernel in self.kernels:
            arch = re.match(r"sm(\d+)0_", kernel.name)
            if arch and int(arch[1]) != major:
                raise RecordingError(
                    f"wanted kernels for {gpu} (SM{major}0), found {kernel.name}",
                    hint="name the GPU that the program ran on: with --gpu, or as the manifest's target",
                )


def check_environment(environment: Mapping[str, str]) -> None:
    """Raise `RecordingError` where a program would not ask nvcc at all."""
    for name in _NVRTC:
        if environment.get(name, "").lower() not in ("", "0", "false"):
            raise RecordingError(
                f"wanted DeepGEMM to call nvcc, found {name}={environment[name]}: NVRTC's compilations cannot be seen",
                hint=f"unset {name}: cachebuilder builds for nvcc",
            )


def find_compiler(nvcc: Path | None, environment: Mapping[str, str]) -> Toolchain:
    """``nvcc``, else the compiler that ``environment`` names for DeepGEMM, else the one that a build takes."""
    named = environment.get("DG_JIT_NVCC_COMPILER")
    if nvcc is None and named and not frozen.is_frozen(Path(named)) and os.access(named, os.X_OK):
        nvcc = Path(named)
    toolchain = toolchains.find(nvcc)
    if frozen.is_frozen(toolchain.nvcc):
        raise ToolchainError(
            f"wanted an nvcc that compiles, found the frozen one of a restored cache: {toolchain.nvcc}",
            hint="name the real one with --nvcc",
        )
    return toolchain


def record(folder: Path, command: Sequence[str], toolchain: Toolchain, environment: Mapping[str, str]) -> Recording:
    """Run ``command`` to its end; its cache and its log are below ``folder``, which is empty."""
    exit_code, stopped = _run(command, {**environment, **_variables(folder, toolchain, environment)})
    generation, kernels = _read_cache(folder / _ROOT / "cache")
    path = folder / _LOG
    log = misses.read(path) if path.exists() else misses.Log(unreadable_lines=0, misses=())
    sources = {kernel.source for kernel in kernels}
    return Recording(
        program=re.sub(r"[^ -~]", "?", os.path.basename(command[0])),
        exit_code=exit_code,
        stopped=stopped,
        generation=generation,
        kernels=kernels,
        requests=log.requests(),
        failed=tuple(miss for miss in log.misses if miss.source not in sources),
    )


def has_entries(folder: Path) -> bool:
    """Whether a program filled the cache below ``folder``."""
    return any((folder / _ROOT / "cache").glob("*"))


def _variables(folder: Path, toolchain: Toolchain, environment: Mapping[str, str]) -> dict[str, str]:
    """The variables by which a program's DeepGEMM looks into the empty cache alone, and asks our compiler."""
    root = folder / _ROOT
    root.mkdir()
    nvcc = frozen.write(folder / frozen.FOLDER, toolchain.version_text, "an empty cache, being recorded", "")
    variables = {
        "DG_JIT_CACHE_DIR": str(root),
        "SGLANG_DG_CACHE_DIR": str(root),  # SGLang overwrites the first with it (environment.py says where)
        "DG_JIT_NVCC_COMPILER": str(nvcc),
        frozen.POLICY_VARIABLE: "compile",
        frozen.NVCC_VARIABLE: str(toolchain.nvcc),
        frozen.LOG_VARIABLE: str(folder / _LOG),
    }
    if not has_cuda_home(environment):
        variables["CUDA_HOME"] = str(toolchain.nvcc.parents[1])
    return variables


def _run(command: Sequence[str], environment: Mapping[str, str]) -> tuple[int, bool]:
    """Run ``command`` to its end; returns its exit code, and whether a signal to this process stopped it.

    The terminal sends Ctrl-C to the command as well as to this process, which waits on. SIGTERM and SIGHUP reach this
    process alone and are passed on.
    """
    child: subprocess.Popen[bytes] | None = None
    stopped = False

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal stopped
        stopped = True
        if number != signal.SIGINT and child is not None:
            child.send_signal(number)

    # A signal that is ignored, as SIGHUP is under nohup, stays ignored, in the command as well.
    signals = [n for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) != signal.SIG_IGN]
    before = {number: signal.signal(number, stop) for number in signals}
    try:
        child = subprocess.Popen(command, env=dict(environment))
        code = child.wait()
    except OSError as error:
        raise RecordingError(f"{command[0]}: cannot be run: {error.strerror}") from error
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return (code if code >= 0 else 128 - code), stopped


def _read_cache(cache: Path) -> tuple[Generation | None, tuple[RecordedKernel, ...]]:
    kernels: dict[str, RecordedKernel] = {}
    generation: Generation | None = None
    for entry in sorted(cache.iterdir()) if cache.is_dir() else ():
        for kind, files in entries.FILES.items():
            if (name := entries.kernel_name(kind, entry.name)) and all((entry / file).is_file() for file in files):
                generation = kind
                if kind == "deepjit" and (
                    refusal := entries.hook_refusal(name, _read_source(entry / entries.METADATA))
                ):
                    raise RecordingError(refusal, hint="the manifest's sources cannot name such a kernel's key")
                kernels[entry.name] = RecordedKernel(name, _read_source(entry / entries.SOURCE))
    return generation, tuple(kernels.values())


def _read_source(path: Path) -> str:
    try:
        return read_named(path, _MAX_SOURCE_BYTES).decode()
    except OSError as error:
        raise RecordingError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        byte = f"byte {error.object[error.start]:#x} at {error.start}"
        raise RecordingError(f"{path}: wanted UTF-8 text, as DeepGEMM writes, found {byte}") from None
