"""Files that anybody may have written: opened only if they are regular, and read whole up to a limit."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path

from cachebuilder.common.reading import open_regular
from cachebuilder.errors import ArtifactError, SignatureError

#: The artifact is held in memory while its signature is checked. 20,000 kernels pack to under 100 MB.
MAX_ARTIFACT_BYTES = 1 << 30


@contextmanager
def open_file(path: Path) -> Iterator[BufferedReader]:
    """Open a regular file. Raises `ArtifactError` where it is something else or cannot be read."""
    try:
        handle = open_regular(path)
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be read: {error.strerror}") from error
    with os.fdopen(handle, "rb") as file:
        yield file


def read_bytes(path: Path) -> bytes:
    """All of an artifact, read once. Raises `ArtifactError` where it cannot be read or is larger than any artifact."""
    with open_file(path) as file:
        return read_open(path, file.fileno(), MAX_ARTIFACT_BYTES)


def read_beside(path: Path, most: int) -> bytes | None:
    """A small file beside an artifact; None where there is none.

    Raises:
        SignatureError: it cannot be read, or has more than ``most`` bytes.
    """
    if not os.path.lexists(path):
        return None
    try:
        with open_file(path) as file:
            return read_open(path, file.fileno(), most)
    except ArtifactError as error:
        raise SignatureError(str(error)) from None


def read_open(path: Path, handle: int, most: int) -> bytes:
    """All of an open file. Raises `ArtifactError` where it cannot be read, or has more than ``most`` bytes."""
    size = os.fstat(handle).st_size
    if size > most:
        raise ArtifactError(f"{path}: wanted at most {most} bytes, found {size}")
    parts, left = [], size + 1
    try:
        while left and (part := os.read(handle, left)):
            parts.append(part)
            left -= len(part)
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be read: {error.strerror}") from error
    if left != 1:
        raise ArtifactError(f"{path}: its size changed while it was read: it is still being written")
    return b"".join(parts)
