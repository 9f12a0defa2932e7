"""The recording compiler, which compiles nothing: it writes down DeepGEMM's requests, and this module reads them."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cachebuilder.deepgemm import entries as entry_files
from cachebuilder.deepgemm.generation import Generation
from cachebuilder.errors import PlanError
from cachebuilder.sweep.process import Compiler

_TICK_NANOSECONDS = 20_000_000
_RECORDER = Path(__file__).parent / "recording_nvcc.sh"


@dataclass(frozen=True)
class RecordedEntry:
    """One cache entry as DeepGEMM requested it, with a placeholder for the cubin.

    Attributes:
        name: the entry's folder in the cache, which is the kernel's key.
        kernel_name: DeepGEMM's name for the kernel, which is part of `name`.
        source: ``kernel.cu``.
        arguments: nvcc's command line after the compiler's own name, joined by spaces, as DeepGEMM wrote it.
        metadata: ``meta.json``, in the generation that has one.
    """

    name: str
    kernel_name: str
    source: str
    arguments: str
    metadata: str | None


def recording_compiler(scratch: Path, version_text: str) -> Compiler:
    """A compiler, made in ``scratch``, that records each request and answers ``--version`` with ``version_text``."""
    home = scratch / "cuda"
    (home / "bin").mkdir(parents=True)
    nvcc = home / "bin" / "nvcc"
    shutil.copyfile(_RECORDER, nvcc)
    nvcc.chmod(0o755)
    (home / "bin" / "version.txt").write_text(version_text)
    return Compiler(nvcc, home)


def read_entries(root: Path, generation: Generation) -> dict[str, RecordedEntry]:
    """The entries that DeepGEMM requested under the cache root ``root``, by name; links to other caches are skipped.

    Raises:
        PlanError: a folder whose name is not one of ``generation``.
    """
    return {folder.name: _read(folder, generation) for folder in _folders(root)}


class Newcomers:
    """The entries under a cache root as they appear, while DeepGEMM is still adding more."""

    def __init__(self, root: Path, generation: Generation) -> None:
        self._root = root
        self._generation = generation
        self._seen: set[str] = set()
        self._settled: int | None = None  # when the folder last changed, if all of that was seen

    def take(self) -> Iterator[RecordedEntry]:
        """Entries that no earlier call returned. Raises as `read_entries` does."""
        try:
            changed, now = (self._root / "cache").stat().st_mtime_ns, time.time_ns()
        except FileNotFoundError:
            return
        if changed == self._settled:
            return
        # Two changes within one tick of the file system's clock have the same time.
        self._settled = changed if now - changed > _TICK_NANOSECONDS else None
        for folder in _folders(self._root):
            if folder.name not in self._seen:
                try:
                    entry = _read(folder, self._generation)
                except FileNotFoundError:  # DeepGEMM is still writing it
                    self._settled = None
                    continue
                self._seen.add(folder.name)
                yield entry


def _folders(root: Path) -> list[Path]:
    folders = sorted((root / "cache").iterdir()) if (root / "cache").is_dir() else []
    return [folder for folder in folders if not folder.is_symlink()]


def _read(folder: Path, generation: Generation) -> RecordedEntry:
    kernel_name = entry_files.kernel_name(generation, folder.name)
    if kernel_name is None:
        raise PlanError(f"wanted entries of the {generation} generation, found {folder.name}")
    metadata = folder / entry_files.METADATA
    text = metadata.read_text() if metadata.exists() else None
    if text is not None and (refusal := entry_files.hook_refusal(folder.name, text)):
        raise PlanError(refusal, hint="leave the op that asks for it out of the manifest, or take another DeepGEMM")
    return RecordedEntry(
        name=folder.name,
        kernel_name=kernel_name,
        source=(folder / entry_files.SOURCE).read_text(),
        arguments=(folder / "command.txt").read_text().rstrip("\n"),
        metadata=text,
    )
