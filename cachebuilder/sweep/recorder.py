"""The compiler that compiles nothing: it writes down what DeepGEMM asks of it, and what it wrote is read here."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

from cachebuilder.deepgemm import entries as entry_files
from cachebuilder.deepgemm.generation import Generation
from cachebuilder.errors import PlanError
from cachebuilder.sweep.process import Compiler
from cachebuilder.sweep.results import Entry

_RECORDER = Path(__file__).parent / "recording_nvcc.sh"


def recording_compiler(scratch: Path, version_text: str) -> Compiler:
    """A compiler, made in ``scratch``, that writes down what it is asked for and answers with ``version_text``."""
    home = scratch / "cuda"
    (home / "bin").mkdir(parents=True)
    nvcc = home / "bin" / "nvcc"
    shutil.copyfile(_RECORDER, nvcc)
    nvcc.chmod(0o755)
    (home / "bin" / "version.txt").write_text(version_text)
    return Compiler(nvcc, home, {})


def read_entries(root: Path, generation: Generation) -> dict[str, Entry]:
    """The entries that the recording compiler was asked for under ``root``; links to other caches' are not its own.

    Raises:
        PlanError: a folder whose name is not one of ``generation``.
    """
    found = {}
    for folder in _folders(root):
        if entry_files.kernel_name(generation, folder.name) is None:
            raise PlanError(f"wanted entries of the {generation} generation, found {folder.name}")
        found[folder.name] = _read(folder)
    return found


class Newcomers:
    """Entries as they come, while DeepGEMM still asks for more."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._seen: set[str] = set()

    def take(self) -> Iterator[Entry]:
        """Those that were not there before."""
        for folder in _folders(self._root):
            if folder.name not in self._seen:
                try:
                    entry = _read(folder)
                except FileNotFoundError:  # not whole yet
                    continue
                self._seen.add(folder.name)
                yield entry


def _folders(root: Path) -> list[Path]:
    folders = sorted((root / "cache").iterdir()) if (root / "cache").is_dir() else []
    return [folder for folder in folders if not folder.is_symlink()]


def _read(folder: Path) -> Entry:
    metadata = folder / entry_files.METADATA
    return Entry(
        name=folder.name,
        source=(folder / entry_files.SOURCE).read_text(),
        arguments=(folder / "command.txt").read_text().rstrip("\n"),
        metadata=metadata.read_text() if metadata.exists() else None,
    )
