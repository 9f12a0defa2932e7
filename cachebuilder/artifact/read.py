"""Read an artifact from front to back; whatever it says is untrusted until it has been checked.

The reader takes exactly what `artifact.pack` writes: one zstd frame, in it a ustar of regular files, the index first,
then the manifest, then every file of the index once and nothing else. All limits are checked before the memory they
stand for is allocated. It writes nothing.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import BinaryIO
from zlib import adler32

import zstandard

from cachebuilder.artifact.index import CACHE, INDEX, MANIFEST, Entry, File, Index
from cachebuilder.common import records
from cachebuilder.common.records import RecordError
from cachebuilder.deepgemm import entries as entry_files
from cachebuilder.errors import ArtifactError

#: 20,000 kernels make about 20 MB.
_MAX_INDEX_BYTES = 32 << 20
#: Objects and lists in an index: 1.3 for each kernel's selections, 6 for its files, and room. Bounds what JSON becomes
#: in memory.
_MAX_INDEX_NESTED = 1 << 20
_MAX_MANIFEST_BYTES = 4 << 20
_MAX_UNPACKED_BYTES = 4 << 30
#: Unpacked to packed. Real caches: 14 to 60 (many alike kernels pack best); zstd itself reaches 30,000.
_MAX_RATIO = 500
#: Under this the ratio is of no interest.
_SMALL_BYTES = 16 << 20
#: zstd -19 uses windows up to 8 MiB; larger ones are a way to make a reader allocate.
_MAX_WINDOW_BYTES = 8 << 20
#: Fed at once. A block of 4 bytes may unpack to 128 KiB (RFC 8878, 3.1.1.2), so this many make 16 MiB at most.
_INPUT_BYTES = 512
#: The same for an artifact that is about to be pushed: faster, and 256 MiB if somebody cheats himself.
_OWN_INPUT_BYTES = 8 << 10
_TAR_BLOCK = 512
_ZEROS = bytes(_TAR_BLOCK)
_MAGIC = b"ustar\x0000"
#: Of a header, from the type to the magic: a regular file that links to nothing.
_PLAIN_MIDDLE = b"0" + bytes(100) + _MAGIC
_PLAIN_END = bytes(12)
#: Zeros behind the last member: two blocks, and up to the end of a tar record.
_END_BYTES = range(2 * _TAR_BLOCK, 2 * _TAR_BLOCK + 10240)

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")

#: What else a tar can hold (POSIX pax, GNU tar), for the message.
_KINDS = {
    b"\0": "an old-style member",
    b"1": "a hard link",
    b"2": "a symbolic link",
    b"3": "a character device",
    b"4": "a block device",
    b"5": "a folder",
    b"6": "a FIFO",
    b"7": "a contiguous file",
    b"x": "a pax extension",
    b"g": "a global pax extension",
    b"L": "a GNU long name",
    b"K": "a GNU long link",
    b"S": "a sparse file",
}


class Archive:
    """An artifact opened for one pass. Made by `open_archive`, or from bytes that were checked before.

    Attributes:
        index: the index, checked against itself and against the cache's grammar.
        index_bytes: the same as packed.
        manifest: the manifest's bytes as given to the build.
    """

    def __init__(self, file: BinaryIO, path: Path, tee: Callable[[bytes], object] | None = None) -> None:
        """Read the index. ``tee``: called with each part of the tar; only for an artifact of one's own (`unpacked`)."""
        self._path = path
        self._parts = unpacked(file, path) if tee is None else _told(unpacked(file, path, _OWN_INPUT_BYTES), tee)
        self._held, self._position = b"", 0
        name, size = self._header()
        if name != INDEX:
            raise self._bad(f"wanted {INDEX} as the first member, found {name!r}")
        if not 0 < size <= _MAX_INDEX_BYTES:
            raise self._bad(f"wanted an index of at most {_MAX_INDEX_BYTES} bytes, found {size}")
        self.index_bytes = self._body(size)
        self.index = parse_index(self.index_bytes, path)

    def drain(self) -> None:
        """Decompress the rest and throw it away: a cut or flipped archive is told."""
        for _ in self._parts:
            pass

    def files(self) -> Iterator[tuple[Entry, File, bytes]]:
        """Every file of every entry, its bytes checked against the index; ``manifest`` is set before the first.

        All entries' first files come first, then all second ones, and so on: an entry's marker is its last.
        The archive is proven whole only when this ends.

        Raises:
            ArtifactError: at the first byte that is not as `artifact.pack` would have written it.
        """
        name, size = self._header()
        if name != MANIFEST:
            raise self._bad(f"wanted {MANIFEST} as the second member, found {name!r}")
        if size > _MAX_MANIFEST_BYTES:
            raise self._bad(f"wanted a manifest of at most {_MAX_MANIFEST_BYTES} bytes, found {size}")
        self.manifest = self._body(size)
        if (digest := hashlib.sha256(self.manifest).hexdigest()) != self.index.manifest:
            raise self._bad(f"{MANIFEST}: wanted sha256 {self.index.manifest}, found {digest}")
        for position, kind in enumerate(entry_files.FILES[self.index.fingerprint.generation]):
            wanted = {f"{CACHE}/{entry.name}/{kind}": (entry, entry.files[position]) for entry in self.index.entries}
            while wanted:
                name, size = self._header()
                if name not in wanted:
                    raise self._bad(self._why_not(name, kind, len(wanted)))
                entry, file = wanted.pop(name)
                if size != file.size:
                    raise self._bad(f"{name}: wanted {file.size} bytes, found {size}")
                data = self._body(size)
                digest = hashlib.sha256(data).hexdigest()
                if digest != file.sha256:
                    raise self._bad(f"{name}: wanted sha256 {file.sha256}, found {digest}")
                yield entry, file, data
        self._end()

    def _why_not(self, name: str, kind: str, left: int) -> str:
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
            why = "a case twin"
        elif entry and entry_files.kernel_name(self.index.fingerprint.generation, entry) is None:
            why = f"no name of a {self.index.fingerprint.generation} entry"
        else:
            why = "not in the index"
        return f"wanted the files of the index, found member {name!r}: {why}"

    def _header(self) -> tuple[str, int]:
        """Name and size of the next member; an empty name where the tar's end begins."""
        block = self._take(_TAR_BLOCK)
        if block == _ZEROS:
            return "", 0
        # The sum of all bytes, those of the checksum itself as spaces. Adler's low half is 1 and the sum of up to 256.
        found = (adler32(block[:256]) & 0xFFFF) + (adler32(block[256:]) & 0xFFFF) - 2
        if block[148:156] != b"%06o\0 " % (found - sum(block[148:156]) + 8 * 0x20):
            raise self._bad("wanted a tar inside, found a block whose checksum is wrong")
        if block[156:265] != _PLAIN_MIDDLE or block[500:] != _PLAIN_END:
            raise self._bad(self._why_not_plain(block))
        name = self._text(block[0:100])
        if block[345]:
            name = f"{self._text(block[345:500])}/{name}"
        if not name:
            raise self._bad("wanted a member's name, found none")
        size = block[124:135]
        if block[135] or not size.isdigit() or b"8" in size or b"9" in size:
            raise self._bad(f"{name!r}: wanted a size of eleven octal digits, found {block[124:136]!r}")
        return name, int(size, 8)

    def _why_not_plain(self, block: bytes) -> str:
        name, kind = self._text(block[0:100]), block[156:157]
        if block[257:265] != _MAGIC:
            return f"{name!r}: wanted a ustar header, found magic {block[257:265]!r}"
        if kind != b"0":
            return f"wanted regular files only, found {name!r}: {_KINDS.get(kind, f'a member of type {kind!r}')}"
        return f"{name!r}: wanted a plain header, found a link name or an extension"

    def _text(self, field: bytes) -> str:
        text = field.rstrip(b"\0")
        if b"\0" in text or not text.isascii():
            raise self._bad(f"wanted a name in ASCII, zeros behind it, found {field[:100]!r}")
        return text.decode()

    def _body(self, size: int) -> bytes:
        """The bytes of a member whose size has been checked against its limit; its padding is zeros."""
        data = self._take(size)
        if (padding := -size % _TAR_BLOCK) and self._take(padding) != _ZEROS[:padding]:
            raise self._bad("wanted zeros behind a member, found something")
        return data

    def _take(self, size: int) -> bytes:
        end = self._position + size
        if end <= len(self._held):
            data = self._held[self._position : end]
            self._position = end
            return data
        parts = [self._held[self._position :]]
        missing = size - len(parts[0])
        while missing > 0:
            part = next(self._parts, None)
            if part is None:
                raise self._bad("truncated: the tar inside ends too early")
            self._held, self._position = part, min(missing, len(part))
            parts.append(part[: self._position])
            missing -= len(part)
        return b"".join(parts)

    def _end(self) -> None:
        rest = 0
        part: bytes | None = self._held[self._position :]
        while part is not None:
            if part.strip(b"\0"):
                raise self._bad("wanted nothing behind the files of the index, found another member or other bytes")
            rest += len(part)
            if rest >= _END_BYTES.stop:
                raise self._bad(f"wanted less than {_END_BYTES.stop} zeros at the end, found more")
            part = next(self._parts, None)
        if rest not in _END_BYTES or rest % _TAR_BLOCK:
            raise self._bad(f"wanted a tar's end blocks, found {rest} zeros")

    def _bad(self, message: str) -> ArtifactError:
        return ArtifactError(f"{self._path}: {message}")


