"""What a person with a problem needs to know of this machine; nothing is imported or compiled to find it out."""

from __future__ import annotations

import os
import subprocess
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path

from cachebuilder.artifact.index import Index
from cachebuilder.artifact.read import read_index
from cachebuilder.common import native
from cachebuilder.cuda import nvml
from cachebuilder.cuda import toolchain as toolchains
from cachebuilder.deepgemm import entries as entry_files
from cachebuilder.deepgemm import environment as variables
from cachebuilder.deepgemm import installation as installations
from cachebuilder.deepgemm.generation import Generation
from cachebuilder.deepgemm.installation import Installation
from cachebuilder.errors import ArtifactError, InstallationError, ToolchainError
from cachebuilder.restoring import compatibility
from cachebuilder.restoring.folder import is_restored, open_folder
from cachebuilder.restoring.machine import Machine


@dataclass(frozen=True)
class Root:
    """One cache root.

    Attributes:
        entries: how many of each generation.
        damaged: entries that DeepGEMM would stumble over or pass by: a file missing, a cubin that is no ELF, or other
            bytes than the index of a restored artifact lists.
        artifacts: names of the artifacts restored into it.
    """

    path: Path
    exists: bool
    writable: bool
    entries: Mapping[str, int]
    damaged: tuple[str, ...]
    artifacts: tuple[str, ...]


@dataclass(frozen=True)
class Verdict:
    """What an artifact would say here: no difference means that it fits."""

    artifact: str
    differences: tuple[compatibility.Difference, ...]


@dataclass(frozen=True)
class Findings:
    """All that was found; an absent part is None, with the reason in ``problems``.

    Attributes:
        roots: those that DeepGEMM would take here, in its order; ``roots_from`` says what named them.
        folder: the restored folder that was asked about.
    """

    installation: Installation | None
    generation: Generation | None
    torch: str | None
    nvcc: toolchains.Toolchain | None
    c_compiler: str | None
    gpu: nvml.VisibleGpu | None
    roots_from: str
    roots: tuple[Root, ...]
    folder: Root | None
    kernel_variables: Mapping[str, str]
    verdicts: tuple[Verdict, ...]
    problems: tuple[str, ...]


def examine(target: Path | None = None, deep_gemm: Path | None = None) -> Findings:
    """Look around; with ``target``, an artifact or restored folder, also say whether it fits.

    Raises:
        ArtifactError: ``target`` is neither.
    """
    problems: list[str] = []
    installation = generation = nvcc = c_compiler = None
    try:
        installation = installations.find(deep_gemm)
        generation = installation.generation
    except InstallationError as error:
        problems.append(str(error))
    # With no DeepGEMM, speak of the current generation: it is what an empty machine would get.
    spoken: Generation = generation or "deepjit"
    try:
        nvcc = _find_nvcc(spoken)
    except ToolchainError as error:
        problems.append(str(error))
    try:
        c_compiler = _first_line([*native.find_c_compiler(), "--version"])
    except InstallationError as error:
        problems.append(str(error))
    gpu = nvml.first_gpu()
    roots_from, roots = variables.cache_roots(spoken, os.environ)
    if not roots:
        problems.append("neither HOME nor DG_JIT_CACHE_DIR is set: DeepGEMM knows no cache root and does not start")
    sglang = os.environ.get("SGLANG_DG_CACHE_DIR")
    if sglang is not None and sglang != ":".join(map(str, roots)):
        problems.append(f"SGLang would take SGLANG_DG_CACHE_DIR={sglang} instead of the caches above")
    kernel_variables = variables.kernel_variables(spoken, os.environ)
    try:
        indexes = _indexes(target) if target else []
    except ArtifactError as error:
        if target is None or not is_restored(target):
            raise
        indexes = []
        problems.append(f"{error}; {error.hint}" if error.hint else str(error))
    verdicts = [
        Verdict(index.name, tuple(_judge(index, installation, nvcc, gpu, frozen_text)))
        for index, frozen_text in indexes
    ]
    return Findings(
        installation=installation if generation else None,
        generation=generation,
        torch=_version("torch"),
        nvcc=nvcc,
        c_compiler=c_compiler,
        gpu=gpu,
        roots_from=roots_from,
        roots=tuple(_look_into(root) for root in roots),
        folder=_look_into(target) if target and target.is_dir() else None,
        kernel_variables=kernel_variables,
        verdicts=tuple(verdicts),
        problems=tuple(problems),
    )


def _find_nvcc(generation: Generation) -> toolchains.Toolchain:
    """The compiler that DeepGEMM would ask, or the one that cachebuilder would build with."""
    named = variables.get(generation, os.environ, "JIT_NVCC_COMPILER")
    if named and named[1]:
        return replace(toolchains.find(Path(named[1])), origin=named[0])
    return toolchains.find()


def _first_line(command: list[str]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = done.stdout.splitlines()
    return lines[0] if lines else None


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _look_into(root: Path) -> Root:
    counts: Counter[str] = Counter()
    damaged: dict[str, str] = {}
    cache = root / "cache"
    try:
        folders = sorted(path for path in cache.iterdir() if path.is_dir())
    except OSError:
        folders = []
    for folder in folders:
        generation = _generation_of(folder.name)
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
    sentences = tuple(damaged.values())
    return Root(root, root.is_dir(), os.access(root, os.W_OK), dict(counts), sentences, tuple(artifacts))


def _generation_of(entry: str) -> Generation | None:
    generations: tuple[Generation, ...] = ("legacy", "deepjit")
    return next((g for g in generations if entry_files.kernel_name(g, entry) is not None), None)


def _fault(folder: Path, generation: Generation) -> str | None:
    """What DeepGEMM would stumble over in an entry, or what makes it pass the entry by."""
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


def _indexes(target: Path) -> list[tuple[Index, str | None]]:
    """The index of each artifact in ``target``; for a folder, with what its frozen nvcc answers."""
    if target.is_dir():
        folder = open_folder(target)
        text = folder.compiler_text()
        return [(artifact.index, text) for artifact in folder.artifacts]
    return [(read_index(target), None)]


def _judge(
    index: Index,
    installation: Installation | None,
    nvcc: toolchains.Toolchain | None,
    gpu: nvml.VisibleGpu | None,
    frozen_text: str | None,
) -> list[compatibility.Difference]:
    compiler = frozen_text or (nvcc.version_text if nvcc else None)
    relocates = frozen_text is None  # an artifact is yet to be restored
    return Machine(installation, gpu, os.environ, compiler).differences(index, relocates=relocates)
