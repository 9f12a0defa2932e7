"""What lies in the user's cache folder: how much there is, and how to remove what is old.

Everything there can be made again. What is used is touched, so that its age is the time since its last use. Whoever
works in a folder of it holds a lock on that folder, and it is left alone then.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cachebuilder.common.cache import cache_folder
from cachebuilder.common.locks import lock
from cachebuilder.common.records import Record

#: Each part's folder → what is in it, and the pattern of its items.
_PARTS: dict[str, tuple[str, str]] = {
    "plans": ("plans, by all that they depend on", "*.json"),
    "cubins": ("compiled kernels, by all that their bytes depend on", "*/*"),
    "fetched": ("artifacts that were fetched from elsewhere", "*"),
    "restored": ("folders that `run` restored artifacts into", "*"),
    "recordings": ("what interrupted recordings left", "*"),
    "scratch": ("working folders", "*"),
    "front-end": ("the library that holds a compiler's front end", "*"),
    "virtual-gpu": ("the virtual GPU's library", "*"),
}
#: A running build may be about to load these.
_LIBRARIES = ("front-end", "virtual-gpu")


class Part(Record):
    """One part of the cache folder: its folder's name, what is in it, how many items, how many bytes."""

    name: str
    holds: str
    items: int
    bytes: int


class Usage(Record):
    """The whole cache folder."""

    folder: str
    parts: tuple[Part, ...]


class Removed(Record):
    """What was removed: items and bytes; and the items that are in use and were left alone."""

    items: int
    bytes: int
    in_use: int


@dataclass(frozen=True)
class _Item:
    part: str
    path: Path
    used: float
    bytes: int


def usage() -> Usage:
    """How much there is. Raises `InstallationError` where the user has no home."""
    items = list(_items())
    parts = []
    for name, (holds, _) in _PARTS.items():
        sizes = [item.bytes for item in items if item.part == name]
        parts.append(Part(name=name, holds=holds, items=len(sizes), bytes=sum(sizes)))
    return Usage(folder=str(cache_folder()), parts=tuple(parts))


def prune(*, unused_seconds: float | None = None, max_bytes: int | None = None, dry_run: bool = False) -> Removed:
    """Remove what was not used for a while, then what was used longest ago until the rest is small enough.

    Safe beside a running build: whatever it needs later, it makes again, and what it works in is locked.

    Args:
        unused_seconds: remove what was not used for so long; 0 for everything.
        max_bytes: of the whole cache folder.
        dry_run: remove nothing, only count.

    Raises:
        InstallationError: the user has no home.
    """
    oldest_first = sorted(_items(), key=lambda item: item.used)
    left = sum(item.bytes for item in oldest_first)
    now, building = time.time(), _somebody_builds()
    items = removed_bytes = in_use = 0
    for item in oldest_first:
        old = unused_seconds is not None and now - item.used >= unused_seconds
        if not old and (max_bytes is None or left <= max_bytes):
            continue
        if (building and item.part in _LIBRARIES) or not _remove(item.path, dry_run):
            in_use += 1
            continue
        items, removed_bytes, left = items + 1, removed_bytes + item.bytes, left - item.bytes
    return Removed(items=items, bytes=removed_bytes, in_use=in_use)


def touch(path: Path) -> None:
    """Note that an item was used now."""
    with contextlib.suppress(OSError):
        os.utime(path)


def _items() -> Iterator[_Item]:
    for part, (_, pattern) in _PARTS.items():
        for path in (cache_folder() / part).glob(pattern):
            with contextlib.suppress(OSError):  # another process removed it meanwhile
                yield _Item(part, path, path.lstat().st_mtime, _bytes(path))


def _bytes(path: Path) -> int:
    if path.is_symlink() or not path.is_dir():
        return path.lstat().st_size
    return sum(file.lstat().st_size for file in path.rglob("*") if file.is_symlink() or file.is_file())


def _somebody_builds() -> bool:
    return any(not _is_free(folder) for folder in (cache_folder() / "scratch").glob("*"))


def _is_free(folder: Path) -> bool:
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return True
    try:
        return lock(handle)
    finally:
        os.close(handle)


def _remove(path: Path, dry_run: bool) -> bool:
    """Remove an item; False where a process works in it."""
    if path.is_symlink() or not path.is_dir():
        if not dry_run:
            path.unlink(missing_ok=True)
        return True
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        if not lock(handle):
            return False
        if not dry_run:
            shutil.rmtree(path, ignore_errors=True)
        return True
    finally:
        os.close(handle)