@contextmanager
def open_archive(path: Path) -> Iterator[Archive]:
    """Open an artifact and check its index; read the rest with `Archive.files`.

    Raises:
        ArtifactError: not an artifact, damaged, hostile, or of another schema version.
    """
    with open_file(path) as file:
        yield Archive(file, path)


@contextmanager
def open_file(path: Path) -> Iterator[BufferedReader]:
    """Open a regular file, whoever gave it. Raises `ArtifactError` where it is none or cannot be read."""
    try:
        # Without O_NONBLOCK, opening a FIFO waits for a writer.
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be read: {error.strerror}") from error
    with os.fdopen(handle, "rb") as file:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise ArtifactError(f"{path}: wanted a regular file")
        yield file


def read_index(path: Path) -> Index:
    """The index. The rest is decompressed and thrown away, so that a cut or flipped one is told.

    Raises:
        ArtifactError: not an artifact, damaged, or of another schema version.
    """
    with open_archive(path) as archive:
        archive.drain()
        return archive.index


def unpacked(file: BinaryIO, path: Path, input_bytes: int = _INPUT_BYTES) -> Iterator[bytes]:
    """The bytes inside the artifact's one zstd frame, in parts of at most 16 MiB; nothing may follow the frame.

    Args:
        input_bytes: fed at once; a part has at most 32 KiB for each of them.

    Raises:
        ArtifactError: not a zstd frame, one that is cut, damaged, too large or followed by anything.
    """
    try:
        packed = file.seek(0, os.SEEK_END)
        file.seek(0)
        start = file.read(input_bytes)
        size = zstandard.get_frame_parameters(start).content_size
        if not 0 < size <= _MAX_UNPACKED_BYTES:
            raise ArtifactError(f"{path}: wanted up to {_MAX_UNPACKED_BYTES} bytes unpacked, found {size}")
        if size > max(_SMALL_BYTES, packed * _MAX_RATIO):
            raise ArtifactError(
                f"{path}: wanted at most {_MAX_RATIO} bytes unpacked for each one packed, found {size} for {packed}"
            )
        frame = zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW_BYTES).decompressobj()
        while start:
            yield frame.decompress(start)
            if frame.eof:
                break
            start = file.read(input_bytes)
        behind = frame.unused_data or file.read(1)
    except zstandard.ZstdError as error:
        raise ArtifactError(f"{path}: wanted a zstd-compressed artifact: {error}") from None
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be read: {error.strerror}") from error
    if not frame.eof:
        raise ArtifactError(f"{path}: truncated: the file ends before its zstd frame does")
    if behind:
        raise ArtifactError(f"{path}: wanted one zstd frame, found something behind it")


