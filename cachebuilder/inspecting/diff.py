"""Two caches side by side: fingerprints field by field, kernels by their key and their bytes."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from cachebuilder.artifact.index import Fingerprint
from cachebuilder.artifact.read import read_index
from cachebuilder.deepgemm import entries as entry_files
from cachebuilder.errors import ArtifactError
from cachebuilder.restoring.compatibility import Difference, between
from cachebuilder.restoring.folder import RestoredFolder, open_folder

#: An entry's files: name → sha256.
_Files = Mapping[str, str]


@dataclass(frozen=True)
class Side:
    """What one of the two is.

    Attributes:
        fingerprints: an artifact's one, or those of all artifacts in a restored folder.
        kernels: entry → its files' digests: an artifact's as indexed, a folder's as they lie on disk.
    """

    path: Path
    fingerprints: tuple[Fingerprint, ...]
    kernels: Mapping[str, _Files]


@dataclass(frozen=True)
class Comparison:
    """How A and B differ; every tuple is sorted.

    Attributes:
        fields: fields of the fingerprint that differ: ``wanted`` is A's value, ``found`` is B's.
        changed: entries in both with different bytes, each with the names of those files.
    """

    fields: tuple[Difference, ...]
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    equal: tuple[str, ...]
    changed: tuple[tuple[str, tuple[str, ...]], ...]

    @property
    def same(self) -> bool:
        """Whether nothing differs."""
        return not (self.fields or self.only_a or self.only_b or self.changed)


def read(path: Path) -> Side:
    """The artifact or restored folder at ``path``.

    Raises:
        ArtifactError: it is neither, or damaged.
    """
    if path.is_dir():
        folder = open_folder(path)
        fingerprints = tuple(artifact.index.fingerprint for artifact in folder.artifacts)
        return Side(path, fingerprints, {entry: _on_disk(folder, entry) for entry in folder.entries})
    index = read_index(path)
    kernels = {entry.name: {file.name: file.sha256 for file in entry.files} for entry in index.entries}
    return Side(path, (index.fingerprint,), kernels)


def compare(a: Side, b: Side) -> Comparison:
    """How ``a`` and ``b`` differ. Of folders with several artifacts, the nearest two fingerprints are compared."""
    fields = min((between(left, right) for left in a.fingerprints for right in b.fingerprints), key=len)
    both = sorted(a.kernels.keys() & b.kernels.keys())
    changed = {entry: _changed(a.kernels[entry], b.kernels[entry]) for entry in both}
    return Comparison(
        fields=tuple(fields),
        only_a=tuple(sorted(a.kernels.keys() - b.kernels.keys())),
        only_b=tuple(sorted(b.kernels.keys() - a.kernels.keys())),
        equal=tuple(entry for entry in both if not changed[entry]),
        changed=tuple((entry, files) for entry, files in changed.items() if files),
    )


def _changed(a: _Files, b: _Files) -> tuple[str, ...]:
    return tuple(sorted(name for name in a.keys() | b.keys() if a.get(name) != b.get(name)))


def _on_disk(folder: RestoredFolder, entry: str) -> dict[str, str]:
    generation = folder.artifacts[0].index.fingerprint.generation
    files = {name: folder.cache / entry / name for name in entry_files.FILES[generation]}
    try:
        return {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items() if path.is_file()}
    except OSError as error:
        raise ArtifactError(f"{error.filename}: cannot be read: {error.strerror}") from error
