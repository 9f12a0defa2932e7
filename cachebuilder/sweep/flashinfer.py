"""FlashInfer's own code at work without a GPU: it describes and builds its modules, and its GEMM asks for kernels."""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from cachebuilder.common.cache import scratch_folder
from cachebuilder.common.digest import digest_tree
from cachebuilder.common.files import make_folders
from cachebuilder.common.foreign import without_traces
from cachebuilder.common.progress import Progress, no_progress
from cachebuilder.common.records import Record
from cachebuilder.cuda.gpus import Gpu
from cachebuilder.cuda.processes import FOREIGN_FLAGS
from cachebuilder.cuda.toolchain import Toolchain
from cachebuilder.errors import CacheBuilderError, CompileError, InstallationError, PlanError
from cachebuilder.flashinfer import entries, stand_in
from cachebuilder.flashinfer.installation import FlashInfer
from cachebuilder.flashinfer.schema import Gemm
from cachebuilder.sweep.flashinfer_protocol import (
    GemmsAnswer,
    GemmsJob,
    GemmTrialsAnswer,
    GemmTrialsJob,
    ModulesAnswer,
    ModulesJob,
)
from cachebuilder.sweep.process import Compiler
from cachebuilder.sweep.protocol import ANSWER, FAILURE, JOB, Failure
from cachebuilder.sweep.warm import Process
from cachebuilder.virtual_gpu import library as virtual_gpu

_HERE = Path(__file__).parent
#: An answer's type → the word for the child.
_KINDS: dict[type[Record], str] = {ModulesAnswer: "modules", GemmsAnswer: "gemms", GemmTrialsAnswer: "trials"}
_PACKAGE_ROOT = Path(__file__).parents[2]
#: Variables with these beginnings change what torch, CUDA or FlashInfer do: a child does not inherit them.
_DROPPED = ("CUDA_", "PYTORCH_", "TORCH_", "NVIDIA_", "NVCC_", "VIRTUAL_GPU_", "FLASHINFER_", "TRTLLM_")
#: FlashInfer would build with these compilers, and they with these headers. The key of a module has gcc's version only.
_FOREIGN_COMPILERS = ("CC", "CXX", *FOREIGN_FLAGS)

A = TypeVar("A", bound=Record)


@dataclass(frozen=True)
class Request:
    """A kernel that FlashInfer's GEMM asked its compiler for: the source, and nvcc's flags without include paths."""

    source: str
    flags: tuple[str, ...]


def build_modules(
    flashinfer: FlashInfer,
    toolchain: Toolchain,
    gpu: Gpu,
    names: Sequence[str],
    jobs: int,
    progress: Progress = no_progress,
) -> dict[str, bytes]:
    """Build FlashInfer's modules ``names`` for ``gpu`` by FlashInfer's own descriptions; returns each one's bytes.

    Args:
        progress: the step is "FlashInfer's modules", the units are commands of ninja.

    Raises:
        CompileError: a compiler fails, with its output.
        InstallationError: FlashInfer does not load.
        PlanError: FlashInfer has no such module for this GPU.
    """
    with scratch_folder() as scratch:
        home = _cuda_home(toolchain, scratch / "cuda")
        environment = _environment() | {
            "CUDA_HOME": str(home),
            "FLASHINFER_CUDA_ARCH_LIST": gpu.capability,
            "FLASHINFER_WORKSPACE_BASE": str(scratch),
            "HOME": str(scratch),
            "TMPDIR": str(scratch),
        }
        job = ModulesJob(flashinfer=str(flashinfer.path), names=tuple(names), jobs=jobs)

        def report() -> None:
            progress("FlashInfer's modules", *_ninja_steps(scratch))

        answer = _call(job, environment, scratch, ModulesAnswer, flashinfer, report)
        return {name: Path(path).read_bytes() for name, path in answer.built.items()}


