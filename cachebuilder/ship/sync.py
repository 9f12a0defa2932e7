"""A folder kept at the artifact that a source stands for; the working one serves until the next one is whole.

DIR::

    current -> generations/000007-…     what serves; moved by one rename
    generations/<number>-<version>/     restored folders; the newest has the highest number
    .fetched/                           artifacts that are being fetched

Any number of syncs may work in one folder, on one machine or on many that share it. None depends on a lock or on a
clock: each makes a generation under a name of its own, then renames it into place, and moves the link by a rename. Two
syncs make equal folders of the same version, and the first one to finish wins.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cachebuilder.artifact.trust import Trust
from cachebuilder.common.files import make_folders, write_atomically
from cachebuilder.errors import ArtifactError, CacheBuilderError, RestoreError, TransferError
from cachebuilder.restoring.folder import is_restored, open_folder
from cachebuilder.restoring.machine import Machine
from cachebuilder.restoring.restore import Restored, restore
from cachebuilder.ship.download import Target
from cachebuilder.ship.fetch import Located

CURRENT, GENERATIONS = "current", "generations"
_FETCHED, _RECORD = ".fetched", "synced.json"
_NAME = re.compile(r"([0-9]{6,})-([0-9a-f]{16})")
#: Beginning of a name that is not in place yet, or no longer: another sync's work, or what a killed sync left.
_ASIDE = ".aside-"
#: Older files were left by a killed sync: no fetch and no restore takes a day.
_ABANDONED_SECONDS = 24 * 3600
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
    """

    def __init__(self, to: Path, machine: Machine, trust: Trust | None = None) -> None:
        self.path = Path(os.path.abspath(to))
        self._machine = machine
        self._trust = trust

    def current(self) -> Path | None:
        """The generation that serves; None where there is none, or it is damaged, does not fit or is not trusted."""
        generation = self._target()
        return generation if generation is not None and self._is_usable(generation) else None

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
            RestoreError: the folder cannot be written, or its ``current`` was not made by a sync.
        """
        try:
            return self._sync(look_up, keep)
        except TransferError as error:
            current = self.current() if allow_stale else None
            if current is None:
                raise
            return Synced(current, stale=error)
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            raise RestoreError(
                f"{error.filename or self.path}: cannot be written: {error.strerror}",
                hint="make room" if full else None,
            ) from error

    def _sync(self, look_up: Callable[[], Located], keep: int) -> Synced:
        link = self.path / CURRENT
        if os.path.lexists(link) and not link.is_symlink():
            raise RestoreError(
                f"{link}: wanted a link of an earlier sync, or none", hint="sync into a folder of its own"
            )
        located = look_up()
        before = self._target()
        for last in (False,) * (_ROUNDS - 1) + (True,):
            make_folders(self.path / GENERATIONS)
            existing = self._existing(located)
            generation, restored = (existing, None) if existing is not None else self._make(located)
            try:
                newer = look_up()
            except TransferError:  # the source went away: what it stood for before will do
                newer = located
            if newer.version == located.version or last:
                self._point(generation)
                if generation.is_dir():  # else another sync has just removed it
                    break
            located = newer
        else:
            raise RestoreError(
                f"{self.path}: other syncs remove generations as fast as this one makes them",
                hint="raise --keep of every sync in this folder",
            )
        return Synced(generation, generation != before, restored, self._remove_old(keep))

    def _target(self) -> Path | None:
        """The generation that ``current`` is a link to."""
        try:
            name = os.path.basename(os.readlink(self.path / CURRENT))
        except OSError:
            return None
        return self.path / GENERATIONS / name if _NAME.fullmatch(name) else None

    def _generations(self) -> list[tuple[int, str]]:
        """Number and name of each, the oldest first."""
        matches = map(_NAME.fullmatch, os.listdir(self.path / GENERATIONS))
        return sorted((int(match[1]), match[0]) for match in matches if match)

    def _existing(self, located: Located) -> Path | None:
        """A usable generation of this version, the newest first. The source may have gone back to an older one."""
        for _, name in reversed(self._generations()):
            generation = self.path / GENERATIONS / name
            if (
                name.endswith(_key(located.version))
                and _read_record(generation).get("version") == located.version
                and self._is_usable(generation)
            ):
                return generation
        return None

    def _is_usable(self, generation: Path) -> bool:
        """Whether every byte is right, a trusted key signed it, and the machine's DeepGEMM finds its kernels.

        A power cut may have damaged what a sync had flushed.
        """
        try:
            if not is_restored(generation):
                return False
            folder = open_folder(generation)
            if folder.damage():
                return False
        except ArtifactError:
            return False
        trusted = self._trust is None or self._trust.has(_read_record(generation).get("signed_by"))
        return trusted and all(self._machine.fits(index) for index in folder.indexes)

    def _make(self, located: Located) -> tuple[Path, Restored | None]:
        fetched = self.path / _FETCHED / _key(located.version)
        aside = self._aside_in(GENERATIONS)
        try:
            artifact = located.get(lambda name: Target.at(fetched / name), self._trust)
            restored = restore([artifact], aside, machine=self._machine, trust=self._trust)
            record = {
                "version": located.version,
                "source": located.name,
                "signed_by": restored.signed_by.fingerprint if restored.signed_by else None,
            }
            write_atomically(aside / _RECORD, json.dumps(record).encode() + b"\n", RestoreError)
            _flush(aside)
            generation = self._place(aside, located)
        except (CacheBuilderError, OSError):
            # A sync that ends removes what it fetched, which another sync of the same version may be reading. What the
            # first one made is what this one wanted to make.
            if (other := self._existing(located)) is not None:
                return other, None
            raise
        finally:
            shutil.rmtree(aside, ignore_errors=True)
        shutil.rmtree(fetched, ignore_errors=True)
        with contextlib.suppress(OSError):
            fetched.parent.rmdir()
        return generation, restored

    def _place(self, aside: Path, located: Located) -> Path:
        """Rename a folder to the next number, unless another sync has placed the same version meanwhile."""
        while True:
            # The number comes first: a sync that places the same version after this takes the same name, and one of the
            # two renames fails. A generation that was placed before is found by the look behind it.
            number = max((number for number, _ in self._generations()), default=0) + 1
            if (other := self._existing(located)) is not None:
                return other
            generation = self.path / GENERATIONS / f"{number:06}-{_key(located.version)}"
            try:
                os.rename(aside, generation)
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
                continue
            return generation

    def _point(self, generation: Path) -> None:
        """Make ``current`` this generation, by one rename."""
        if self._target() == generation:
            return
        aside = self._aside_in("")
        os.symlink(f"{GENERATIONS}/{generation.name}", aside)
        try:
            os.rename(aside, self.path / CURRENT)
        except BaseException:
            aside.unlink(missing_ok=True)
            raise

    def _remove_old(self, keep: int) -> tuple[str, ...]:
        """Remove all generations but the newest ``keep``, never the current one, and what killed syncs left."""
        serving = self._target()
        removed = []
        # The current one may have an old number, where the source went back. It counts among those that stay.
        others = [name for _, name in self._generations() if serving is None or name != serving.name]
        for name in others[: max(len(others) - (keep - 1), 0)]:
            aside = self._aside_in(GENERATIONS)
            try:  # renamed first, so that nobody sees a generation that is half removed
                os.rename(self.path / GENERATIONS / name, aside)
            except FileNotFoundError:  # another sync removes it
                continue
            if self._target() == self.path / GENERATIONS / name:  # another sync has just gone back to it
                os.rename(aside, self.path / GENERATIONS / name)
                continue
            shutil.rmtree(aside, ignore_errors=True)
            removed.append(name)
        self._remove_abandoned()
        return tuple(removed)

    def _remove_abandoned(self) -> None:
        """Remove what killed syncs left. The file system's own clock decides: this machine's clock may be wrong."""
        probe = self._aside_in("")
        with contextlib.suppress(OSError):
            probe.touch()
            now = probe.stat().st_mtime
            probe.unlink()
            for folder in (self.path, self.path / GENERATIONS, self.path / _FETCHED):
                for name in os.listdir(folder) if folder.is_dir() else []:
                    path = folder / name
                    if name.startswith(_ASIDE) or folder.name == _FETCHED:
                        with contextlib.suppress(OSError):
                            if now - path.lstat().st_mtime > _ABANDONED_SECONDS:
                                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()

    def _aside_in(self, folder: str) -> Path:
        """A fresh name for something that is not in place."""
        return self.path / folder / f"{_ASIDE}{secrets.token_hex(8)}"


def _key(version: str) -> str:
    return hashlib.sha256(version.encode()).hexdigest()[:16]


def _read_record(generation: Path) -> dict[str, str]:
    try:
        record = json.loads((generation / _RECORD).read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return {n: v for n, v in record.items() if isinstance(v, str)} if isinstance(record, dict) else {}


def _flush(folder: Path) -> None:
    """Write a folder to the disk before it gets its name, so that a power cut leaves a whole folder or none."""
    for root, _, names in os.walk(folder, topdown=False):
        for name in [*names, "."]:
            handle = os.open(os.path.join(root, name), os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
