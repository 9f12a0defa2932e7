"""Examines this machine for a person with a problem. It imports neither torch nor DeepGEMM, and compiles nothing."""

from __future__ import annotations

import os
import subprocess
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import ParamSpec, TypeVar

from cachebuilder.artifact.index import Index
from cachebuilder.artifact.read import read_index
from cachebuilder.common import native
from cachebuilder.common.records import Record
from cachebuilder.cuda import nvml
from cachebuilder.cuda import toolchain as toolchains
from cachebuilder.cuda.nvml import VisibleGpu
from cachebuilder.cuda.toolchain import Toolchain
from cachebuilder.deepgemm import entries as entry_files
from cachebuilder.deepgemm import environment as variables
from cachebuilder.deepgemm import installation as installations
from cachebuilder.deepgemm.generation import Generation
from cachebuilder.deepgemm.installation import Installation
from cachebuilder.errors import ArtifactError, InstallationError, ToolchainError
from cachebuilder.flashinfer.installation import FlashInfer
from cachebuilder.restoring import environment as serving
from cachebuilder.restoring import frozen
from cachebuilder.restoring.compatibility import Difference
from cachebuilder.restoring.folder import is_restored, open_folder
from cachebuilder.restoring.machine import Machine

P = ParamSpec("P")
T = TypeVar("T")

_GENERATIONS: tuple[Generation, ...] = ("legacy", "deepjit")


class DeepGemm(Record):
    """The DeepGEMM that serves here.

    Attributes:
        distribution: name and version of the package that brought it.
        headers: sha256 of its headers, as in a fingerprint.
    """

    path: str
    version: str
    distribution: str | None
    generation: Generation
    headers: str
    cutlass: str


class FlashInferHere(Record):
    """The FlashInfer that serves here; ``tvm_ffi`` is the version of the package that its modules are called by."""

    path: str
    version: str
    tvm_ffi: str


class Nvcc(Record):
    """An nvcc; ``origin`` is the variable or the place that named it."""

    path: str
    release: str
    origin: str


class CacheRoot(Record):
    """A cache root.

    Attributes:
        entries: their number by generation; ``unknown`` counts folders of neither.
        damaged: a sentence for each entry that DeepGEMM could not load or would not use: a file is missing, the cubin
            is no ELF file, or the bytes differ from those in the index of a restored artifact.
        artifacts: names of the artifacts restored into it.
    """

    path: str
    exists: bool
    writable: bool
    entries: dict[str, int]
    damaged: tuple[str, ...]
    artifacts: tuple[str, ...]


class ArtifactHere(Record):
    """An artifact against this machine; ``fits``: there is no difference."""

    name: str
    fits: bool
    differences: tuple[Difference, ...]


class Findings(Record):
    """``doctor --json``; what this machine lacks is null, and ``problems`` says why.

    Attributes:
        roots_from: the variable that names the roots, or ``default``.
        roots: those that DeepGEMM would use here, in its order.
        folder: the folder that was asked about.
        kernel_variables: variables that are set and that change kernels.
    """

    deep_gemm: DeepGemm | None
    flashinfer: FlashInferHere | None
    torch: str | None
    nvcc: Nvcc | None
    c_compiler: str | None
    gpu: VisibleGpu | None
    roots_from: str
    roots: tuple[CacheRoot, ...]
    folder: CacheRoot | None
    kernel_variables: dict[str, str]
    artifacts: tuple[ArtifactHere, ...]
    problems: tuple[str, ...]