def _told(parts: Iterator[bytes], tee: Callable[[bytes], object]) -> Iterator[bytes]:
    for part in parts:
        tee(part)
        yield part


def parse_index(data: bytes, path: Path) -> Index:
    """The index in ``data``, checked against itself and against the cache's grammar; raises as `read_index` does."""
    if data.count(b"{") + data.count(b"[") > _MAX_INDEX_NESTED:
        raise ArtifactError(f"{path}: {INDEX}: wanted at most {_MAX_INDEX_NESTED} objects and lists, found more")
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


def _problem(index: Index) -> str | None:
    """What is wrong with an index of the right shape."""
    fingerprint = index.fingerprint
    if not _NAME.fullmatch(index.name):
        return f"name: wanted letters, digits, '.', '_' and '-', found {index.name[:100]!r}"
    if "\0" in fingerprint.compiler or len(fingerprint.compiler) > 4096:
        return "fingerprint.compiler: wanted the text of nvcc --version"
    if len(fingerprint.legacy_flags or "") > 4096:  # every key of a legacy cache that moves is made of them
        return "fingerprint.legacy_flags: wanted nvcc's flags, found more than 4096 characters"
    if index.fingerprint_digest != fingerprint.digest():
        return f"fingerprint_digest: wanted {fingerprint.digest()}, found {index.fingerprint_digest}"
    files = entry_files.FILES[fingerprint.generation]
    seen: dict[str, str] = {}
    for entry in index.entries:
        if entry_files.kernel_name(fingerprint.generation, entry.name) is None:
            return f"entries: wanted names of {fingerprint.generation} entries, found {entry.name[:200]!r}"
        if tuple(file.name for file in entry.files) != files:
            return f"{entry.name}: wanted the files {', '.join(files)}, found {[f.name[:100] for f in entry.files]}"
        if large := next((file for file in entry.files if file.size > entry_files.MAX_BYTES[file.name]), None):
            most = entry_files.MAX_BYTES[large.name]
            return f"{entry.name}/{large.name}: wanted at most {most} bytes, found {large.size}"
        if other := seen.get(key := entry.name.casefold()):
            kind = "twice" if other == entry.name else f"beside {other}, which differs in case only"
            return f"entries: found {entry.name} {kind}"
        seen[key] = entry.name
    return None
