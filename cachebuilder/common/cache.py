"""The user's cache folder, which holds only what can be made again, and the working folders inside it."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """A new working folder, removed afterwards. First removes working folders that killed processes left.

    Raises:
        InstallationError: it cannot be made.
    """
    root = cache_folder() / "scratch"
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InstallationError(
            f"{root}: cannot be made: {error.strerror}",
            hint="set CACHEBUILDER_CACHE_DIR to a folder that can be written",
        ) from error
    for other in root.iterdir():
        _remove_if_abandoned(other)
    folder = Path(tempfile.mkdtemp(dir=root))
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    lock(handle)
    try:
        yield folder
    finally:
        try:
            shutil.rmtree(folder, ignore_errors=True)
        except KeyboardInterrupt:  # Ctrl-C while the folder is being removed: remove the rest before stopping
            shutil.rmtree(folder, ignore_errors=True)
            raise
        finally:
            os.close(handle)


def _remove_if_abandoned(folder: Path) -> None:
    """Remove a working folder if no process has it locked."""
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:  # another process has removed it meanwhile, or it is not a folder
        return
    try:
        # Between making its folder and locking it, a process looks as if it had abandoned the folder: the minimum age
        # protects new folders.
        if lock(handle) and time.time() - os.fstat(handle).st_mtime > 60:
            shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(handle)