def examine(target: Path | None = None, deep_gemm: Path | None = None) -> Findings:
    """Examine this machine, and the artifact or the restored folder ``target`` against it."""
    problems: list[str] = []
    installation = _attempt(problems, installations.find, deep_gemm)
    described = _attempt(problems, _describe, installation) if installation else None
    # A machine without DeepGEMM would get one of the current generation.
    generation: Generation = described.generation if described else "deepjit"
    toolchain = _attempt(problems, _toolchain, generation)
    if installation and described and toolchain and toolchain.is_older_than(installation.oldest_nvcc):
        problems.append(f"this DeepGEMM wants nvcc {installation.oldest_nvcc} or later, found {toolchain.release}")
    if problem := variables.value_problem(generation, os.environ):
        problems.append(f"DeepGEMM does not take a variable that is set here: {problem}")
    c_compiler = _attempt(problems, _c_compiler)
    gpu = nvml.first_gpu()
    roots_from, roots = variables.cache_roots(generation, os.environ)
    if not roots:
        problems.append("neither HOME nor DG_JIT_CACHE_DIR is set: DeepGEMM has no cache root and does not start")
    problems += _unusable(generation, roots)
    sglang_roots = os.environ.get("SGLANG_DG_CACHE_DIR")
    if sglang_roots is not None and sglang_roots != ":".join(map(str, roots)):
        problems.append(f"SGLang would take SGLANG_DG_CACHE_DIR={sglang_roots} instead of the caches above")
    artifacts = []
    here = Machine.of(installation if described else None, gpu)
    archs = {"sm_90a"} if gpu and gpu.capability == (9, 0) else set()
    for index, compiler_text in _indexes(target, problems) if target else []:
        compiler = compiler_text or (toolchain.version_text if toolchain else None)
        machine = replace(here, compiler=compiler)
        differences = machine.differences(index, relocates=compiler_text is None)  # a restore is still to come
        artifacts.append(ArtifactHere(name=index.name, fits=not differences, differences=tuple(differences)))
        archs = archs - {index.fingerprint.arch} if serving.has_gemms(index) else archs | {index.fingerprint.arch}
    if all(map(installations.package_folder, ("vllm", "flashinfer"))):
        problems += filter(None, (serving.uncovered(arch, os.environ) for arch in sorted(archs)))
    return Findings(
        deep_gemm=described,
        flashinfer=_describe_flashinfer(here.flashinfer) if here.flashinfer else None,
        torch=_version("torch"),
        nvcc=Nvcc(path=str(toolchain.nvcc), release=toolchain.release, origin=toolchain.origin) if toolchain else None,
        c_compiler=c_compiler,
        gpu=gpu,
        roots_from=roots_from,
        roots=tuple(_look_into(root) for root in roots),
        folder=_look_into(target) if target and target.is_dir() else None,
        kernel_variables=variables.kernel_variables(generation, os.environ),
        artifacts=tuple(artifacts),
        problems=tuple(problems),
    )


def _unusable(generation: Generation, roots: Sequence[Path]) -> list[str]:
    """What ends DeepGEMM here before it looks for a kernel, or before it asks a compiler for one."""
    problems = []
    if roots and not _can_be_written(roots[0]):
        problems.append(
            f"DeepGEMM cannot write to its first root, {roots[0]}: at a kernel that the cache lacks it ends with "
            "'cannot create directories', and asks no compiler; cachebuilder run takes a root that can be written"
        )
    nvcc = variables.get(generation, os.environ, "JIT_NVCC_COMPILER")
    if nvcc and nvcc[1] and os.path.isfile(nvcc[1]) and not os.access(nvcc[1], os.X_OK):
        problems.append(
            f"{nvcc[0]}: {nvcc[1]} cannot be executed here (its mode, or a mount with noexec), and without a compiler "
            "DeepGEMM serves nothing; cachebuilder run takes a copy that can"
        )
    return problems


def _can_be_written(root: Path) -> bool:
    """Whether this user can make files in ``root``, or can make ``root`` itself."""
    existing = next(path for path in (root, *root.absolute().parents) if os.path.lexists(path))
    return os.access(existing, os.W_OK | os.X_OK, effective_ids=True)