def requested_kernels(
    flashinfer: FlashInfer, gpu: Gpu, gemms: Sequence[Gemm], module: bytes
) -> tuple[GemmsAnswer, dict[str, Request]]:
    """Call FlashInfer's GEMM at every M of ``gemms`` on a virtual ``gpu``, with a compiler that records.

    Args:
        module: the module with the GEMM, as `build_modules` made it.

    Returns:
        The answer, whose spans name entries, and each entry's request.

    Raises:
        InstallationError: FlashInfer does not load.
        PlanError: FlashInfer refuses a shape, or the virtual GPU does not answer a CUDA call.
    """
    with scratch_folder() as scratch:
        nvcc = scratch / "bin" / "nvcc"
        nvcc.parent.mkdir()
        shutil.copyfile(_HERE / "recording_flashinfer_nvcc.sh", nvcc)
        nvcc.chmod(0o755)
        root = scratch / "flashinfer"
        write_modules(root, flashinfer, gpu, {entries.GEMM_MODULE: module})
        answer = call_gemms(flashinfer, gpu, gemms, root, Compiler(nvcc, scratch))
        requests = {
            folder.name: Request((folder / "kernel.cu").read_text(), _flags(folder / "flags.txt"))
            for folder in sorted((nvcc.parent / "requests").glob("*"))
        }
    launched = sorted({entry for swept in answer.sweeps for span in swept.spans for entry in span.entries})
    for entry in launched:
        if entry not in requests or not entries.is_entry(entry):
            raise PlanError(f"wanted an entry for every kernel that FlashInfer's GEMM launched, found {entry!r}")
    return answer, {entry: requests[entry] for entry in launched}


def call_gemms(
    flashinfer: FlashInfer,
    gpu: Gpu,
    gemms: Sequence[Gemm],
    root: Path,
    compiler: Compiler,
    modules: Sequence[str] = (),
) -> GemmsAnswer:
    """Load ``modules``, and call FlashInfer's GEMM at every M of ``gemms``, on a virtual ``gpu``.

    Args:
        root: a folder as a restore makes it: modules, the stand-in, the cache of cubins.
        compiler: what FlashInfer calls for a kernel that the cache lacks.

    Raises: as `requested_kernels` does.
    """
    with scratch_folder() as scratch:
        environment = _serving(root, compiler, scratch) | virtual_gpu.environment(gpu)
        job = GemmsJob(flashinfer=str(flashinfer.path), gpu=gpu, gemms=tuple(gemms), modules=tuple(modules))
        return _call(job, environment, scratch, GemmsAnswer, flashinfer)


def try_gemms(
    flashinfer: FlashInfer,
    gemms: Sequence[Gemm],
    points: Sequence[tuple[int, int]],
    root: Path,
    compiler: Compiler,
) -> GemmTrialsAnswer:
    """Call FlashInfer's GEMM on random inputs at ``points`` of ``gemms``, on this machine's GPU.

    Args:
        points: the position of a shape, and M.

    Raises: as `requested_kernels` does.
    """
    with scratch_folder() as scratch:
        modules = (entries.GEMM_MODULE,)
        job = GemmTrialsJob(flashinfer=str(flashinfer.path), gemms=tuple(gemms), modules=modules, points=tuple(points))
        environment = _serving(root, compiler, scratch)
        return _call(job, environment, scratch, GemmTrialsAnswer, flashinfer)


def _serving(root: Path, compiler: Compiler, scratch: Path) -> dict[str, str]:
    """The environment of a process in which FlashInfer serves from the folder ``root``."""
    environment = _environment() | compiler.environment
    return environment | {
        "PYTHONPATH": f"{root / 'python'}:{environment['PYTHONPATH']}",
        "TRTLLM_DG_CACHE_DIR": str(root),
        "TRTLLM_DG_NVCC_COMPILER": str(compiler.nvcc),
        "FLASHINFER_WORKSPACE_BASE": str(scratch),
        "FLASHINFER_DISABLE_JIT": "1",
        "CUDA_HOME": str(compiler.home),
    }


def write_modules(root: Path, flashinfer: FlashInfer, gpu: Gpu, modules: Mapping[str, bytes]) -> None:
    """Lay modules into ``root`` beside a stand-in that FlashInfer finds them by."""
    for name, data in modules.items():
        make_folders(root / "modules" / name)
        (root / "modules" / name / entries.module_file(name)).write_bytes(data)
    make_folders(root / "python" / stand_in.PACKAGE)
    text = stand_in.text(flashinfer.version, arch_of(gpu), flashinfer.headers_digest)
    (root / "python" / stand_in.PACKAGE / "__init__.py").write_text(text)


def cuda_wheels_digest() -> str:
    """sha256 over the headers of torch's CUDA wheels, which modules include, and the name of their runtime library."""
    runtime = virtual_gpu.find_cuda_runtime()
    return hashlib.sha256(f"{runtime.name} {digest_tree(runtime.parent.parent / 'include')}".encode()).hexdigest()


