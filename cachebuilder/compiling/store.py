"""A local, content-addressed store of compiled kernels: a rebuild compiles only what changed."""

from __future__ import annotations

import hashlib
from pathlib import Path

from cachebuilder.common.cache import cache_folder
from cachebuilder.common.files import write_atomically
from cachebuilder.common.kept import touch
from cachebuilder.errors import InstallationError


class CubinStore:
    """Cubins, each under the digest of everything that its bytes depend on.

    A file holds the sha256 of a cubin and then the cubin. It is written whole or not at all, so builds may share a
    store. A damaged file counts as missing.

    Args:
        folder: None for the user's cache folder.
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
        """Store a cubin. Raises `InstallationError` if it cannot be written."""
        write_atomically(self._path(key), hashlib.sha256(cubin).digest() + cubin, InstallationError)


class NoStore(CubinStore):
    """A store that keeps nothing, so that every kernel is compiled."""

    def get(self, key: str) -> bytes | None:
        """Return None."""
        return None

    def put(self, key: str, cubin: bytes) -> None:
        """Do nothing."""