def _attempt(problems: list[str], find: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T | None:
    """What ``find`` finds; None, and its error among the problems, where this machine lacks it."""
    try:
        return find(*args, **kwargs)
    except (InstallationError, ToolchainError) as error:
        problems.append(str(error))
        return None


def _describe(installation: Installation) -> DeepGemm:
    return DeepGemm(
        path=str(installation.path),
        version=installation.version,
        distribution=installation.distribution,
        generation=installation.generation,
        headers=installation.headers_digest,
        cutlass=installation.cutlass_version,
    )


def _describe_flashinfer(flashinfer: FlashInfer) -> FlashInferHere:
    return FlashInferHere(path=str(flashinfer.path), version=flashinfer.version, tvm_ffi=flashinfer.tvm_ffi)


def _toolchain(generation: Generation) -> Toolchain:
    """The compiler that DeepGEMM would call, else the one that cachebuilder would build with."""
    variable = variables.get(generation, os.environ, "JIT_NVCC_COMPILER")
    if variable and variable[1]:
        dir = frozen.dir_of(Path(os.path.abspath(variable[1])))
        if dir is not None:  # a restored folder's: its text is read, and nothing in the folder is run
            return toolchains.of_text(Path(variable[1]), _frozen_text(dir), variable[0])
        return replace(toolchains.find(Path(variable[1])), origin=variable[0])
    return toolchains.find()


def _frozen_text(dir: Path) -> str:
    try:
        return frozen.version_text(dir) or ""
    except OSError:
        return ""


def _c_compiler() -> str | None:
    """The first line of the C compiler's version text."""
    command = [*native.find_c_compiler(), "--version"]
    try:
        output = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60).stdout
    except (OSError, subprocess.TimeoutExpired):
        return None
    return next(iter(output.splitlines()), None)


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _look_into(root: Path) -> CacheRoot:
    try:
        folders = sorted(path for path in (root / "cache").iterdir() if path.is_dir())
    except OSError:
        folders = []
    counts: Counter[str] = Counter()
    damaged: dict[str, str] = {}
    for folder in folders:
        generation = next((g for g in _GENERATIONS if entry_files.kernel_name(g, folder.name) is not None), None)
        counts[generation or "unknown"] += 1
        if generation and (fault := _fault(folder, generation)):
            damaged[folder.name] = f"{folder.name}/{fault}"
    artifacts: list[str] = []
    if is_restored(root):
        try:
            restored = open_folder(root)
            artifacts = [artifact.index.name for artifact in restored.artifacts]
            for item in restored.damage():
                damaged.setdefault(item.entry, str(item))
        except ArtifactError as error:
            damaged[""] = str(error)
    return CacheRoot(
        path=str(root),
        exists=root.is_dir(),
        writable=os.access(root, os.W_OK | os.X_OK, effective_ids=True),
        entries=dict(counts),
        damaged=tuple(damaged.values()),
        artifacts=tuple(artifacts),
    )


def _fault(folder: Path, generation: Generation) -> str | None:
    """Why DeepGEMM could not load the entry in ``folder``, or would not use it."""
    try:
        for name in entry_files.FILES[generation]:
            if not (folder / name).is_file():
                return f"{name}: wanted a file, found none"
        with (folder / entry_files.CUBIN).open("rb") as file:
            start = file.read(4)
    except OSError as error:
        return f"{entry_files.CUBIN}: cannot be read: {error.strerror}"
    if start != b"\x7fELF":
        return f"{entry_files.CUBIN}: wanted an ELF file, found one that begins with {start!r}"
    return None


def _indexes(target: Path, problems: list[str]) -> list[tuple[Index, str | None]]:
    """The index of each artifact in ``target``; for a restored folder, with what its frozen nvcc answers.

    A restored folder whose index is damaged has none, and a problem says so: the rest of the examination still helps.
    """
    if not target.is_dir():
        return [(read_index(target), None)]
    try:
        folder = open_folder(target)
        compiler_text = folder.compiler_text()
    except ArtifactError as error:
        if not is_restored(target):
            raise
        problems.append(f"{error}; {error.hint}" if error.hint else str(error))
        return []
    return [(artifact.index, compiler_text) for artifact in folder.artifacts]
