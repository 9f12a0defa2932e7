"""Where cachebuilder keeps what it can make again, and where it works."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cachebuilder.errors import InstallationError


def cache_folder() -> Path:
    """``$CACHEBUILDER_CACHE_DIR``, else ``$XDG_CACHE_HOME/cachebuilder``, else ``~/.cache/cachebuilder``.

    Raises:
        InstallationError: there is no home.
    """
    if given := os.environ.get("CACHEBUILDER_CACHE_DIR"):
        return Path(given).absolute()
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base) / "cachebuilder"
    try:
        return Path.home() / ".cache" / "cachebuilder"
    except RuntimeError:  # a container's user without a name; a folder in /tmp could be made by others before
        raise InstallationError(
            "wanted a folder of the user's own, found no HOME", hint="set CACHEBUILDER_CACHE_DIR to one"
        ) from None


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """A fresh working folder, gone afterwards; what a killed process left of its own is swept away first."""
    root = cache_folder() / "scratch"
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InstallationError(
            f"{root}: cannot be made: {error.strerror}",
            hint="set CACHEBUILDER_CACHE_DIR to a folder that can be written",
        ) from error
    for left in root.iterdir():
        _remove_if_abandoned(left)
    folder = Path(tempfile.mkdtemp(dir=root))
    lock = _lock(folder)
    assert lock is not None, "a new folder is nobody else's"
    try:
        yield folder
    finally:
        try:
            shutil.rmtree(folder, ignore_errors=True)
        except KeyboardInterrupt:  # Ctrl-C in the middle of it: it ends what it began
            shutil.rmtree(folder, ignore_errors=True)
            raise
        finally:
            os.close(lock)


def _lock(folder: Path) -> int | None:
    """An exclusive lock on the folder itself: it ends with the process, however that ends."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        return None
    return handle


def _remove_if_abandoned(folder: Path) -> None:
    try:
        handle = _lock(folder)
    except OSError:  # gone meanwhile, or not a folder: another process's business
        return
    if handle is not None:
        # A folder between its making and its locking by another process looks the same, for microseconds; an age
        # bound keeps the two apart.
        if time.time() - folder.stat().st_mtime > 60:
            shutil.rmtree(folder, ignore_errors=True)
        os.close(handle)


def write_atomically(path: Path, data: bytes) -> None:
    """Put ``data`` at ``path`` whole or not at all, whatever was there; safe with many writers and a kill."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
