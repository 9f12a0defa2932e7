"""A local, content-addressed store of compiled kernels: a rebuild compiles only what changed."""

from __future__ import annotations

import hashlib
from pathlib import Path

from cachebuilder.common.cache import cache_folder
from cachebuilder.common.files import write_atomically
from cachebuilder.common.kept import touch
from cachebuilder.errors import InstallationError


class CubinStore:
    """Cubins by the digest of all that their bytes depend on.

    Each file is the sha256 of a cubin followed by the cubin, written whole or not at all: many builds may share a
    store, and a damaged file is a miss.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder or cache_folder() / "cubins"

    def _path(self, key: str) -> Path:
        return self._folder / key[:2] / key

    def get(self, key: str) -> bytes | None:
        """The cubin, or None."""
        try:
            data = self._path(key).read_bytes()
        except FileNotFoundError:
            return None
        touch(self._path(key))
        digest, cubin = data[:32], data[32:]
        return cubin if hashlib.sha256(cubin).digest() == digest else None

    def put(self, key: str, cubin: bytes) -> None:
        """Keep a cubin."""
        write_atomically(self._path(key), hashlib.sha256(cubin).digest() + cubin, InstallationError)


class NoStore(CubinStore):
    """Keeps nothing: every kernel is compiled."""

    def get(self, key: str) -> bytes | None:
        """None."""
        return None

    def put(self, key: str, cubin: bytes) -> None:
        """Nothing."""
