"""A process that serves: the folder to serve from, checked, and the whole environment of the process."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

from cachebuilder.artifact.index import Index
from cachebuilder.artifact.whole import open_file
from cachebuilder.common.cache import own_folder as cache_subfolder
from cachebuilder.common.kept import touch
from cachebuilder.common.locks import lock
from cachebuilder.errors import VerifyError
from cachebuilder.restoring.environment import Engine, variables
from cachebuilder.restoring.folder import RESTORE_AGAIN, RestoredFolder, open_folder


def own_folder(artifact: Path) -> Path:
    """The folder in the user's cache folder for these bytes of an artifact: no two artifacts share one."""
    with open_file(artifact) as file:
        return cache_subfolder("restored") / hashlib.file_digest(file, "sha256").hexdigest()[:16]


def open_whole(dir: Path) -> RestoredFolder:
    """The restored folder at ``dir``, with every byte of its entries checked.

    From a cubin that is cut short, the GPU's driver makes an error, a crash or a process that hangs.

    Raises:
        ArtifactError: nothing was restored there, or an index or a manifest in it is damaged.
        VerifyError: an entry is damaged.
    """
    folder = open_folder(dir)
    if damage := folder.damage():
        more = f" and {len(damage) - 1} more" if damage[1:] else ""
        raise VerifyError(f"{folder.path}: damaged: {damage[0]}{more}", hint=RESTORE_AGAIN)
    return folder


def keep_in_use(dir: Path) -> None:
    """Lock ``dir`` for this process and for the program that it becomes, so that `cache prune` leaves it alone."""
    touch(dir)
    handle = os.open(dir, os.O_RDONLY | os.O_DIRECTORY)
    os.set_inheritable(handle, True)  # the lock ends when the program ends
    lock(handle, shared=True)


def process_environment(dir: Path, indexes: Sequence[Index], engine: Engine, scratch: Path | None) -> dict[str, str]:
    """This process's environment with the variables to serve from ``dir``; arguments and errors as of `variables`."""
    serving = variables(dir, indexes, engine, scratch, os.environ)
    return os.environ | {variable.name: variable.value for variable in serving}
