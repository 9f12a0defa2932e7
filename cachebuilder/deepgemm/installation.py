"""The DeepGEMM copy in use: where it is, its version, its cache generation, its headers; found without importing it."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from importlib import util
from pathlib import Path

from cachebuilder.deepgemm.generation import Generation
from cachebuilder.errors import InstallationError

#: What the compiled extension of each generation says somewhere and the other's never does: DeepJIT's commit marker
#: (``deep_jit/cache/disk.hpp``) and legacy's complaint (``csrc/jit/kernel_runtime.hpp``, DeepGEMM 2.6.1).
_MARKS: dict[Generation, bytes] = {"deepjit": b".committed", "legacy": b"Corrupted JIT cache directory"}


@dataclass(frozen=True)
class Installation:
    """One copy of DeepGEMM on disk.

    Attributes:
        path: the package folder, the one with ``__init__.py`` and ``include/``; no link in it.
        version: the copy's own, out of its ``VERSION`` file or its ``__version__``.
        imported_as: the same folder as Python's import finds it, links kept: legacy keys hold this path.
    """

    path: Path
    version: str
    imported_as: Path

    def __str__(self) -> str:
        source = f"{self.distribution}, " if self.distribution else ""
        return f"DeepGEMM {self.version} ({source}{self.generation} cache, {self.path})"

    @cached_property
    def distribution(self) -> str | None:
        """What it was installed with, name and version (``vllm 0.33.0``); None for a bare folder."""
        return _distribution(self.path)

    @cached_property
    def extensions(self) -> list[Path]:
        """The compiled extension, in vLLM one for each Python. Raises `InstallationError` where there is none."""
        found = sorted(self.path.glob("_C*.so"))
        if not found:
            raise InstallationError(f"wanted DeepGEMM's compiled extension _C*.so, found none in {self.path}")
        return found

    @cached_property
    def generation(self) -> Generation:
        """Which cache layout this copy reads and writes, told from its compiled extension.

        Raises:
            InstallationError: neither, or both.
        """
        code = self.extensions[0].read_bytes()
        found = [generation for generation, mark in _MARKS.items() if mark in code]
        if len(found) != 1:
            raise InstallationError(
                f"{self.path}: wanted a DeepGEMM of the legacy or the DeepJIT generation, found neither",
                hint="cachebuilder knows DeepGEMM 2.5 (legacy) to 2.8 (DeepJIT); other versions may need a newer one",
            )
        return found[0]

    @property
    def include(self) -> Path:
        """The folder DeepGEMM hands to nvcc: it takes its own place by ``abspath``, so links are kept in it."""
        return self.imported_as / "include"

    @cached_property
    def headers_digest(self) -> str:
        """sha256 over the names and bytes of ``include/deep_gemm/``: the headers that enter a kernel's key."""
        return _digest_tree(self.include / "deep_gemm")

    @cached_property
    def include_digest(self) -> str:
        """sha256 over the names and bytes of all of ``include/``, CUTLASS and CuTe too: what nvcc may read."""
        return _digest_tree(self.include)

    @cached_property
    def code_digest(self) -> str:
        """sha256 over the copy's own code: extensions and Python files, which decide what is asked for."""
        return _digest(self.path, [*self.extensions, *self.path.rglob("*.py")])

    @cached_property
    def cutlass_version(self) -> str:
        """major.minor.patch out of ``include/cutlass/version.h``."""
        try:
            text = (self.include / "cutlass" / "version.h").read_text()
        except OSError:
            raise InstallationError(f"wanted CUTLASS's headers in {self.include}, found no cutlass/version.h") from None
        return ".".join(
            re.search(rf"#define\s+CUTLASS_{part}\s+(\d+)", text)[1]  # type: ignore[index]
            for part in ("MAJOR", "MINOR", "PATCH")
        )


def find(path: Path | None = None) -> Installation:
    """The copy at ``path``, else the installed ``deep_gemm``, else the one inside vLLM.

    Raises:
        InstallationError: there is none, or ``path`` is not one.
    """
    if path is not None:
        return _at(path)
    spec = util.find_spec("deep_gemm")
    if spec is not None and spec.submodule_search_locations:
        return _at(Path(next(iter(spec.submodule_search_locations))))
    spec = util.find_spec("vllm")
    if spec is not None and spec.submodule_search_locations:
        inside = Path(next(iter(spec.submodule_search_locations))) / "third_party" / "deep_gemm"
        if inside.is_dir():
            return _at(inside)
    raise InstallationError(
        "wanted DeepGEMM: an installed deep_gemm or vLLM's own copy; found neither",
        hint="pip install sgl-deep-gemm, or name a copy with --deep-gemm PATH",
    )


def _at(imported_as: Path) -> Installation:
    path = imported_as.resolve()
    if not (path / "__init__.py").is_file() or not (path / "include" / "deep_gemm").is_dir():
        raise InstallationError(f"wanted a deep_gemm package folder (with include/deep_gemm), found {path}")
    return Installation(path, _version(path), imported_as.absolute())


def _version(path: Path) -> str:
    if (path / "VERSION").is_file():
        return (path / "VERSION").read_text().strip()
    match = re.search(r"^__version__\s*=\s*['\"]([^'\"]+)", (path / "__init__.py").read_text(), re.MULTILINE)
    return match[1] if match else "unknown"


def _distribution(path: Path) -> str | None:
    """The distribution that lists the copy among its files, in the folder that its top-level package is in."""
    from importlib import metadata  # slow to import, and its answer binds nothing: a restore does without

    root = path.parents[2] if path.parts[-3:-1] == ("vllm", "third_party") else path.parent
    wanted = f"{path.relative_to(root).as_posix()}/__init__.py"
    for distribution in metadata.distributions(path=[str(root)]):
        if any(str(file) == wanted for file in distribution.files or ()):
            return f"{distribution.metadata['Name']} {distribution.version}"
    return None


def _digest_tree(root: Path) -> str:
    return _digest(root, (file for file in root.rglob("*") if file.is_file()))


def _digest(root: Path, files: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for file in sorted(files):
        digest.update(f"{file.relative_to(root).as_posix()}\0".encode())
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()
