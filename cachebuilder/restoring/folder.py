"""A restored folder on disk: which artifacts are in it, and whether its entries are still undamaged."""

from __future__ import annotations

import hashlib
import stat
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from cachebuilder.artifact.index import CACHE, Index
from cachebuilder.artifact.read import MAX_INDEX_BYTES, MAX_MANIFEST_BYTES, open_archive, parse_index
from cachebuilder.common.folders import Folder
from cachebuilder.errors import ArtifactError
from cachebuilder.restoring import damage as damages
from cachebuilder.restoring.damage import Damage
from cachebuilder.restoring.flashinfer_files import own_files_of
from cachebuilder.restoring.frozen import FOLDER, VERSION, files, frozen_nvcc, version_text

#: What to do with a folder whose entries are damaged.
RESTORE_AGAIN = "remove what is damaged and restore the artifact again"
_RESTORE_INTO_AGAIN = "restore the artifact again"


@dataclass(frozen=True)
class RestoredArtifact:
    """One artifact in a restored folder: the stem of its two files' names, its index after relocation, its manifest."""

    stem: str
    index: Index
    manifest: bytes


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
            with Folder.at(self.path) as dir, dir.open(CACHE) as cache:
                return frozenset(name for name in cache.names() if stat.S_ISDIR(cache.status(name).st_mode))
        except FileNotFoundError:
            return frozenset()
        except OSError as error:
            raise ArtifactError(f"{self.cache}: cannot be read: {error.strerror}") from error

    @cached_property
    def listed(self) -> frozenset[str]:
        """Names of all entries that an index lists."""
        return frozenset(entry.name for artifact in self.artifacts for entry in artifact.index.entries)

    def require_restored(self, artifact: Path) -> None:
        """Raise `ArtifactError` if ``artifact`` is not one of those that were restored here, or cannot be read."""
        with open_archive(artifact) as archive:
            stem = _stem(archive.index, archive.index_bytes)
        if stem not in {f"{FOLDER}/artifacts/{one.stem}" for one in self.artifacts}:
            names = ", ".join(sorted({index.name for index in self.indexes}))
            raise ArtifactError(
                f"{artifact}: wanted an artifact that was restored in {self.path}, found another one; there: {names}",
                hint=f"cachebuilder restore {artifact} --to {self.path}",
            )

    def compiler_text(self) -> str:
        """What the frozen nvcc answers to ``--version``: its text is read, and nothing is run.

        Raises:
            ArtifactError: the text is missing or cannot be read.
        """
        text_file = frozen_nvcc(self.path).with_name(VERSION)
        reason = "there is none"
        try:
            if (text := version_text(self.path)) is not None:
                return text
        except OSError as error:
            reason = str(error.strerror)
        raise ArtifactError(f"{text_file}: the frozen nvcc's text cannot be read: {reason}", hint=_RESTORE_INTO_AGAIN)

    def damage(self) -> list[Damage]:
        """Every file of a listed entry, and every one of our own, that is not as it was restored."""
        try:
            with Folder.at(self.path) as dir:
                return damages.find(dir, self.indexes)
        except OSError as error:
            raise ArtifactError(f"{self.path}: cannot be read: {error.strerror}") from error


def own_files(
    index: Index, packed: bytes, manifest: bytes, restored: bytes | None = None
) -> dict[str, tuple[bytes, int]]:
    """The files beside ``cache/`` in a folder with one artifact: path below the folder → bytes and mode.

    They are to be written in this order: the index is last, since it says that everything else is complete.

    Args:
        packed: the index's bytes in the artifact. Their digest is part of the files' names.
        restored: the index's bytes with the entries' names in this folder; default: ``packed``.
    """
    digest, stem = index.fingerprint_digest, _stem(index, packed)
    own = files(index.fingerprint.compiler, index.name, digest) | own_files_of(index.flashinfer)
    return own | {
        f"{stem}.yaml": (manifest, 0o644),
        f"{stem}.json": (restored or packed, 0o644),
    }


def _stem(index: Index, packed: bytes) -> str:
    """The path below the folder of an artifact's index and manifest, without their suffixes."""
    return f"{FOLDER}/artifacts/{index.fingerprint_digest}.{hashlib.sha256(packed).hexdigest()[:16]}"


def is_restored(path: Path) -> bool:
    """Whether ``path`` is a folder that an artifact was restored into."""
    return (path / FOLDER / "artifacts").is_dir()


def open_folder(path: Path) -> RestoredFolder:
    """The restored folder at ``path``.

    Raises:
        ArtifactError: nothing was restored there, or an index or a manifest in it is damaged.
    """
    hint = f"restore its artifact into {path} again"
    try:
        with Folder.at(path) as dir, dir.open(FOLDER) as own, own.open("artifacts") as folder:
            stems = [name.removesuffix(".json") for name in folder.names() if name.endswith(".json")]
            artifacts = [_open_artifact(folder, stem) for stem in stems if not stem.startswith(".")]
    except FileNotFoundError:
        artifacts = []
    except ArtifactError as error:
        raise ArtifactError(str(error), hint=error.hint or hint) from None
    except OSError as error:
        raise ArtifactError(f"{error.filename}: cannot be read: {error.strerror}", hint=hint) from error
    if not artifacts:
        raise ArtifactError(
            f"{path}: wanted an artifact or a folder that one was restored into, found no cachebuilder/artifacts",
            hint=f"cachebuilder restore ARTIFACT --to {path}",
        )
    return RestoredFolder(path.absolute(), tuple(artifacts))


def _open_artifact(folder: Folder, stem: str) -> RestoredArtifact:
    index = parse_index(folder.read(f"{stem}.json", MAX_INDEX_BYTES), folder.path / f"{stem}.json")
    try:
        manifest = folder.read(f"{stem}.yaml", MAX_MANIFEST_BYTES)
    except FileNotFoundError as error:
        raise ArtifactError(f"{error.filename}: cannot be read: {error.strerror}") from error
    if (digest := hashlib.sha256(manifest).hexdigest()) != index.manifest:
        raise ArtifactError(f"{folder.path / stem}.yaml: wanted sha256 {index.manifest}, found {digest}")
    return RestoredArtifact(stem, index, manifest)
