"""Read an artifact from front to back; whatever it says is untrusted until it has been checked.

The reader takes exactly what `artifact.pack` writes: one zstd frame, in it a ustar of regular files, the index first,
then the manifest, then every file of the index once and nothing else. All limits are checked before the memory they
limit is allocated. The reader writes nothing.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from cachebuilder.artifact import baked
from cachebuilder.artifact.frame import unpacked
from cachebuilder.artifact.index import CACHE, INDEX, MANIFEST, Entry, FlashInferPart, Index, Member
from cachebuilder.artifact.tar import TarReader
from cachebuilder.artifact.whole import open_file
from cachebuilder.common import records
from cachebuilder.common.records import RecordError
from cachebuilder.deepgemm import entries as entry_files
from cachebuilder.errors import ArtifactError
from cachebuilder.flashinfer import entries as flashinfer_files

#: 20,000 kernels make about 20 MB.
MAX_INDEX_BYTES = 32 << 20
#: Objects and lists in an index, and values in them, which bound what JSON becomes in memory: with these limits, less
#: than 300 MB. A kernel of a real index has up to 14 objects and lists, and up to 33 values.
_MAX_INDEX_NESTED = _MAX_INDEX_VALUES = 1 << 20
MAX_MANIFEST_BYTES = 4 << 20

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


class Archive:
    """An artifact opened for one pass: from a file, or from bytes whose signature was checked.

    Attributes:
        index: the index, checked against itself and against the grammar of cache entries.
        index_bytes: the same as packed.
        manifest: the manifest's bytes as given to the build; set once `files` is asked for the first file.
    """

    def __init__(self, file: BinaryIO, path: Path) -> None:
        """Read the index. Errors call the artifact ``path``; raises as `open_archive` does."""
        self._parts = unpacked(file, path)
        self._tar = TarReader(self._parts, path)
        name, size = self._tar.header()
        if name != INDEX:
            raise self._tar.error(f"wanted {INDEX} as the first member, found {name!r}")
        if not 0 < size <= MAX_INDEX_BYTES:
            raise self._tar.error(f"wanted an index of at most {MAX_INDEX_BYTES} bytes, found {size}")
        self.index_bytes = self._tar.body(size)
        self.index = parse_index(self.index_bytes, path)

    def drain(self) -> None:
        """Decompress the rest and throw it away. Raises `ArtifactError` where it is truncated or a bit is flipped."""
        for _ in self._parts:
            pass

    def files(self) -> Iterator[tuple[Member, bytes]]:
        """Every file of every entry, its bytes checked against the index; ``manifest`` is set before the first.

        They come in the order of `Index.members`: an entry's marker is its last. Only when the iterator ends, and for
        an artifact with baked caches that of `baked_files`, has the whole archive been checked.

        Raises:
            ArtifactError: at the first byte that is not as `artifact.pack` would have written it.
        """
        self.manifest = self._manifest()
        for kind, members in self.index.members():
            left = {member.path: member for member in members}
            while left:
                name, size = self._tar.header()
                if name not in left:
                    raise self._tar.error(self._why_not(name, kind, len(left)))
                member = left.pop(name)
                file = member.file
                if size != file.size:
                    raise self._tar.error(f"{name}: wanted {file.size} bytes, found {size}")
                data = self._tar.body(size)
                digest = hashlib.sha256(data).hexdigest()
                if digest != file.sha256:
                    raise self._tar.error(f"{name}: wanted sha256 {file.sha256}, found {digest}")
                yield member, data
        if self.index.baked is None:
            self._tar.end()

    def baked_files(self) -> Iterator[tuple[str, bytes]]:
        """The sha256 and the bytes of each baked file, after the last of `files`; none where nothing was baked.

        Raises:
            ArtifactError: as `files` does.
        """
        if self.index.baked is None:
            return
        for sha256, wanted_size in self.index.baked.members():
            wanted = f"{baked.MEMBERS}/{sha256}"
            name, size = self._tar.header()
            if (name, size) != (wanted, wanted_size):
                found = f"{name!r} of {size}" if name else "the end: truncated"
                raise self._tar.error(f"wanted {wanted} of {wanted_size} bytes, found {found}")
            data = self._tar.body(size)
            if (digest := hashlib.sha256(data).hexdigest()) != sha256:
                raise self._tar.error(f"{name}: wanted sha256 {sha256}, found {digest}")
            yield sha256, data
        self._tar.end()

    def check(self) -> None:
        """Read every file and throw it away. Raises `ArtifactError` as `files` does."""
        for _ in self.files():
            pass
        for _ in self.baked_files():
            pass

    def _manifest(self) -> bytes:
        name, size = self._tar.header()
        if name != MANIFEST:
            raise self._tar.error(f"wanted {MANIFEST} as the second member, found {name!r}")
        if size > MAX_MANIFEST_BYTES:
            raise self._tar.error(f"wanted a manifest of at most {MAX_MANIFEST_BYTES} bytes, found {size}")
        manifest = self._tar.body(size)
        if (digest := hashlib.sha256(manifest).hexdigest()) != self.index.manifest:
            raise self._tar.error(f"{MANIFEST}: wanted sha256 {self.index.manifest}, found {digest}")
        return manifest

    def _why_not(self, name: str, kind: str, left: int) -> str:
        """What is wrong with a member's name, where one of the ``left`` files called ``kind`` should come."""
        entries = {entry.name for entry in self.index.entries}
        folder, entry, file = [*name.split("/", 2), "", ""][:3]
        if name == "":
            return f"truncated: {left} files of the index are missing"
        if name.startswith("/"):
            why = "an absolute path"
        elif {"..", "."} & set(name.split("/")):
            why = "a path that leaves its folder"
        elif folder == CACHE and entry in entries and file == kind:
            why = "the same name a second time"
        elif folder == CACHE and entry in entries and file in entry_files.FILES[self.index.fingerprint.generation]:
            why = f"out of order, or a second time: {left} {kind} come first"
        elif name.casefold() in {f"{CACHE}/{e}/{kind}".casefold() for e in entries}:
            why = "a name of the index in other case"
        elif entry and entry_files.kernel_name(self.index.fingerprint.generation, entry) is None:
            why = f"not a name of a {self.index.fingerprint.generation} entry"
        else:
            why = "not in the index"
        return f"wanted the files of the index, found member {name!r}: {why}"


