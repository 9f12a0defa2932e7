"""A folder kept at the artifact that a source stands for; the working one serves until the next one is whole.

DIR::

    current -> generations/000007-…     what serves; moved by one rename
    generations/<number>-<version>/     restored folders; the newest has the highest number
    .fetched/                           artifacts that are being fetched

With keys, a generation holds the artifact that it was restored from, and its signature (`generations.py`).

Any number of syncs may work in one folder, on one machine or on many that share it. None depends on a lock or on a
clock: each makes a generation under a name of its own, then renames it into place, and moves the link by a rename. Two
syncs make equal folders of the same version, and the first one to finish wins. A lock only shows that what a sync makes
was not left by a killed one.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from cachebuilder.artifact.trust import Trust
from cachebuilder.common.folders import Folder, WrongFile
from cachebuilder.errors import CacheBuilderError, RestoreError, TransferError
from cachebuilder.restoring.machine import Machine
from cachebuilder.restoring.restore import Restored, restore
from cachebuilder.ship import generations
from cachebuilder.ship.download import Target
from cachebuilder.ship.fetch import Located
from cachebuilder.ship.generations import Generations

CURRENT, GENERATIONS = "current", "generations"
_FETCHED = ".fetched"
#: How often a source is followed that changes while it is fetched.
_ROUNDS = 3


@dataclass(frozen=True)
class Synced:
    """What a sync did.

    Attributes:
        generation: the folder that ``current`` is now.
        restored: the restore that made the generation; None where it existed already.
        removed: names of the older generations that were removed.
        stale: why the source could not be reached, where ``current`` was allowed to stay.
    """

    generation: Path
    changed: bool = False
    restored: Restored | None = None
    removed: tuple[str, ...] = ()
    stale: TransferError | None = None


class SyncedFolder:
    """A folder that syncs keep.

    Args:
        machine: what will serve; a generation that does not fit it is made anew.
        trust: the keys, one of which must have signed each artifact. A generation that none of them signed is made
            anew.
        force: work in folders of another user as well.
    """

    def __init__(self, to: Path, machine: Machine, trust: Trust | None = None, *, force: bool = False) -> None:
        self.path = Path(os.path.abspath(to))
        self._machine = machine
        self._trust = trust
        self._force = force

    def current(self) -> Path | None:
        """The generation that serves; None where there is none, or it is damaged, does not fit or is not trusted."""
        with contextlib.suppress(OSError), Folder.at(self.path) as root:
            name = _serving(root)
            with root.open(GENERATIONS) as folder:
                if name is not None and Generations(folder, self._machine, self._trust).is_usable(name):
                    return self._path(name)
        return None

    def sync(self, look_up: Callable[[], Located], *, keep: int = 3, allow_stale: bool = False) -> Synced:
        """Bring the folder to the artifact that the source stands for now. If that fails, ``current`` stays.

        Args:
            look_up: what the source stands for. It is asked again after a fetch, and a source that has changed
                meanwhile is followed, so that the slower of two syncs does not put the older version back.
            keep: how many generations stay, the current one among them.
            allow_stale: where the source cannot be reached, a usable ``current`` is good enough.

        Raises:
            TransferError: the source cannot be reached, or gives something else than it announced.
            SignatureError, ArtifactError, CompatibilityError: the artifact must not be used here.
            RestoreError: the folder cannot be written, is another user's, or its ``current`` was not made by a sync.
        """
        try:
            with self._opened(Folder.make_at(self.path)) as root:
                return self._sync(root, look_up, keep)
        except TransferError as error:
            current = self.current() if allow_stale else None
            if current is None:
                raise
            return Synced(current, stale=error)
        except OSError as error:
            where = error.filename if isinstance(error.filename, str) else self.path
            if isinstance(error, WrongFile):
                hint = "remove it, or sync into another folder; only DIR itself may be a link"
                raise RestoreError(f"{where}: {error.strerror}", hint=hint) from error
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            raise RestoreError(
                f"{where}: cannot be written: {error.strerror}", hint="make room" if full else None
            ) from error

    def _sync(self, root: Folder, look_up: Callable[[], Located], keep: int) -> Synced:
        with contextlib.suppress(FileNotFoundError):
            if not _is_link(root, CURRENT):
                raise RestoreError(
                    f"{self.path / CURRENT}: wanted a link of an earlier sync, or none",
                    hint="sync into a folder of its own",
                )
        located = look_up()
        before = _serving(root)
        with self._opened(root.make(GENERATIONS)) as folder:
            made = Generations(folder, self._machine, self._trust)
            for last in (False,) * (_ROUNDS - 1) + (True,):
                existing = made.existing(located.version)
                name, restored = (existing, None) if existing is not None else self._make(root, made, located)
                try:
                    newer = look_up()
                except TransferError:  # the source went away: what it stood for before will do
                    newer = located
                if newer.version == located.version or last:
                    _point(root, name)
                    if name in made.names():  # else another sync has just removed it
                        break
                located = newer
            else:
                raise RestoreError(
                    f"{self.path}: other syncs remove generations as fast as this one makes them",
                    hint="raise --keep of every sync in this folder",
                )
            removed = _remove_old(root, made, keep)
            with contextlib.ExitStack() as stack:
                fetched = None
                with contextlib.suppress(OSError):
                    fetched = stack.enter_context(root.open(_FETCHED))
                generations.remove_abandoned(root, folder, fetched)
        return Synced(self._path(name), name != before, restored, removed)

    def _make(self, root: Folder, made: Generations, located: Located) -> tuple[str, Restored | None]:
        key = generations.key_of(located.version)
        try:
            with made.aside() as aside:
                artifact = located.get(lambda name: self._target(root, key, name), self._trust)
                restored = self._restore(artifact, aside)
                signed_by = restored.signed_by.fingerprint if restored.signed_by else None
                generations.write_record(aside, located.version, located.name, signed_by)
                if self._trust is not None:
                    generations.keep_signed(aside, artifact)
                _flush(generations.by_handle(aside))
                name = made.place(aside, located.version)
        except (CacheBuilderError, OSError):
            # A sync that ends removes what it fetched, which another sync of the same version may be reading. What the
            # first one made is what this one wanted to make.
            if (other := made.existing(located.version)) is not None:
                return other, None
            raise
        with contextlib.suppress(OSError):
            with root.open(_FETCHED) as fetched:
                fetched.remove(key)
            root.rmdir(_FETCHED)
        return name, replace(restored, dir=self._path(name))

    def _target(self, root: Folder, key: str, name: str) -> Target:
        """Where a fetched artifact goes."""
        with self._opened(root.make(_FETCHED)) as fetched:
            return Target(fetched.make(key), name)

    def _restore(self, artifact: Path, aside: Folder) -> Restored:
        """Restore into an open folder, and name that folder in errors."""
        path = generations.by_handle(aside)
        try:
            # What was baked serves in the folder where it was baked only, and each generation has another.
            return restore([artifact], path, machine=self._machine, trust=self._trust, with_baked=False)
        except RestoreError as error:
            raise RestoreError(str(error).replace(str(path), str(aside.path)), hint=error.hint) from None

    @contextlib.contextmanager
    def _opened(self, folder: Folder) -> Iterator[Folder]:
        """A folder to work in; another user's only by force, since that user could exchange what is put into it."""
        with folder:
            if not self._force and folder.is_foreign():
                raise RestoreError(
                    f"{folder.path}: wanted a folder of this user or root, found one of user {folder.status().st_uid}",
                    hint="sync as that user or into a folder of your own; --force takes it, and what that user may put "
                    "there",
                )
            yield folder

    def _path(self, name: str) -> Path:
        return self.path / GENERATIONS / name


