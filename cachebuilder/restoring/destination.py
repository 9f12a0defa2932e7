"""DIR while a restore writes it: no reader and no other restore ever sees half an entry."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from cachebuilder.artifact.index import CACHE, Entry
from cachebuilder.common.files import make_folders, write_new
from cachebuilder.common.locks import lock
from cachebuilder.errors import RestoreError
from cachebuilder.restoring import frozen

_FOLDER_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


@dataclass
class Destination:
    """DIR while it is written: entries are made in a working folder under it, then renamed into ``cache/``.

    In the end the working folder is removed; without `keep`, so are the folders that did not exist before.

    Attributes:
        made: names of the entries that were made, in order.
    """

    to: Path
    made: list[str] = field(default_factory=list)
    _new_folders: list[Path] = field(default_factory=list)
    _work: int | None = None
    _work_path: Path | None = None
    _cache: int | None = None
    _kept: bool = False

    def __enter__(self) -> Destination:
        cache = self.to / CACHE
        try:
            self._cache = os.open(cache, _FOLDER_FLAGS)
        except FileNotFoundError:
            pass
        except NotADirectoryError:
            if cache.is_symlink():
                raise RestoreError(
                    f"{cache}: wanted a folder or nothing, found a link", hint="make DIR itself the link"
                ) from None
            raise
        return self

    def entries(self) -> set[str]:
        """The names in ``cache/`` now."""
        return set(os.listdir(self._cache)) if self._cache is not None else set()

    def new(self, name: str) -> None:
        """Begin an entry."""
        if self._work is None:
            self._make_work()
        os.mkdir(name, 0o755, dir_fd=self._work)
        os.chmod(name, 0o755, dir_fd=self._work)  # whatever the umask
        self.made.append(name)

    def write(self, name: str, file: str, data: bytes) -> None:
        """Write one file of an entry that was begun."""
        write_new(f"{name}/{file}", data, 0o644, self._work)

    def holds(self, name: str, entry: Entry) -> bool:
        """Whether ``cache/`` has this entry, with equal bytes and no other file."""
        try:
            folder = os.open(name, _FOLDER_FLAGS, dir_fd=self._cache)
        except OSError:
            return False
        try:
            if set(os.listdir(folder)) != {file.name for file in entry.files}:
                return False
            return all(_equal(folder, file.name, file.size, file.sha256) for file in entry.files)
        finally:
            os.close(folder)

    def publish(self, entries: dict[str, Entry]) -> dict[str, bool]:
        """Rename every entry that was made into ``cache/``.

        Returns:
            The entries that another restore put there first, and whether each is equal.
        """
        if self._cache is None:
            self._new_folders += make_folders(self.to / CACHE)
            self._cache = os.open(self.to / CACHE, _FOLDER_FLAGS)
        made_by_others: dict[str, bool] = {}
        for name in self.made:
            try:
                os.rename(name, name, src_dir_fd=self._work, dst_dir_fd=self._cache)
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                    raise
                made_by_others[name] = self.holds(name, entries[name])
        return made_by_others

    def keep(self) -> None:
        """Everything that was made stays."""
        self._kept = True

    def __exit__(self, *_: object) -> None:
        if self._work is not None and self._work_path is not None:
            for name in os.listdir(self._work):
                shutil.rmtree(name, ignore_errors=True, dir_fd=self._work)
            with contextlib.suppress(OSError):
                self._work_path.rmdir()
            os.close(self._work)
        _remove_root(self.to / frozen.FOLDER / "tmp")
        if self._cache is not None:
            os.close(self._cache)
        if not self._kept:
            for folder in reversed(self._new_folders):
                with contextlib.suppress(OSError):
                    folder.rmdir()

    def _make_work(self) -> None:
        root = self.to / frozen.FOLDER / "tmp"
        with self._locked(root) as handle:
            _sweep(handle)
            name = f"{os.getpid()}-{os.urandom(8).hex()}"
            os.mkdir(name, 0o700, dir_fd=handle)
            self._work_path = root / name
            self._work = os.open(name, _FOLDER_FLAGS, dir_fd=handle)
            lock(self._work)

    @contextlib.contextmanager
    def _locked(self, root: Path) -> Iterator[int]:
        """Lock ``root``: a restore that sweeps it then never meets a working folder that is not locked yet."""
        for _ in range(100):
            self._new_folders += make_folders(root)
            try:
                handle = os.open(root, _FOLDER_FLAGS)
            except FileNotFoundError:  # another restore has just removed it
                continue
            try:
                lock(handle, wait=True)
                with contextlib.suppress(FileNotFoundError):
                    if os.path.samestat(os.fstat(handle), os.stat(root)):
                        yield handle
                        return
            finally:
                os.close(handle)
        raise RestoreError(f"{root}: cannot be made: other restores keep removing it", hint="restore again")


def _remove_root(root: Path) -> None:
    """Remove the folder of working folders and what killed restores left in it, unless another restore works there."""
    with contextlib.suppress(OSError):
        handle = os.open(root, _FOLDER_FLAGS)
        try:
            if lock(handle):
                _sweep(handle)
                root.rmdir()
        finally:
            os.close(handle)


def _sweep(root: int) -> None:
    """Remove the working folders whose lock no restore holds: killed restores left them."""
    for name in os.listdir(root):
        with contextlib.suppress(OSError):
            folder = os.open(name, _FOLDER_FLAGS, dir_fd=root)
            try:
                if lock(folder):
                    shutil.rmtree(name, ignore_errors=True, dir_fd=root)
            finally:
                os.close(folder)


def _equal(folder: int, name: str, size: int, sha256: str) -> bool:
    try:
        handle = os.open(name, _FILE_FLAGS, dir_fd=folder)
    except OSError:
        return False
    with os.fdopen(handle, "rb") as file:
        if os.fstat(handle).st_size != size:
            return False
        return hashlib.file_digest(file, "sha256").hexdigest() == sha256
