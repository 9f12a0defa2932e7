"""Read an artifact's index without unpacking it."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import zstandard
from pydantic import ValidationError

from cachebuilder.artifact.index import Index
from cachebuilder.artifact.pack import INDEX
from cachebuilder.errors import ArtifactError

#: No index of a real cache comes near: 10,000 kernels make about 10 MB.
_MAX_INDEX_BYTES = 64 << 20
_MAX_UNPACKED_BYTES = 4 << 30
#: zstd -19 uses windows up to 8 MiB; larger ones are a way to make a reader allocate.
_MAX_WINDOW_BYTES = 8 << 20
#: Fed at once. A block of 4 bytes may unpack to 128 KiB (RFC 8878, 3.1.1.2), so this many make 16 MiB at most.
_INPUT_BYTES = 512
_TAR_BLOCK = 512


def read_index(path: Path) -> Index:
    """The index: the artifact's first member. The rest is decompressed and thrown away: a cut or flipped one is told.

    Raises:
        ArtifactError: not an artifact, damaged, or of another schema version.
    """
    found = bytearray()
    wanted = _TAR_BLOCK
    try:
        with path.open("rb") as file:
            for part in unpacked(file, path):
                if len(found) < wanted:
                    found += part
                if wanted == _TAR_BLOCK and len(found) >= _TAR_BLOCK:
                    wanted += _index_size(bytes(found[:_TAR_BLOCK]), path)
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be read: {error.strerror}") from error
    if len(found) < wanted or wanted == _TAR_BLOCK:
        raise ArtifactError(f"{path}: wanted {INDEX} of {wanted} bytes, found {len(found)}")
    return parse_index(bytes(found[_TAR_BLOCK:wanted]), path)


def unpacked(file: BinaryIO, path: Path) -> Iterator[bytes]:
    """The bytes inside the artifact's one zstd frame, in parts of at most 16 MiB; nothing may follow the frame.

    Raises:
        ArtifactError: not a zstd frame, one that is cut, damaged, too large or followed by anything.
    """
    start = file.read(_INPUT_BYTES)
    try:
        size = zstandard.get_frame_parameters(start).content_size
        if not 0 < size <= _MAX_UNPACKED_BYTES:
            raise ArtifactError(f"{path}: wanted up to {_MAX_UNPACKED_BYTES} bytes unpacked, found {size}")
        frame = zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW_BYTES).decompressobj()
        while start:
            yield frame.decompress(start)
            if frame.eof:
                break
            start = file.read(_INPUT_BYTES)
    except zstandard.ZstdError as error:
        raise ArtifactError(f"{path}: wanted a zstd-compressed artifact: {error}") from None
    if not frame.eof:
        raise ArtifactError(f"{path}: truncated: the file ends before its zstd frame does")
    if frame.unused_data or file.read(1):
        raise ArtifactError(f"{path}: wanted one zstd frame, found something behind it")


def parse_index(data: bytes, path: Path) -> Index:
    """The index in ``data``; raises as `read_index` does."""
    try:
        return Index.model_validate_json(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "index"
        if where == "schema_version":
            raise ArtifactError(
                f"{path}: wanted artifact schema 1, found {first['input']!r}",
                hint="read it with the cachebuilder version that wrote it",
            ) from None
        raise ArtifactError(f"{path}: {INDEX}: {where}: {first['msg']}") from None


def _index_size(header: bytes, path: Path) -> int:
    try:
        member = tarfile.TarInfo.frombuf(header, "utf-8", "strict")
    except (tarfile.HeaderError, UnicodeDecodeError):
        raise ArtifactError(f"{path}: wanted a tar inside, found none") from None
    if member.name != INDEX or not member.isreg():
        raise ArtifactError(f"{path}: wanted {INDEX} as the first member, found {member.name!r}")
    if not 0 < member.size <= _MAX_INDEX_BYTES:
        raise ArtifactError(f"{path}: wanted an index of at most {_MAX_INDEX_BYTES} bytes, found {member.size}")
    return member.size
