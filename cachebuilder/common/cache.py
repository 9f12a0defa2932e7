"""Where cachebuilder keeps what it can make again, and where it works."""

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
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    lock(handle)
    try:
        yield folder
    finally:
        try:
            shutil.rmtree(folder, ignore_errors=True)
        except KeyboardInterrupt:  # Ctrl-C in the middle of it: it ends what it began
            shutil.rmtree(folder, ignore_errors=True)
            raise
        finally:
            os.close(handle)


def _remove_if_abandoned(folder: Path) -> None:
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:  # another process removed it meanwhile, or it is not a folder
        return
    try:
        # A folder that another process has just made and not locked yet looks abandoned for some microseconds: a
        # minimum age keeps the two apart.
        if lock(handle) and time.time() - os.fstat(handle).st_mtime > 60:
            shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(handle)