@contextmanager
def open_archive(path: Path) -> Iterator[Archive]:
    """Open an artifact and check its index. Raises `ArtifactError` if it is not an artifact of this schema version."""
    with open_file(path) as file:
        yield Archive(file, path)


def read_index(path: Path) -> Index:
    """The index of an artifact that is whole: raises as `open_archive` and `Archive.drain` do."""
    with open_archive(path) as archive:
        archive.drain()
        return archive.index


def parse_index(data: bytes, path: Path) -> Index:
    """The index in ``data``, checked against itself and the grammar of cache entries; raises `ArtifactError`."""
    if data.count(b"{") + data.count(b"[") > _MAX_INDEX_NESTED:
        raise ArtifactError(f"{path}: {INDEX}: wanted at most {_MAX_INDEX_NESTED} objects and lists, found more")
    if (values := data.count(b",")) > _MAX_INDEX_VALUES:  # each value but the first is behind a comma
        raise ArtifactError(f"{path}: {INDEX}: wanted at most {_MAX_INDEX_VALUES} values, found about {values}")
    try:
        index = records.read(Index, data)
    except RecordError as error:
        if error.where == "schema_version":
            raise ArtifactError(
                f"{path}: artifact schema: {error.why}", hint="read it with the cachebuilder version that wrote it"
            ) from None
        raise ArtifactError(f"{path}: {INDEX}: {error}") from None
    if problem := _problem(index):
        raise ArtifactError(f"{path}: {INDEX}: {problem}")
    return index


