"""The copy of FlashInfer in use: where it is, its version and its headers. Nothing here imports it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from importlib import metadata
from pathlib import Path

from cachebuilder.common.digest import digest_files
from cachebuilder.deepgemm.installation import package_folder
from cachebuilder.errors import InstallationError

_INSTALL = "pip install the flashinfer-python of the engine that serves, or name a copy with --flashinfer PATH"


@dataclass(frozen=True)
class FlashInfer:
    """One copy of FlashInfer on disk.

    Attributes:
        path: the package folder, which holds ``__init__.py`` and ``data/``.
        version: FlashInfer's version, from ``_build_meta.py``.
    """

    path: Path
    version: str

    def __str__(self) -> str:
        return f"FlashInfer {self.version} ({self.path})"

    @cached_property
    def headers_digest(self) -> str:
        """sha256 over the names and bytes in ``data/csrc`` and ``data/include``: FlashInfer's own CUDA code."""
        return _digest(self.path, (self.path / "data" / "csrc", self.path / "data" / "include"))

    @cached_property
    def code_digest(self) -> str:
        """sha256 over all that a module is made from: ``data/``, with CUTLASS, and the descriptions in ``jit/``."""
        return _digest(self.path, (self.path / "data", self.path / "jit"))

    @cached_property
    def tvm_ffi(self) -> str:
        """The version of ``apache-tvm-ffi`` beside it, whose ABI the modules use; ``unknown`` where there is none."""
        for distribution in metadata.distributions(name="apache-tvm-ffi", path=[str(self.path.parent)]):
            return distribution.version
        try:
            return metadata.version("apache-tvm-ffi")
        except metadata.PackageNotFoundError:
            return "unknown"


def find(path: Path | None = None) -> FlashInfer:
    """Find FlashInfer: the package folder ``path`` if given, else the installed one.

    Raises:
        InstallationError: there is none, or ``path`` is not one.
    """
    folder = path or package_folder("flashinfer")
    if folder is None:
        raise InstallationError("wanted FlashInfer, which the manifest's flashinfer needs; found none", hint=_INSTALL)
    try:
        text = (folder / "_build_meta.py").read_text()
    except OSError:
        text = ""
    version = re.search(r"^__version__\s*=\s*['\"]([^'\"]+)", text, re.MULTILINE)
    if version is None or not (folder / "data" / "csrc").is_dir():
        raise InstallationError(
            f"{folder}: wanted a flashinfer package, with _build_meta.py and data/csrc; found none", hint=_INSTALL
        )
    return FlashInfer(folder.absolute(), version[1])


def installed() -> FlashInfer | None:
    """The installed FlashInfer; None where there is none that `find` takes."""
    try:
        return find()
    except InstallationError:
        return None


def _digest(root: Path, folders: Iterable[Path]) -> str:
    """sha256 over the names and bytes of all files in ``folders``, except what was built from them."""
    files = (file for folder in folders for file in folder.rglob("*") if file.is_file())
    return digest_files(root, (file for file in files if file.suffix not in (".pyc", ".so")))