def _serving(root: Folder) -> str | None:
    """The name of the generation that ``current`` is a link to; None where it is no link that a sync made."""
    try:
        folder, _, name = os.readlink(CURRENT, dir_fd=root.handle).partition("/")
    except OSError:
        return None
    return name if folder == GENERATIONS and generations.is_name(name) else None


def _point(root: Folder, name: str) -> None:
    """Make ``current`` this generation, by one rename."""
    if _serving(root) == name:
        return
    aside = generations.aside_name()
    os.symlink(f"{GENERATIONS}/{name}", aside, dir_fd=root.handle)
    try:
        root.rename(aside, CURRENT)
    except BaseException:
        root.remove(aside)
        raise


def _remove_old(root: Folder, made: Generations, keep: int) -> tuple[str, ...]:
    """Remove all generations but the newest ``keep``, and never the current one."""
    serving = _serving(root)
    removed = []
    # The current one may have an old number, where the source went back. It counts among those that stay.
    others = [name for name in made.names() if name != serving]
    for name in others[: max(len(others) - (keep - 1), 0)]:
        if (aside := made.remove(name)) is None:
            continue
        if _serving(root) == name:  # another sync has just gone back to it
            made.folder.rename(aside, name)
            continue
        made.folder.remove(aside)
        removed.append(name)
    return tuple(removed)


def _is_link(folder: Folder, name: str) -> bool:
    return stat.S_ISLNK(folder.status(name).st_mode)


def _flush(folder: Path) -> None:
    """Write a folder to the disk before it gets its name, so that a power cut leaves a whole folder or none."""
    for root, _, names in os.walk(folder, topdown=False):
        for name in [*names, "."]:
            handle = os.open(os.path.join(root, name), os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
