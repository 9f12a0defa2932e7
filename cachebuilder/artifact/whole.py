"""An artifact, or what lies beside it, read once and whole, into memory."""

from __future__ import annotations

import os
from pathlib import Path

from cachebuilder.artifact.read import open_file
from cachebuilder.errors import ArtifactError, SignatureError

#: The artifact is held in memory while its signature is checked. 20,000 kernels pack to under 100 MB.
MAX_ARTIFACT_BYTES = 1 << 30


def read_bytes(path: Path) -> bytes:
    """All of an artifact, read once. Raises `ArtifactError` where it cannot be, or is larger than any artifact."""
    with open_file(path) as file:
        return _read(path, file.fileno(), MAX_ARTIFACT_BYTES)


def read_beside(path: Path, most: int) -> bytes | None:
    """A small file beside an artifact; None where there is none. Raises `SignatureError` where it cannot be read."""
    if not os.path.lexists(path):
        return None
    try:
        with open_file(path) as file:
            return _read(path, file.fileno(), most)
    except ArtifactError as error:
        raise SignatureError(str(error)) from None


def _read(path: Path, handle: int, most: int) -> bytes:
    size = os.fstat(handle).st_size
    if size > most:
        raise ArtifactError(f"{path}: wanted at most {most} bytes, found {size}")
    parts, left = [], size + 1
    try:
        while left and (part := os.read(handle, min(left, MAX_ARTIFACT_BYTES))):
            parts.append(part)
            left -= len(part)
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be read: {error.strerror}") from error
    if left != 1:
        raise ArtifactError(f"{path}: wanted a file at rest, found one that is being written")
    return b"".join(parts)
