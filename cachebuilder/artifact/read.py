"""Read an artifact's index without unpacking it."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import zstandard
from pydantic import ValidationError

from cachebuilder.artifact.index import SCHEMA_VERSION, Index
from cachebuilder.artifact.pack import INDEX
from cachebuilder.errors import ArtifactError

#: No index of a real cache comes near: 10,000 kernels make about 10 MB.
_MAX_INDEX_BYTES = 64 << 20
#: zstd -19 uses windows up to 8 MiB (window log 23); larger ones are a way to make a reader allocate.
_MAX_WINDOW_BYTES = 1 << 27


def read_index(path: Path) -> Index:
    """The index: the artifact's first member.

    Raises:
        ArtifactError: not an artifact, damaged up to there, or of another schema version.
    """
    try:
        with path.open("rb") as file:
            decompressor = zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW_BYTES)
            with decompressor.stream_reader(file) as stream:
                header = _read_exactly(stream, 512, path)
                data = _read_exactly(stream, _index_size(header, path), path)
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be read: {error.strerror}") from error
    except zstandard.ZstdError as error:
        raise ArtifactError(f"{path}: wanted a zstd-compressed artifact: {error}") from None
    return parse_index(data, path)


def parse_index(data: bytes, path: Path) -> Index:
    """The index in ``data``; raises as `read_index` does."""
    try:
        return Index.model_validate_json(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "index"
        if where == "schema_version":
            raise ArtifactError(
                f"{path}: wanted artifact schema {SCHEMA_VERSION}, found {first['input']!r}",
                hint="read it with the cachebuilder version that wrote it",
            ) from None
        raise ArtifactError(f"{path}: {INDEX}: {where}: {first['msg']}") from None


def _read_exactly(stream: zstandard.ZstdDecompressionReader, size: int, path: Path) -> bytes:
    data = io.BytesIO()
    while data.tell() < size:
        part = stream.read(min(size - data.tell(), 1 << 20))
        if not part:
            raise ArtifactError(f"{path}: truncated: wanted {size} bytes, found {data.tell()}")
        data.write(part)
    return data.getvalue()


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
