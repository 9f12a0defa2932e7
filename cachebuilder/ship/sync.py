"""A folder kept at what a source stands for: the working one stays until the next one is whole, and some older ones.

DIR::

    current -> generations/000007-…     what serves; moved by one rename
    generations/<number>-<version>/     restored folders, the newest with the highest number
    .fetched/                           artifacts on their way

Any number of syncs may work in one folder, of one machine or of many that share it. Nothing depends on a lock or on a
clock: a generation is made under a name of its own and appears by one rename, and so does the link. What two make of
the same version is equal; the first to finish wins.
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

from cachebuilder.common.files import make_folders, write_atomically
from cachebuilder.errors import ArtifactError, CacheBuilderError, RestoreError, TransferError
from cachebuilder.restoring.folder import is_restored, open_folder
from cachebuilder.ship.fetch import Found
from cachebuilder.ship.pull import Check

CURRENT, GENERATIONS = "current", "generations"
_FETCHED, _RECORD = ".fetched", "synced.json"
_NAME = re.compile(r"([0-9]{6,})-([0-9a-f]{16})")
#: Made, and not yet in place or no longer: another sync's work, or what a killed one left.
_ASIDE = ".aside-"
#: Left by a killed sync for certain: no fetch and no restore takes a day.
_ABANDONED_SECONDS = 24 * 3600
#: A source that changes each time it is looked at is not waited for.
_ROUNDS = 3


@dataclass(frozen=True)
class Synced:
    """What a sync did.

    Attributes:
        generation: the folder that ``current`` is now.
        changed: it was another before.
        removed: names of older generations that are gone.
    """

    generation: Path
    changed: bool
    removed: tuple[str, ...]


#: Puts an artifact into a folder; returns the fingerprint of the key that signed it, where that was checked.
Restore = Callable[[Path, Path], str | None]

#: Whether a generation is of use here and now, given that fingerprint.
Usable = Callable[[Path, str | None], bool]


def sync(
    look_up: Callable[[], Found],
    to: Path,
    restore: Restore,
    usable: Usable = lambda generation, signed_by: True,
    keep: int = 3,
    check: Check | None = None,
) -> Synced:
    """Bring ``to`` to what the source stands for now. Where it fails, ``current`` is what it was.

    Args:
        look_up: what the source stands for, asked again after a fetch: a source that has moved on meanwhile is
            followed, so that the slower of two syncs does not put the older one back.
        restore: puts an artifact into a folder that is not there yet.
        usable: a generation that is there and is not usable is made anew.
        keep: how many generations stay, the current one among them.

    Raises:
        TransferError: the source cannot be had, or is not what it says it is.
        SignatureError, ArtifactError, CompatibilityError: the artifact is not to be used here.
        RestoreError: ``to`` cannot be written, or ``current`` in it is somebody else's.
    """
    to = Path(os.path.abspath(to))
    try:
        _check_folder(to)
        found = look_up()
        before = _target(to)
        for last in (False,) * (_ROUNDS - 1) + (True,):
            make_folders(to / GENERATIONS)
            generation = _have(to, found, usable) or _make(to, found, restore, usable, check)
            try:
                newer = look_up()
            except TransferError:  # no news
                newer = found
            if newer.version == found.version or last:
                _point(to, generation)
                if generation.is_dir():  # else another sync has just removed it
                    break
            found = newer
        else:
            raise RestoreError(f"{to}: generations go away as fast as they are made", hint="raise --keep, everywhere")
        return Synced(generation, generation != before, _remove_old(to, keep))
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise RestoreError(
            f"{error.filename or to}: cannot be written: {error.strerror}", hint="make room" if full else None
        ) from error


def current(to: Path, usable: Usable = lambda generation, signed_by: True) -> Path | None:
    """The generation that serves; None where there is none, or it is not whole, or not usable."""
    generation = _target(to)
    return generation if generation is not None and _is_good(generation, usable) else None


def _check_folder(to: Path) -> None:
    link = to / CURRENT
    if os.path.lexists(link) and not link.is_symlink():
        raise RestoreError(f"{link}: wanted a link of an earlier sync, or none", hint="sync into a folder of its own")


def _target(to: Path) -> Path | None:
    try:
        name = os.path.basename(os.readlink(to / CURRENT))
    except OSError:
        return None
    return to / GENERATIONS / name if _NAME.fullmatch(name) else None


def _key(version: str) -> str:
    return hashlib.sha256(version.encode()).hexdigest()[:16]


def _generations(to: Path) -> list[tuple[int, str]]:
    """Number and name of each, in the order in which they were made."""
    found = []
    for name in os.listdir(to / GENERATIONS):
        if match := _NAME.fullmatch(name):
            found.append((int(match[1]), name))
    return sorted(found)


def _have(to: Path, found: Found, usable: Usable) -> Path | None:
    """A whole generation of this version, the newest first: the current one, or one that the source went back to."""
    for _, name in reversed(_generations(to)):
        generation = to / GENERATIONS / name
        is_it = name.endswith(_key(found.version)) and _read_record(generation).get("version") == found.version
        if is_it and _is_good(generation, usable):
            return generation
    return None


def _read_record(generation: Path) -> dict[str, str]:
    try:
        record = json.loads((generation / _RECORD).read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return {n: v for n, v in record.items() if isinstance(v, str)} if isinstance(record, dict) else {}


def _is_good(generation: Path, usable: Usable) -> bool:
    """Every byte is what it was (a disk that lost some after a power cut is told), and it is of use here."""
    try:
        whole = is_restored(generation) and not open_folder(generation).damage()
    except ArtifactError:
        return False
    return whole and usable(generation, _read_record(generation).get("signed_by"))


def _make(to: Path, found: Found, restore: Restore, usable: Usable, check: Check | None) -> Path:
    fetched = to / _FETCHED / _key(found.version)
    aside = to / GENERATIONS / f"{_ASIDE}{secrets.token_hex(8)}"
    try:
        artifact = found.get(lambda name: fetched / name, check)
        record = {"version": found.version, "source": found.name, "signed_by": restore(artifact, aside)}
        write_atomically(aside / _RECORD, json.dumps(record).encode() + b"\n", RestoreError)
        _flush(aside)
        generation = _place(to, aside, found, usable)
    except (CacheBuilderError, OSError):
        # Another sync that ends removes what it fetched, under the hands of one that works on the same: what it made
        # is what this one wanted to make.
        if (other := _have(to, found, usable)) is not None:
            return other
        raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    shutil.rmtree(fetched, ignore_errors=True)
    with contextlib.suppress(OSError):
        fetched.parent.rmdir()
    return generation


def _place(to: Path, aside: Path, found: Found, usable: Usable) -> Path:
    """Rename the folder to the next number; where another sync was faster with the same version, its one is as good."""
    while True:
        # The number first: a sync that places the same version after this look takes the same name, and one of the two
        # fails; what was placed before it is found below.
        number = max((number for number, _ in _generations(to)), default=0) + 1
        if (other := _have(to, found, usable)) is not None:
            return other
        generation = to / GENERATIONS / f"{number:06}-{_key(found.version)}"
        try:
            os.rename(aside, generation)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            continue
        return generation


def _flush(folder: Path) -> None:
    """Onto the disk before it is named: what a power cut leaves half would be taken for whole."""
    for root, _, names in os.walk(folder, topdown=False):
        for name in [*names, "."]:
            handle = os.open(os.path.join(root, name), os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)


def _point(to: Path, generation: Path) -> None:
    """Make ``current`` this generation, by one rename."""
    if _target(to) == generation:
        return
    aside = to / f"{_ASIDE}{secrets.token_hex(8)}"
    os.symlink(f"{GENERATIONS}/{generation.name}", aside)
    try:
        os.rename(aside, to / CURRENT)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def _remove_old(to: Path, keep: int) -> tuple[str, ...]:
    """All generations but the newest ``keep``, and never the current one; and what killed syncs left."""
    serving = _target(to)
    removed = []
    names = [name for _, name in _generations(to)]
    # The current one may be an old number, where the source went back: it counts among those that stay.
    others = [name for name in names if serving is None or name != serving.name]
    for name in others[: max(len(others) - (keep - 1), 0)]:
        aside = to / GENERATIONS / f"{_ASIDE}{secrets.token_hex(8)}"
        try:  # out of sight first: nobody finds half of one
            os.rename(to / GENERATIONS / name, aside)
        except FileNotFoundError:  # another sync's work
            continue
        if _target(to) == to / GENERATIONS / name:  # which another sync has just gone back to
            os.rename(aside, to / GENERATIONS / name)
            continue
        shutil.rmtree(aside, ignore_errors=True)
        removed.append(name)
    _remove_abandoned(to)
    return tuple(removed)


def _remove_abandoned(to: Path) -> None:
    """What killed syncs left, by the file server's clock: this machine's may be wrong."""
    probe = to / f"{_ASIDE}{secrets.token_hex(8)}"
    with contextlib.suppress(OSError):
        probe.touch()
        now = probe.stat().st_mtime
        probe.unlink()
        for folder in (to, to / GENERATIONS, to / _FETCHED):
            for name in os.listdir(folder) if folder.is_dir() else []:
                path = folder / name
                if name.startswith(_ASIDE) or folder.name == _FETCHED:
                    with contextlib.suppress(OSError):
                        if now - path.lstat().st_mtime > _ABANDONED_SECONDS:
                            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
