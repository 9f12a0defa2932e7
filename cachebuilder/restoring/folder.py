"""A restored folder as it lies on disk: which artifacts are in it, and whether every byte still is."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from cachebuilder.artifact.index import CACHE, Index
from cachebuilder.artifact.read import parse_index
from cachebuilder.errors import ArtifactError
from cachebuilder.restoring.frozen import FOLDER, files, frozen_nvcc


@dataclass(frozen=True)
class RestoredArtifact:
    """One artifact that was restored: its index after relocation, and its manifest's bytes."""

    stem: str
    index: Index
    manifest: bytes


@dataclass(frozen=True)
class Damage:
    """One file that is not what the index says it is; ``file`` is None where the whole entry is gone."""

    entry: str
    file: str | None
    wanted: str
    found: str

    def __str__(self) -> str:
        where = f"{self.entry}/{self.file}" if self.file else self.entry
        return f"{where}: wanted {self.wanted}, found {self.found}"


@dataclass(frozen=True)
class RestoredFolder:
    """A folder that ``cachebuilder restore`` wrote, with every artifact in it."""

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
        """Names of all folders in the cache: the artifacts' entries, and what else was put there."""
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
        """What the frozen nvcc answers to ``--version``.

        Raises:
            ArtifactError: it is not there, or does not run.
        """
        import subprocess  # a restore, which needs `own_files` only, does not wait for it

        nvcc = frozen_nvcc(self.path)
        hint = "restore the artifact again"
        try:
            done = subprocess.run(
                [nvcc.absolute(), "--version"],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                check=False,
                timeout=60,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise ArtifactError(f"{nvcc}: wanted the frozen nvcc, it does not run: {error}", hint=hint) from None
        text = done.stdout.decode(errors="replace")
        if done.returncode:
            raise ArtifactError(f"{nvcc}: wanted the recorded version text, found {text[:200]!r}", hint=hint)
        return text

    def damage(self) -> list[Damage]:
        """Every file of every listed entry that is missing or has other bytes than its index says, sorted."""
        expected = {
            (entry.name, file.name): file
            for artifact in self.artifacts
            for entry in artifact.index.entries
            for file in entry.files
        }
        found = [Damage(entry, None, "an entry", "none") for entry in sorted(self.listed - self.entries)]
        for (entry, name), file in sorted(expected.items()):
            if entry not in self.entries:
                continue
            path = self.cache / entry / name
            try:
                if path.is_symlink() or not path.is_file():
                    found.append(Damage(entry, name, "a file", "something else" if path.exists() else "none"))
                    continue
                data = path.read_bytes()
            except OSError as error:
                found.append(Damage(entry, name, "a file", f"{error.strerror}"))
                continue
            if len(data) != file.size:
                found.append(Damage(entry, name, f"{file.size} bytes", f"{len(data)}"))
            elif (digest := hashlib.sha256(data).hexdigest()) != file.sha256:
                found.append(Damage(entry, name, f"sha256 {file.sha256[:16]}…", f"{digest[:16]}…"))
        return found


def own_files(
    index: Index, packed: bytes, manifest: bytes, restored: bytes | None = None
) -> dict[str, tuple[bytes, int]]:
    """What lies beside ``cache/`` in a folder with one artifact: each file's path below it, bytes and mode.

    In the order to write them: an index says that all else is there.

    Args:
        packed: the index's bytes in the artifact, which name it among others of its fingerprint.
        restored: those with the entries' names in this folder, where they are others.
    """
    digest = index.fingerprint_digest
    stem = f"{FOLDER}/artifacts/{digest}.{hashlib.sha256(packed).hexdigest()[:16]}"
    return files(index.fingerprint.compiler, index.name, digest) | {
        f"{stem}.yaml": (manifest, 0o644),
        f"{stem}.json": (restored or packed, 0o644),
    }


def is_restored(path: Path) -> bool:
    """Whether ``path`` is a folder that was restored into."""
    return (path / "cachebuilder" / "artifacts").is_dir()


def open_folder(path: Path) -> RestoredFolder:
    """The restored folder at ``path``.

    Raises:
        ArtifactError: nothing was restored there, or an index or a manifest in it is damaged.
    """
    indexes = sorted((path / "cachebuilder" / "artifacts").glob("*.json"))
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
