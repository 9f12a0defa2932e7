"""The one zstd frame that an artifact is: unpacked in parts, within limits that hold before memory is allocated."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import zstandard

from cachebuilder.errors import ArtifactError

_MAX_UNPACKED_BYTES = 4 << 30
#: Unpacked to packed. Real caches have 14 to 60 (many similar kernels pack best); zstd itself reaches 30,000.
_MAX_RATIO = 500
#: Anything this small may have any ratio.
_SMALL_BYTES = 16 << 20
#: zstd -19 uses windows up to 8 MiB; a larger one would only make a reader allocate memory.
_MAX_WINDOW_BYTES = 8 << 20
#: Given to zstd at once. A block of 4 bytes may unpack to 128 KiB (RFC 8878, 3.1.1.2), so 512 make 16 MiB at most.
_INPUT_BYTES = 512


def unpacked(file: BinaryIO, path: Path) -> Iterator[bytes]:
    """The bytes inside an artifact's frame, in parts of at most 16 MiB, from the start of ``file``.

    Args:
        path: what errors call the file.

    Raises:
        ArtifactError: not a zstd frame, or one that is truncated, damaged, too large or followed by other bytes.
    """
    try:
        packed = file.seek(0, os.SEEK_END)
        file.seek(0)
        part = file.read(_INPUT_BYTES)
        size = zstandard.get_frame_parameters(part).content_size
        if not 0 < size <= _MAX_UNPACKED_BYTES:
            raise ArtifactError(f"{path}: wanted up to {_MAX_UNPACKED_BYTES} bytes unpacked, found {size}")
        if size > max(_SMALL_BYTES, packed * _MAX_RATIO):
            raise ArtifactError(
                f"{path}: wanted at most {_MAX_RATIO} bytes unpacked for each one packed, found {size} for {packed}"
            )
        frame = zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW_BYTES).decompressobj()
        while part:
            yield frame.decompress(part)
            if frame.eof:
                break
            part = file.read(_INPUT_BYTES)
        rest = frame.unused_data or file.read(1)
    except zstandard.ZstdError as error:
        raise ArtifactError(f"{path}: wanted a zstd-compressed artifact: {error}") from None
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be read: {error.strerror}") from error
    if not frame.eof:
        raise ArtifactError(f"{path}: truncated: the file ends before its zstd frame does")
    if rest:
        raise ArtifactError(f"{path}: wanted one zstd frame, found something behind it")