def arch_of(gpu: Gpu) -> str:
    """The architecture that FlashInfer compiles for, as nvcc names it (``flashinfer/compilation_context.py``)."""
    family_wide = gpu.major == 12 and gpu.minor == 0
    return f"sm_{gpu.major}{gpu.minor}{'f' if family_wide else 'a'}"


def _flags(path: Path) -> tuple[str, ...]:
    return tuple(flag for flag in path.read_text().split() if not flag.startswith("-I"))


def _cuda_home(toolchain: Toolchain, home: Path) -> Path:
    """A CUDA home in the folder ``home``: this nvcc and its headers; the other headers and libraries of torch's wheels.

    PyPI's nvcc will do: no toolkit has to be installed. A linker looks for libraries by their names without a version,
    which the wheels lack; the virtual GPU stands for the driver.
    """
    runtime = virtual_gpu.find_cuda_runtime()
    for name in ("bin", "include", "lib64"):
        (home / name).mkdir(parents=True)
    nvcc = home / "bin" / "nvcc"
    nvcc.write_text(f'#!/bin/sh\nexec "{toolchain.nvcc}" "$@"\n')
    nvcc.chmod(0o755)
    for folder in (*toolchain.include_folders(home), runtime.parent.parent / "include"):
        for header in folder.iterdir():
            if not (link := home / "include" / header.name).exists():
                link.symlink_to(header)
    for library in runtime.parent.glob("lib*.so.*"):
        link = home / "lib64" / f"{library.name.partition('.so.')[0]}.so"
        if not link.exists():
            link.symlink_to(library)
    (home / "lib64" / "libcuda.so").symlink_to(virtual_gpu.build())
    return home


def _environment() -> dict[str, str]:
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(_DROPPED) and name not in _FOREIGN_COMPILERS
    }
    paths = [str(_PACKAGE_ROOT), *filter(None, [kept.get("PYTHONPATH")])]
    return kept | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONWARNINGS": "ignore"}


def _ninja_steps(folder: Path) -> tuple[int, int]:
    """How many of ninja's commands in ``folder`` have ended, and how many there are; 0 before ninja starts."""
    total = sum(file.read_text().count("\nbuild ") for file in folder.glob("*.ninja"))
    log = folder / ".ninja_log"  # a line for each command that ended, after a head
    return len(log.read_text().splitlines()[1:]) if log.exists() else 0, total


def _call(
    job: Record,
    environment: dict[str, str],
    folder: Path,
    answer: type[A],
    flashinfer: FlashInfer,
    report: Callable[[], None] = lambda: None,
) -> A:
    """Run the child with ``job`` in ``folder``, and ``report`` while it runs; returns its answer."""
    kind = _KINDS[answer]
    (folder / JOB).write_text(job.model_dump_json())
    log = folder / "log.txt"
    command = [sys.executable, "-P", "-m", "cachebuilder.sweep.flashinfer_child", str(folder), kind]
    child = Process(command, environment, log)
    try:
        while (exit_code := child.wait(0.5)) is None:
            report()
        report()
    except BaseException:
        child.kill()
        raise
    if (folder / ANSWER).exists():
        return answer.model_validate_json((folder / ANSWER).read_bytes())
    last_lines = "\n".join(without_traces(log.read_text(errors="replace")).strip().splitlines()[-12:])
    if (folder / FAILURE).exists():
        raise _explain(Failure.model_validate_json((folder / FAILURE).read_bytes()), kind, flashinfer, last_lines)
    raise PlanError(f"{flashinfer}: its process ended with exit code {exit_code}\n{last_lines}")


def _explain(failure: Failure, kind: str, flashinfer: FlashInfer, output: str) -> CacheBuilderError:
    """The error for what happened in the child."""
    reason = failure.reason
    if failure.kind == "import":
        return InstallationError(
            f"cannot load {reason}", hint="install what the engine's flashinfer-python needs beside it"
        )
    if failure.kind == "missing" and kind != "modules":
        return PlanError(f"{flashinfer} does not load its module {reason}")
    if failure.kind == "missing":
        return PlanError(
            f"{flashinfer} describes no module {reason} for this GPU",
            hint="flashinfer: modules: wants FlashInfer's own names, which `flashinfer list-modules` prints",
        )
    if failure.kind == "unanswered":
        return PlanError(
            f"the virtual GPU does not answer {reason}",
            hint="this FlashInfer is newer than cachebuilder: report it",
        )
    if kind == "modules":
        return CompileError(f"{flashinfer}: a module did not compile\n{reason}")
    return PlanError(f"{flashinfer}: its GEMM refused {reason}\n{output}")
