"""A process that serves: the folder to serve from, checked, and the whole environment of the process."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Sequence
from pathlib import Path

from cachebuilder.artifact.index import CACHE, Index
from cachebuilder.artifact.whole import open_file
from cachebuilder.common.cache import own_folder as cache_subfolder
from cachebuilder.common.folders import Folder, others_may_write
from cachebuilder.common.kept import touch
from cachebuilder.common.locks import lock
from cachebuilder.errors import RestoreError, VerifyError
from cachebuilder.restoring.environment import Engine, variables
from cachebuilder.restoring.folder import RESTORE_AGAIN, RestoredFolder, open_folder

_OWN_SCRATCH = "name a folder of your own with --scratch"


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
    """This process's environment with the variables to serve from ``dir``; arguments as of `variables`.

    Raises:
        RestoreError: as `variables` does, or as `private_root` does.
    """
    if any(index.fingerprint.generation == "deepjit" for index in indexes):
        scratch = private_root(dir, scratch)
    serving = variables(dir, indexes, engine, scratch, os.environ)
    return os.environ | {variable.name: variable.value for variable in serving}


def private_root(dir: Path, scratch: Path | None) -> Path:
    """The writable root, which DeepGEMM reads before ``dir``: no other user may be able to put kernels there.

    It is made if it is missing. In a folder of this user or root that others may write to, it is a folder of this
    user's own.

    Args:
        scratch: the folder that the user named; None for ``dir/scratch``.

    Raises:
        RestoreError: it is another user's, or kernels in it are, or it cannot be made.
    """
    path = Path(os.path.abspath(scratch if scratch is not None else dir / "scratch"))
    try:
        with Folder.make_at(path.parent, exact=False) as parent, _enter(parent, path) as root:
            _require_own(root)
            if not others_may_write(root.status()):
                return path
            with root.make(f"private-{os.geteuid()}", 0o700) as private:
                _require_own(private)
                return private.path
    except OSError as error:
        if scratch is None and error.errno in (errno.EROFS, errno.EACCES, errno.EPERM) and not path.exists():
            return path  # nobody has put kernels there, and DeepGEMM reports that it cannot write
        raise RestoreError(
            f"{error.filename or path}: not a root that DeepGEMM can write to: {error.strerror}", hint=_OWN_SCRATCH
        ) from error


def _enter(parent: Folder, path: Path) -> Folder:
    """The folder at ``path``, which may be a link of this user or root; made for this user alone if it is missing."""
    try:
        if stat.S_ISLNK(parent.status(path.name).st_mode) and parent.status(path.name).st_uid in (0, os.geteuid()):
            return Folder.at(path)
    except FileNotFoundError:
        pass
    return parent.make(path.name, 0o700)


def _require_own(root: Folder) -> None:
    """Raise `RestoreError` if another user owns the root or something in its ``cache/``."""
    stranger = root.status().st_uid if root.is_foreign() else None
    if stranger is None:
        try:
            with root.open(CACHE) as cache:
                owners = {cache.status().st_uid, *(cache.status(name).st_uid for name in cache.names())}
                stranger = next(iter(owners - {0, os.geteuid(), root.status().st_uid}), None)
        except FileNotFoundError:
            pass
    if stranger is not None:
        raise RestoreError(
            f"{root.path}: wanted a writable root of this user, found one with files of user {stranger}, which "
            "DeepGEMM would load first",
            hint=_OWN_SCRATCH,
        )
