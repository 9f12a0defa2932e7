"""A tar read strictly: plain ustar headers of regular files, zeros where the format has padding, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from cachebuilder.errors import ArtifactError

_BLOCK = 512
_MAGIC = b"ustar\x0000"
#: A header from its type to its magic: a regular file that links to nothing.
_PLAIN_MIDDLE = b"0" + bytes(100) + _MAGIC
_PLAIN_END = bytes(12)
#: How many zeros end a tar: two blocks, and up to the end of a tar record.
_END_BYTES = range(2 * _BLOCK, 2 * _BLOCK + 10240)

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


class TarReader:
    """Reads the members of a tar one after the other, from the parts in which it comes.

    Every method raises `ArtifactError` at the first byte that is not as `artifact.pack` would have written it.

    Args:
        path: what errors call the tar.
    """

    def __init__(self, parts: Iterator[bytes], path: Path) -> None:
        self._parts = parts
        self._path = path
        self._part, self._position = b"", 0

    def header(self) -> tuple[str, int]:
        """Name and size of the next member; an empty name where the zeros at the end begin."""
        block = self._take(_BLOCK)
        if not any(block):
            return "", 0
        # The sum of all bytes, with the checksum's own eight taken as spaces (POSIX.1-2001, pax, "ustar").
        checksum = sum(block) - sum(block[148:156]) + 8 * ord(" ")
        if block[148:156] != b"%06o\0 " % checksum:
            raise self.error("wanted a tar inside, found a block whose checksum is wrong")
        if block[156:265] != _PLAIN_MIDDLE or block[500:] != _PLAIN_END:
            raise self.error(self._why_not_plain(block))
        name = self._text(block[0:100])
        if block[345]:
            name = f"{self._text(block[345:500])}/{name}"
        if not name:
            raise self.error("wanted a member's name, found none")
        size = block[124:135]
        if block[135] or not size.isdigit() or b"8" in size or b"9" in size:
            raise self.error(f"{name!r}: wanted a size of eleven octal digits, found {block[124:136]!r}")
        return name, int(size, 8)

    def body(self, size: int) -> bytes:
        """The bytes of the member whose header was read. The caller has checked ``size`` against its limit."""
        data = self._take(size)
        if any(self._take(-size % _BLOCK)):
            raise self.error("wanted zeros behind a member, found something else")
        return data

    def end(self) -> None:
        """Read what follows the last member: zeros only, and no more than a tar record takes."""
        part: bytes | None = self._part[self._position :]
        count = 0
        while part is not None:
            if part.strip(b"\0"):
                raise self.error("wanted nothing behind the files of the index, found another member or other bytes")
            count += len(part)
            if count >= _END_BYTES.stop:
                raise self.error(f"wanted less than {_END_BYTES.stop} zeros at the end, found more")
            part = next(self._parts, None)
        if count not in _END_BYTES or count % _BLOCK:
            raise self.error(f"wanted a tar's end blocks, found {count} zeros")

    def error(self, message: str) -> ArtifactError:
        """An error about this tar."""
        return ArtifactError(f"{self._path}: {message}")

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
            raise self.error(f"wanted a name in ASCII, zeros behind it, found {field[:100]!r}")
        return text.decode()

    def _take(self, size: int) -> bytes:
        taken = []
        while size:
            if self._position == len(self._part):
                part = next(self._parts, None)
                if part is None:
                    raise self.error("truncated: the tar inside ends too early")
                self._part, self._position = part, 0
            piece = self._part[self._position : self._position + size]
            self._position += len(piece)
            size -= len(piece)
            taken.append(piece)
        return b"".join(taken)
