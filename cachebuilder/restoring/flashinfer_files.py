"""Our own files for FlashInfer in a restored folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cachebuilder.artifact.index import FLASHINFER, FlashInferPart, Index
from cachebuilder.common.folders import Folder
from cachebuilder.deepgemm.installation import package_folder
from cachebuilder.flashinfer import entries, stand_in

#: What goes on ``PYTHONPATH``, below DIR.
PYTHON = f"{FLASHINFER}/python"
#: The stand-in for FlashInfer's package of modules.
STAND_IN = f"{PYTHON}/{stand_in.PACKAGE}/__init__.py"
#: A file where Python would make a folder for the stand-in's bytecode: nothing but the stand-in's text is ever run.
NO_BYTECODE = f"{PYTHON}/{stand_in.PACKAGE}/__pycache__"
#: FlashInfer's GEMM makes this folder before it looks for any kernel. In a read-only DIR it must exist already.
KEEP_TMP = f"{FLASHINFER}/tmp/.keep"


def stand_in_of(part: FlashInferPart) -> bytes:
    """The bytes of `STAND_IN` for an artifact."""
    return stand_in.text(part.fingerprint.version, part.fingerprint.arch, part.fingerprint.headers).encode()


def own_files_of(part: FlashInferPart | None) -> dict[str, tuple[bytes, int]]:
    """Our own files for FlashInfer, by path below DIR, with their modes; none where the artifact has nothing for it."""
    if part is None:
        return {}
    return {STAND_IN: (stand_in_of(part), 0o644), NO_BYTECODE: (b"", 0o644), KEEP_TMP: (b"", 0o644)}


def package_modules() -> dict[str, Path]:
    """The modules of the package ``flashinfer-jit-cache`` and its parts, as they are installed here: name → folder.

    The package has a folder a module (0.6.13). From 0.7 on, the modules are in packages for one architecture each,
    whose names begin with the same words.
    """
    package = package_folder(stand_in.PACKAGE)
    if package is None:
        return {}
    files = package.parent.glob(f"{stand_in.PACKAGE}*/**/*.so")
    return {file.stem: file.parent for file in files if file.parent.name == file.stem and entries.is_module(file.stem)}


def write_stand_in(python: Folder, indexes: Sequence[Index]) -> None:
    """Write the stand-in into the folder ``python``, whose neighbour ``modules`` it names."""
    with python.make(stand_in.PACKAGE, 0o700) as package:
        for path, (data, mode) in own_files_of(next(filter(None, (i.flashinfer for i in indexes)), None)).items():
            if path.startswith(f"{PYTHON}/{stand_in.PACKAGE}/"):
                package.write(path.rpartition("/")[2], data, mode)
