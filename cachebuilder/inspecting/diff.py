"""Compares two caches: fingerprints field by field, kernels by their keys and their bytes."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from cachebuilder.artifact.index import CACHE, Fingerprint, Index
from cachebuilder.artifact.read import read_index
from cachebuilder.common.folders import Folder
from cachebuilder.common.records import Record
from cachebuilder.deepgemm import entries as entry_files
from cachebuilder.errors import ArtifactError
from cachebuilder.restoring import baked
from cachebuilder.restoring.compatibility import Difference, between
from cachebuilder.restoring.folder import RestoredFolder, open_folder

#: An entry's files: name → sha256.
_Files = Mapping[str, str]


@dataclass(frozen=True)
class Side:
    """One of the two caches: an artifact as its index says, or a restored folder, whose files are hashed."""

    path: Path
    fingerprints: tuple[Fingerprint, ...]
    kernels: Mapping[str, _Files]


class FieldDifference(Record):
    """A field of the fingerprint that differs, with its value on each side."""

    field: str
    a: object
    b: object

    def short(self) -> tuple[str, str]:
        """Both values in one line each."""
        return Difference(field=self.field, wanted=self.a, found=self.b, causes_miss=False, remedy="").short()


class ChangedEntry(Record):
    """An entry that is on both sides, and the names of its files that differ."""

    entry: str
    files: tuple[str, ...]


class Comparison(Record):
    """``diff --json``: how A and B differ; every list is sorted.

    Attributes:
        same: nothing differs.
        fingerprint: in the order of the fingerprint's fields.
        equal: entries that are on both sides with equal bytes.
    """

    same: bool
    fingerprint: tuple[FieldDifference, ...]
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    equal: tuple[str, ...]
    changed: tuple[ChangedEntry, ...]


def read(path: Path) -> Side:
    """The artifact or the restored folder at ``path``. Raises `ArtifactError` where it is neither, or damaged."""
    if path.is_dir():
        folder = open_folder(path)
        fingerprints = tuple(artifact.index.fingerprint for artifact in folder.artifacts)
        kernels: dict[str, _Files] = {entry: _files_on_disk(folder, entry) for entry in folder.entries}
        kernels |= {
            name: files for artifact in folder.artifacts for name, files in _listed(artifact.index, CACHE).items()
        }
        return Side(path, fingerprints, kernels)
    index = read_index(path)
    return Side(path, (index.fingerprint,), _listed(index))


def _listed(index: Index, *left_out: str) -> dict[str, _Files]:
    """The files of each entry as an index lists them; FlashInfer's and baked ones by their folder's path below DIR."""
    files: dict[str, _Files] = {
        entry.name if folder == CACHE else f"{folder}/{entry.name}": {file.name: file.sha256 for file in entry.files}
        for folder, entries in index.folders.items()
        if folder not in left_out
        for entry in entries
    }
    for file in index.baked.files if index.baked else ():
        folder, _, name = f"{baked.FOLDER}/{file.path}".rpartition("/")
        files[folder] = {**files.get(folder, {}), name: file.sha256}
    return files


def compare(a: Side, b: Side) -> Comparison:
    """How ``a`` and ``b`` differ. Of folders with several artifacts, the nearest two fingerprints are compared."""
    differences = min((between(left, right) for left in a.fingerprints for right in b.fingerprints), key=len)
    only_a, only_b = (tuple(sorted(x.kernels.keys() - y.kernels.keys())) for x, y in ((a, b), (b, a)))
    both = sorted(a.kernels.keys() & b.kernels.keys())
    changed_files = {entry: _changed(a.kernels[entry], b.kernels[entry]) for entry in both}
    changed = tuple(ChangedEntry(entry=entry, files=files) for entry, files in changed_files.items() if files)
    return Comparison(
        same=not (differences or only_a or only_b or changed),
        fingerprint=tuple(FieldDifference(field=d.field, a=d.wanted, b=d.found) for d in differences),
        only_a=only_a,
        only_b=only_b,
        equal=tuple(entry for entry in both if not changed_files[entry]),
        changed=changed,
    )


def _changed(a: _Files, b: _Files) -> tuple[str, ...]:
    return tuple(sorted(name for name in a.keys() | b.keys() if a.get(name) != b.get(name)))


def _files_on_disk(folder: RestoredFolder, entry: str) -> dict[str, str]:
    generation = folder.artifacts[0].index.fingerprint.generation
    digests = {}
    try:
        with Folder.at(folder.cache) as cache, cache.open(entry) as opened:
            for name in entry_files.FILES[generation]:
                with contextlib.suppress(FileNotFoundError):
                    digests[name] = hashlib.sha256(opened.read(name, entry_files.MAX_BYTES[name])).hexdigest()
    except OSError as error:
        raise ArtifactError(f"{error.filename}: cannot be read: {error.strerror}") from error
    return digests