def _is_printable(value: object) -> bool:
    """Whether every text in a value from JSON is a line of printable characters."""
    if isinstance(value, dict):
        return all(map(_is_printable, [*value.keys(), *value.values()]))
    if isinstance(value, list | tuple):
        return all(map(_is_printable, value))
    return not isinstance(value, str) or value.isprintable()


def _problem(index: Index) -> str | None:
    """What is wrong with an index of the right shape."""
    fingerprint = index.fingerprint
    if not _NAME.fullmatch(index.name):
        return f"name: wanted letters, digits, '.', '_' and '-', found {index.name[:100]!r}"
    schema_version = 3 if index.baked else 2 if index.flashinfer else 1
    if index.schema_version != schema_version:
        return f"schema_version: wanted {schema_version} for what the index holds, found {index.schema_version}"
    if len(fingerprint.compiler) > 4096:
        return "fingerprint.compiler: wanted the text of nvcc --version, found more than 4096 characters"
    if len(fingerprint.legacy_flags or "") > 4096:  # a relocation hashes them for every entry
        return "fingerprint.legacy_flags: wanted nvcc's flags, found more than 4096 characters"
    if not _is_printable(index.ops):
        return "ops: wanted printable text, found control characters"
    if index.fingerprint_digest != fingerprint.digest():
        return f"fingerprint_digest: wanted {fingerprint.digest()}, found {index.fingerprint_digest}"
    generation = fingerprint.generation
    bounds = {file: entry_files.MAX_BYTES[file] for file in entry_files.FILES[generation]}
    for entry in index.entries:
        if entry_files.kernel_name(generation, entry.name) is None:
            return f"entries: wanted names of {generation} entries, found {entry.name[:200]!r}"
        if problem := _wrong_files(entry, bounds):
            return problem
    if problem := _twice(index.entries, "entries"):
        return problem
    if index.flashinfer and (problem := _flashinfer_problem(index.flashinfer)):
        return problem
    return baked.problem(index.baked) if index.baked else None


def _flashinfer_problem(part: FlashInferPart) -> str | None:
    if not _is_printable(part.gemms):
        return "flashinfer.gemms: wanted printable text, found control characters"
    if not re.fullmatch(r"\d{1,3}\.\d{1,3}", part.fingerprint.glibc):
        return f"flashinfer.fingerprint.glibc: wanted major.minor, found {part.fingerprint.glibc[:100]!r}"
    for module in part.modules:
        if not flashinfer_files.is_module(module.name):
            return f"flashinfer.modules: wanted names of modules, found {module.name[:200]!r}"
        file = flashinfer_files.module_file(module.name)
        if problem := _wrong_files(module, {file: flashinfer_files.MAX_MODULE_BYTES}):
            return problem
    for entry in part.entries:
        if not flashinfer_files.is_entry(entry.name):
            return f"flashinfer.entries: wanted names of the GEMM's entries, found {entry.name[:200]!r}"
        if problem := _wrong_files(entry, flashinfer_files.MAX_BYTES):
            return problem
    return _twice(part.modules, "flashinfer.modules") or _twice(part.entries, "flashinfer.entries")


def _wrong_files(entry: Entry, bounds: Mapping[str, int]) -> str | None:
    """What is wrong with an entry's files; ``bounds`` has their names in order, and the most bytes of each."""
    if tuple(file.name for file in entry.files) != tuple(bounds):
        return f"{entry.name}: wanted the files {', '.join(bounds)}, found {[f.name[:100] for f in entry.files]}"
    if large := next((file for file in entry.files if file.size > bounds[file.name]), None):
        return f"{entry.name}/{large.name}: wanted at most {bounds[large.name]} bytes, found {large.size}"
    return None


def _twice(entries: Sequence[Entry], where: str) -> str | None:
    """Which entry is there twice, or beside one whose name differs in case only."""
    seen: dict[str, str] = {}
    for entry in entries:
        if other := seen.get(key := entry.name.casefold()):
            kind = "twice" if other == entry.name else f"beside {other}, which differs in case only"
            return f"{where}: found {entry.name} {kind}"
        seen[key] = entry.name
    return None
