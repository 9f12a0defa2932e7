"""The copy of DeepGEMM in use: where it is, its version, cache generation and headers. Nothing here imports it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from importlib import metadata, util
from pathlib import Path

from cachebuilder.common.digest import digest_files, digest_tree
from cachebuilder.deepgemm.generation import Generation
from cachebuilder.errors import InstallationError

_INSTALL = "pip install sgl-deep-gemm or tokenspeed-deepgemm, or name a copy with --deep-gemm PATH"

#: A text in the compiled extension of each generation that is not in the other's: DeepJIT's commit marker
#: (``deep_jit/cache/disk.hpp``) and an error message of legacy (``csrc/jit/kernel_runtime.hpp``, DeepGEMM 2.6.1).
_MARKS: dict[Generation, bytes] = {"deepjit": b".committed", "legacy": b"Corrupted JIT cache directory"}
#: DeepJIT's and legacy's words for an nvcc that is too old (``deep_jit/backend/cuda/backend.hpp``,
#: ``csrc/jit/compiler.hpp``).
_OLDEST_NVCC = re.compile(rb"NVCC version (?:must be at least|should be >=) (\d+\.\d+)")


@dataclass(frozen=True)
class Installation:
    """One copy of DeepGEMM on disk.

    Attributes:
        path: the package folder, which holds ``__init__.py`` and ``include/``, with all links resolved.
        version: DeepGEMM's version, from the ``VERSION`` file or ``__version__``.
        imported_as: the same folder as Python's import finds it, with links kept. Legacy keys hold this path.
    """

    path: Path
    version: str
    imported_as: Path

    def __str__(self) -> str:
        source = f"{self.distribution}, " if self.distribution else ""
        return f"DeepGEMM {self.version} ({source}{self.generation} cache, {self.path})"

    @property
    def is_vllms(self) -> bool:
        """Whether it is the copy inside vLLM, installed or taken out of its wheel."""
        return self.path.parts[-3:-1] == ("vllm", "third_party")

    @cached_property
    def distribution(self) -> str | None:
        """Name and version of the distribution that installed it (``vllm 0.33.0``); None for a bare folder."""
        return _distribution(self.path)

    @cached_property
    def extensions(self) -> list[Path]:
        """The compiled extensions; vLLM has one for each Python. Raises `InstallationError` if there is none."""
        extensions = sorted(self.path.glob("_C*.so"))
        if not extensions:
            raise InstallationError(
                f"wanted DeepGEMM's compiled extension _C*.so, found none in {self.path}",
                hint=f"DeepGEMM 1.0 and 2.0 have none, and no serving engine still takes them: {_INSTALL}",
            )
        return extensions

    @cached_property
    def generation(self) -> Generation:
        """The cache layout that this copy reads and writes, determined from its compiled extension.

        Raises:
            InstallationError: the extension holds the mark of neither generation, or of both.
        """
        code = self.extensions[0].read_bytes()
        generations = [generation for generation, mark in _MARKS.items() if mark in code]
        if len(generations) != 1:
            raise InstallationError(
                f"{self.path}: wanted a DeepGEMM of the legacy or the DeepJIT generation, "
                f"found {' and '.join(generations) or 'neither'}",
                hint="this cachebuilder knows DeepGEMM 2.5 (legacy) to 2.8 (DeepJIT): install one of these",
            )
        return generations[0]

    @cached_property
    def oldest_nvcc(self) -> str | None:
        """The oldest release of nvcc that it takes, as major.minor, from its error message; None where it has none."""
        match = _OLDEST_NVCC.search(self.extensions[0].read_bytes())
        return match[1].decode() if match else None

    @property
    def include(self) -> Path:
        """The include folder as DeepGEMM passes it to nvcc: DeepGEMM uses ``abspath``, which keeps links."""
        return self.imported_as / "include"

    @cached_property
    def headers_digest(self) -> str:
        """sha256 over the names and bytes in ``include/deep_gemm/``: the headers that enter a kernel's key."""
        return digest_tree(self.include / "deep_gemm")

    @cached_property
    def include_digest(self) -> str:
        """sha256 over the names and bytes in ``include/``, with CUTLASS and CuTe: everything that nvcc may read."""
        return digest_tree(self.include)

    @cached_property
    def code_digest(self) -> str:
        """sha256 over DeepGEMM's extensions and Python files: the code that decides which kernels are needed."""
        return digest_files(self.path, [*self.extensions, *self.path.rglob("*.py")])

    @cached_property
    def cutlass_version(self) -> str:
        """major.minor.patch from ``include/cutlass/version.h``. Raises `InstallationError` if there is no such file."""
        try:
            text = (self.include / "cutlass" / "version.h").read_text()
        except OSError:
            raise InstallationError(f"wanted CUTLASS's headers in {self.include}, found no cutlass/version.h") from None
        return ".".join(
            re.search(rf"#define\s+CUTLASS_{part}\s+(\d+)", text)[1]  # type: ignore[index]
            for part in ("MAJOR", "MINOR", "PATCH")
        )


def find(path: Path | None = None) -> Installation:
    """Find DeepGEMM: the copy at ``path`` if given, else the installed ``deep_gemm``, else the one inside vLLM.

    Raises:
        InstallationError: there is no DeepGEMM, or ``path`` is not one.
    """
    if path is not None:
        return _at(path)
    installed = package_folder("deep_gemm")
    if installed is not None:
        return _at(installed)
    vllm = package_folder("vllm")
    if vllm is not None and (vllm / "third_party" / "deep_gemm").is_dir():
        return _at(vllm / "third_party" / "deep_gemm")
    raise InstallationError(
        "wanted DeepGEMM, as an installed deep_gemm or as vLLM's own copy; found neither",
        hint=_INSTALL,
    )


def package_folder(name: str) -> Path | None:
    """The folder that Python would import a package from, without importing it; None if it is not installed."""
    spec = util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(next(iter(spec.submodule_search_locations)))


def _at(imported_as: Path) -> Installation:
    path = imported_as.resolve()
    if not (path / "__init__.py").is_file() or not (path / "include" / "deep_gemm").is_dir():
        # PyPI's deep-gemm 1.0.0 has Python files only; an import would succeed all the same.
        package = _distribution(path) if path.is_dir() else None
        raise InstallationError(
            f"wanted a deep_gemm package with its kernels' headers in include/deep_gemm, found none in {path}"
            + (f", from {package}" if package else ""),
            hint=f"pip uninstall {package.split()[0]}, then {_INSTALL}" if package else _INSTALL,
        )
    return Installation(path, _version(path), imported_as.absolute())


def _version(path: Path) -> str:
    if (path / "VERSION").is_file():
        return (path / "VERSION").read_text().strip()
    match = re.search(r"^__version__\s*=\s*['\"]([^'\"]+)", (path / "__init__.py").read_text(), re.MULTILINE)
    return match[1] if match else "unknown"


def _distribution(path: Path) -> str | None:
    """The distribution that lists this copy among its files, of those in the folder of its top-level package."""
    root = path.parents[2] if path.parts[-3:-1] == ("vllm", "third_party") else path.parent
    package_file = f"{path.relative_to(root).as_posix()}/__init__.py"
    for distribution in metadata.distributions(path=[str(root)]):
        # `distribution.files` makes an object of every file of torch and CUDA, too, which takes longer than a restore.
        record = distribution.read_text("RECORD") or ""
        if any(line.startswith(f"{package_file},") for line in record.splitlines()):
            return f"{distribution.metadata['Name']} {distribution.version}"
    return None
