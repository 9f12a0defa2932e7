"""A restored folder on disk: which artifacts are in it, and whether its entries are still undamaged."""

from __future__ import annotations

import hashlib
import subprocess
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from cachebuilder.artifact.index import CACHE, Index
from cachebuilder.artifact.read import parse_index
from cachebuilder.errors import ArtifactError
from cachebuilder.restoring.frozen import FOLDER, files, frozen_nvcc

#: What to do with a folder whose entries are damaged.
RESTORE_AGAIN = "remove the damaged entries and restore the artifact again"


@dataclass(frozen=True)
class RestoredArtifact:
    """One artifact in a restored folder: the stem of its two files' names, its index after relocation, its manifest."""

    stem: str
    index: Index
    manifest: bytes


@dataclass(frozen=True)
class Damage:
    """One file that differs from its index; ``file`` is None where the whole entry is missing."""

    entry: str
    file: str | None
    wanted: str
    found: str

    def __str__(self) -> str:
        where = f"{self.entry}/{self.file}" if self.file else self.entry
        return f"{where}: wanted {self.wanted}, found {self.found}"


@dataclass(frozen=True)
class RestoredFolder:
    """A folder that ``cachebuilder restore`` wrote into, with the artifacts in it."""

    path: Path
    artifacts: tuple[RestoredArtifact, ...]

    @property
    def cache(self) -> Path:
        """The folder of entries."""
        return self.path / CACHE

    @property
    def indexes(self) -> list[Index]:
        """The index of every artifact in it."""
        return [artifact.index for artifact in self.artifacts]

    @cached_property
    def entries(self) -> frozenset[str]:
        """Names of all folders in the cache: the artifacts' entries, and those that others made there."""
        try:
            return frozenset(entry.name for entry in self.cache.iterdir() if entry.is_dir())
        except FileNotFoundError:
            return frozenset()
        except OSError as error:
            raise ArtifactError(f"{self.cache}: cannot be read: {error.strerror}") from error

    @cached_property
    def listed(self) -> frozenset[str]:
        """Names of all entries that an index lists."""
        return frozenset(entry.name for artifact in self.artifacts for entry in artifact.index.entries)

    def compiler_text(self) -> str:
        """What the frozen nvcc answers to ``--version``. Raises `ArtifactError` if it is missing or does not run."""
        nvcc = frozen_nvcc(self.path)
        hint = "restore the artifact again"
        try:
            answer = subprocess.run(
                [nvcc.absolute(), "--version"],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                check=False,
                timeout=60,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise ArtifactError(f"{nvcc}: the frozen nvcc does not run: {error}", hint=hint) from None
        text = answer.stdout.decode(errors="replace")
        if answer.returncode:
            raise ArtifactError(f"{nvcc}: wanted the recorded version text, found {text[:200]!r}", hint=hint)
        return text

    def damage(self) -> list[Damage]:
        """Every missing entry, then every file of a listed entry that is missing or differs from its index, sorted."""
        expected = {
            (entry.name, file.name): file
            for artifact in self.artifacts
            for entry in artifact.index.entries
            for file in entry.files
        }
        damage = [Damage(entry, None, "an entry", "none") for entry in sorted(self.listed - self.entries)]
        for (entry, name), file in sorted(expected.items()):
            if entry not in self.entries:
                continue
            path = self.cache / entry / name
            try:
                if path.is_symlink() or not path.is_file():
                    damage.append(Damage(entry, name, "a file", "something else" if path.exists() else "none"))
                    continue
                data = path.read_bytes()
            except OSError as error:
                damage.append(Damage(entry, name, "a file", f"{error.strerror}"))
                continue
            if len(data) != file.size:
                damage.append(Damage(entry, name, f"{file.size} bytes", f"{len(data)}"))
            elif (digest := hashlib.sha256(data).hexdigest()) != file.sha256:
                damage.append(Damage(entry, name, f"sha256 {file.sha256[:16]}…", f"{digest[:16]}…"))
        return damage


def own_files(
    index: Index, packed: bytes, manifest: bytes, restored: bytes | None = None
) -> dict[str, tuple[bytes, int]]:
    """The files beside ``cache/`` in a folder with one artifact: path below the folder → bytes and mode.

    They are to be written in this order: the index is last, since it says that everything else is complete.

    Args:
        packed: the index's bytes in the artifact. Their digest is part of the files' names.
        restored: the index's bytes with the entries' names in this folder; default: ``packed``.
    """
    digest = index.fingerprint_digest
    stem = f"{FOLDER}/artifacts/{digest}.{hashlib.sha256(packed).hexdigest()[:16]}"
    return files(index.fingerprint.compiler, index.name, digest) | {
        f"{stem}.yaml": (manifest, 0o644),
        f"{stem}.json": (restored or packed, 0o644),
    }


def is_restored(path: Path) -> bool:
    """Whether ``path`` is a folder that an artifact was restored into."""
    return (path / FOLDER / "artifacts").is_dir()


def open_folder(path: Path) -> RestoredFolder:
    """The restored folder at ``path``.

    Raises:
        ArtifactError: nothing was restored there, or an index or a manifest in it is damaged.
    """
    indexes = sorted((path / FOLDER / "artifacts").glob("*.json"))
    if not indexes:
        raise ArtifactError(
            f"{path}: wanted an artifact or a folder that one was restored into, found no cachebuilder/artifacts",
            hint=f"cachebuilder restore ARTIFACT --to {path}",
        )
    artifacts = []
    hint = f"restore its artifact into {path} again"
    for file in indexes:
        try:
            index = parse_index(file.read_bytes(), file)
            manifest = file.with_suffix(".yaml").read_bytes()
        except ArtifactError as error:
            raise ArtifactError(str(error), hint=error.hint or hint) from None
        except OSError as error:
            raise ArtifactError(f"{error.filename}: cannot be read: {error.strerror}", hint=hint) from error
        if (digest := hashlib.sha256(manifest).hexdigest()) != index.manifest:
            yaml = file.with_suffix(".yaml")
            raise ArtifactError(f"{yaml}: wanted sha256 {index.manifest}, found {digest}", hint=hint)
        artifacts.append(RestoredArtifact(file.stem, index, manifest))
    return RestoredFolder(path.absolute(), tuple(artifacts))
