"""The user's cache folder, which holds only what can be made again, and the working folders inside it."""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cachebuilder.common.files import is_full
from cachebuilder.common.folders import Folder, is_safe, others_may_write
from cachebuilder.common.locks import lock
from cachebuilder.errors import InstallationError


def cache_folder() -> Path:
    """``$CACHEBUILDER_CACHE_DIR``, else ``$XDG_CACHE_HOME/cachebuilder``, else ``~/.cache/cachebuilder``.

    Raises:
        InstallationError: no variable names it and the user has no home folder.
    """
    if own := os.environ.get("CACHEBUILDER_CACHE_DIR"):
        return Path(own).absolute()
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base) / "cachebuilder"
    try:
        return Path.home() / ".cache" / "cachebuilder"
    except RuntimeError:
        # A container may run as a user that has no name and no home. A folder in /tmp will not do: another user could
        # have made it before.
        raise InstallationError(
            "wanted a home folder for the cache, found no HOME", hint="set CACHEBUILDER_CACHE_DIR to a folder"
        ) from None


def open_own(*names: str) -> Folder:
    """Open a folder in the user's cache folder, which is made if it is missing.

    What is in the cache folder is loaded and executed. So no user but this one and root may be able to change it: each
    folder from the cache folder down is opened by its handle and checked.

    Raises:
        InstallationError: it cannot be made, or another user can write to it.
    """
    root = cache_folder()
    try:
        folder = Folder.make_at(root, exact=False)
        _require_safe(folder, is_root=True)
        for name in names:
            with folder:
                inner = folder.make(name, exact=False)
            folder = inner
            _require_safe(folder)
    except OSError as error:
        raise InstallationError(
            f"{error.filename or root}: cannot be made: {error.strerror}",
            hint="set CACHEBUILDER_CACHE_DIR to a folder that can be written",
        ) from error
    return folder


def own_folder(*names: str) -> Path:
    """The path of a folder in the user's cache folder. Makes, checks and raises as `open_own` does."""
    with open_own(*names) as folder:
        return folder.path


def _require_safe(folder: Folder, *, is_root: bool = False) -> None:
    """Raise `InstallationError` if another user can change what is in the folder.

    Earlier versions let the umask decide about the modes of the folders inside; those are corrected here.
    """
    status = folder.status()
    # In a folder with the sticky bit, such as /tmp, nobody can rename or remove what is ours.
    if is_safe(status) or (is_root and status.st_mode & stat.S_ISVTX and not folder.is_foreign()):
        return
    if folder.is_foreign():
        with folder:
            raise InstallationError(
                f"{folder.path}: wanted a cache folder of this user, found one of user {status.st_uid}",
                hint="set CACHEBUILDER_CACHE_DIR to a folder of your own, or remove this one",
            )
    if is_root and others_may_write(status):
        with folder:
            raise InstallationError(
                f"{folder.path}: wanted a cache folder that only this user can write to, found mode "
                f"{stat.S_IMODE(status.st_mode):04o}",
                hint=f"chmod go-w {folder.path}, or set CACHEBUILDER_CACHE_DIR to a folder of your own",
            )
    if others_may_write(status):
        os.fchmod(folder.handle, stat.S_IMODE(status.st_mode) & ~0o022)


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """A new working folder, removed afterwards. First removes working folders that killed processes left.

    Raises:
        InstallationError: it cannot be made, or the disk is full while it is used.
    """
    with open_own("scratch") as root:
        for name in root.names():
            _remove_if_abandoned(root, name)
        folder = Path(tempfile.mkdtemp(dir=root.path))
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    lock(handle)
    try:
        yield folder
    except OSError as error:
        if not is_full(error):
            raise
        raise InstallationError(
            f"{root.path}: cannot be written: {error.strerror}",
            hint="make room, or set CACHEBUILDER_CACHE_DIR to a folder on another disk",
        ) from error
    finally:
        try:
            shutil.rmtree(folder, ignore_errors=True)
        except KeyboardInterrupt:  # Ctrl-C while the folder is being removed: remove the rest before stopping
            shutil.rmtree(folder, ignore_errors=True)
            raise
        finally:
            os.close(handle)


def _remove_if_abandoned(root: Folder, name: str) -> None:
    """Remove a working folder if no process has it locked."""
    with contextlib.suppress(OSError), root.open(name) as folder:  # another process may have removed it meanwhile
        # Between making its folder and locking it, a process looks as if it had abandoned the folder: the minimum age
        # protects new folders.
        if lock(folder.handle) and time.time() - folder.status().st_mtime > 60:
            folder.clear()
            root.rmdir(name)
