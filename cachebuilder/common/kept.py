"""What is in the user's cache folder: measure it, and remove what is old.

Everything in it can be made again. Code that uses an item touches it, so an item's age is the time since its last use.
A process locks the folder that it works in, and a locked folder is not removed.
"""

from __future__ import annotations

import contextlib
import fnmatch
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from cachebuilder.common.cache import cache_folder
from cachebuilder.common.folders import Folder
from cachebuilder.common.locks import lock
from cachebuilder.common.records import Record

#: The name of each part's folder → what is in it, and the pattern of its items.
_PARTS: dict[str, tuple[str, str]] = {
    "plans": ("plans", "*.json"),
    "cubins": ("compiled kernels", "*/*"),
    "headers": ("which headers the kernels of some ops include", "*.json"),
    "fetched": ("artifacts that were fetched from elsewhere", "*"),
    "restored": ("folders that `run` restored artifacts into", "*"),
    "served": ("roots for folders that are read-only", "*"),
    "recordings": ("what interrupted recordings left", "*"),
    "engines": ("environments of a fleet's engines", "*"),
    "packages": ("this package for other environments", "*"),
    "scratch": ("working folders", "*"),
    "front-end": ("the library that holds a compiler's front end", "*"),
    "virtual-gpu": ("the virtual GPU's library", "*"),
}
#: Parts that stay while any build runs, because it may be about to load them.
_LIBRARIES = ("front-end", "virtual-gpu")


class Part(Record):
    """One part of the cache folder.

    Attributes:
        name: the name of its folder.
        holds: what is in it, in words.
        items: how many items it has.
        bytes: their size together.
    """

    name: str
    holds: str
    items: int
    bytes: int


class Usage(Record):
    """The whole cache folder: its path and its parts."""

    folder: str
    parts: tuple[Part, ...]


class Removed(Record):
    """What `prune` removed.

    Attributes:
        items: how many items were removed.
        bytes: their size together.
        in_use: how many items were old enough but were left alone because a process uses them.
    """

    items: int
    bytes: int
    in_use: int


@dataclass(frozen=True)
class _Item:
    """A file or a folder that is removed as a whole: its names below the cache folder, and when it was last used."""

    part: str
    names: tuple[str, ...]
    last_used: float
    bytes: int


def usage() -> Usage:
    """Measure the cache folder. Raises `InstallationError` if the user has no home folder."""
    items = list(_items())
    parts = []
    for name, (holds, _) in _PARTS.items():
        sizes = [item.bytes for item in items if item.part == name]
        parts.append(Part(name=name, holds=holds, items=len(sizes), bytes=sum(sizes)))
    return Usage(folder=str(cache_folder()), parts=tuple(parts))


def prune(*, unused_seconds: float | None = None, max_bytes: int | None = None, dry_run: bool = False) -> Removed:
    """Remove items that were not used for some time, then the least recently used ones until the rest is small enough.

    It is safe while a build runs: the build's working folders are locked, and it makes again whatever else is gone.

    Args:
        unused_seconds: remove items that were not used for this long; 0 for all items.
        max_bytes: the size of the whole cache folder to come down to.
        dry_run: count what would be removed, and remove nothing.

    Raises:
        InstallationError: the user has no home folder.
    """
    oldest_first = sorted(_items(), key=lambda item: item.last_used)
    remaining_bytes = sum(item.bytes for item in oldest_first)
    now, build_runs = time.time(), _build_runs()
    removed_items = removed_bytes = in_use = 0
    for item in oldest_first:
        too_old = unused_seconds is not None and now - item.last_used >= unused_seconds
        too_much = max_bytes is not None and remaining_bytes > max_bytes
        if not (too_old or too_much):
            continue
        if (build_runs and item.part in _LIBRARIES) or not _remove(item.names, dry_run):
            in_use += 1
            continue
        removed_items += 1
        removed_bytes += item.bytes
        remaining_bytes -= item.bytes
    return Removed(items=removed_items, bytes=removed_bytes, in_use=in_use)


def touch(path: Path) -> None:
    """Record that an item is used now."""
    with contextlib.suppress(OSError):
        os.utime(path)


def _items() -> Iterator[_Item]:
    try:
        root = Folder.at(cache_folder())
    except OSError:
        return
    with root:
        for part, (_, pattern) in _PARTS.items():
            with contextlib.suppress(OSError), root.open(part) as folder:  # a part may be missing
                yield from _items_in(folder, part, (part,), pattern)


def _items_in(folder: Folder, part: str, names: tuple[str, ...], pattern: str) -> Iterator[_Item]:
    """The items of a part, in the folder of these names below the cache folder."""
    first, _, rest = pattern.partition("/")
    for name in fnmatch.filter(folder.names(), first):
        with contextlib.suppress(OSError):  # another process has removed it meanwhile
            if rest:
                with folder.open(name) as inner:
                    yield from _items_in(inner, part, (*names, name), rest)
            else:
                yield _Item(part, (*names, name), folder.status(name).st_mtime, _bytes(folder.path / name))


def _bytes(path: Path) -> int:
    """The size of a file, or of all files in a folder."""
    if path.is_symlink() or not path.is_dir():
        return path.lstat().st_size
    return sum(file.lstat().st_size for file in path.rglob("*") if file.is_symlink() or file.is_file())


def _build_runs() -> bool:
    """Whether any process has a working folder locked."""
    with contextlib.suppress(OSError), Folder.at(cache_folder()) as root, root.open("scratch") as scratch:
        return any(_is_locked(scratch, name) for name in scratch.names())
    return False


def _is_locked(scratch: Folder, name: str) -> bool:
    with contextlib.suppress(OSError), scratch.open(name) as folder:  # another process may have removed it meanwhile
        return not lock(folder.handle)
    return False


def _remove(names: Sequence[str], dry_run: bool) -> bool:
    """Remove an item, unless a process works in it; returns whether it was, or in a dry run would be, removed.

    Each folder on the way is opened by its handle: a link in the cache folder must not lead the removal elsewhere.
    """
    with contextlib.ExitStack() as stack:
        parent = stack.enter_context(Folder.at(cache_folder()))
        for name in names[:-1]:
            parent = stack.enter_context(parent.open(name))
        try:
            folder = stack.enter_context(parent.open(names[-1]))
        except OSError:  # a file or a link
            if not dry_run:
                with contextlib.suppress(FileNotFoundError):
                    parent.unlink(names[-1])
            return True
        if not lock(folder.handle):
            return False
        if not dry_run:
            folder.clear()
            with contextlib.suppress(OSError):
                parent.rmdir(names[-1])
        return True
