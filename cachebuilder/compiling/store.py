"""A local, content-addressed store of compiled kernels: a rebuild compiles only what changed."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

from cachebuilder.common.cache import open_own
from cachebuilder.common.folders import Folder, is_safe
from cachebuilder.common.results import Results
from cachebuilder.errors import InstallationError

#: Far more than any cubin has.
_MAX_BYTES = 256 << 20


class CubinStore:
    """Cubins, each under the digest of everything that its bytes depend on.

    A file holds the sha256 of a cubin and then the cubin. It is written whole or not at all, so builds may share a
    store. A damaged file counts as missing.

    Args:
        folder: None for the user's cache folder.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder

    def _open(self) -> Folder:
        return open_own("cubins") if self._folder is None else Folder.make_at(self._folder, exact=False)

    def get(self, key: str) -> bytes | None:
        """The cubin; None if it is missing, damaged, or could have been changed by another user."""
        with contextlib.suppress(FileNotFoundError), self._open() as store, store.open(key[:2]) as folder:
            data = folder.read_safe(key, _MAX_BYTES) if is_safe(folder.status()) else None
            if data is not None:
                os.utime(key, dir_fd=folder.handle)  # as `kept.touch` does
                digest, cubin = data[:32], data[32:]
                return cubin if hashlib.sha256(cubin).digest() == digest else None
        return None

    def get_all(self, keys: Sequence[str]) -> dict[str, bytes]:
        """Those of ``keys`` that the store has, with their cubins."""
        return {key: cubin for key in keys if (cubin := self.get(key)) is not None}

    def put(self, key: str, cubin: bytes) -> None:
        """Store a cubin. Raises `InstallationError` if it cannot be written."""
        try:
            with self._open() as store, store.make(key[:2], exact=False) as folder:
                folder.write(key, hashlib.sha256(cubin).digest() + cubin, 0o644)
        except OSError as error:
            raise InstallationError(f"{error.filename}: cannot be written: {error.strerror}") from error


class NoStore(CubinStore):
    """A store that keeps nothing, so that every kernel is compiled."""

    def get(self, key: str) -> bytes | None:
        """Return None."""
        return None

    def put(self, key: str, cubin: bytes) -> None:
        """Do nothing."""


class SharedCubins(CubinStore):
    """A store in front of one that other builders share: what the first has is not fetched from the second.

    Raises:
        TransferError: from every call: the shared store cannot be reached, or refuses.
        StoreError: from `put`: the shared store has another result for the same key.
    """

    def __init__(self, front: CubinStore, shared: Results) -> None:
        self._front, self._shared = front, shared

    def get(self, key: str) -> bytes | None:
        """As of `CubinStore`; from either store."""
        return self.get_all([key]).get(key)

    def get_all(self, keys: Sequence[str]) -> dict[str, bytes]:
        """As of `CubinStore`; from either store."""
        cubins = self._front.get_all(keys)
        own = {shared_name(key): cubin for key, cubin in cubins.items()}
        for name in self._shared.absent(list(own)):  # compiled before this store was shared
            self._shared.put(name, own[name])
        names = {shared_name(key): key for key in keys if key not in cubins}
        for name, cubin in self._shared.get(list(names)).items():
            cubins[names[name]] = cubin
            self._front.put(names[name], cubin)
        return cubins

    def put(self, key: str, cubin: bytes) -> None:
        """Store a cubin in both. The front comes first, so that nothing is lost if the shared store fails."""
        self._front.put(key, cubin)
        self._shared.put(shared_name(key), cubin)


def shared_name(key: str) -> str:
    """The name of a kernel's cubin in a shared store."""
    return f"kernels/{key[:2]}/{key}"
