"""Any location as a file here: fetched into the user's cache folder, with what is signed beside it."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cachebuilder.common.cache import cache_folder
from cachebuilder.ship import locations
from cachebuilder.ship.download import sha256_of
from cachebuilder.ship.pull import Candidate, Check, Compare, Listing, Puller, choose, explain
from cachebuilder.ship.retry import Retries

#: How many fetched artifacts are kept, so that the next verb on the same one need not fetch it.
_KEPT = 8


@dataclass(frozen=True)
class Wish:
    """Which of several artifacts under one reference is wanted.

    Attributes:
        compare: how each differs from this machine.
        alone: an artifact that is the only one is taken without comparing it.
        force: the first one, where none fits.
    """

    compare: Compare
    alone: bool = True
    force: bool = False


@dataclass(frozen=True)
class Found:
    """What a location stands for now, not fetched yet.

    Attributes:
        version: changes when the artifact does.
        name: the artifact as a person names it.
    """

    version: str
    name: str
    get: Callable[[Callable[[str], Path], Check | None], Path]


def look_up(location: str, wish: Wish, retries: Retries) -> Found:
    """What ``location`` stands for now, the one of several that ``wish`` takes.

    Raises:
        TransferError: it cannot be had.
        CompatibilityError: there are several, and none fits.
    """
    if locations.is_oci(location):
        reference = locations.parse(location)
        puller = Puller(reference, retries)
        candidate = _chosen(puller.look_up(), wish, retries)
        return Found(candidate.described.digest, str(candidate), lambda to, check: puller.fetch(candidate, to, check))
    if "://" not in location:
        return _local(Path(location))
    from cachebuilder.ship.stores import Store  # imports fsspec, which a registry has no use for

    store = Store(location, retries)
    stored = store.describe()
    version = f"sha256:{store.sha256}" if store.sha256 else stored.version
    return Found(version, store.location, lambda to, check: store.fetch(stored, to, check))


def _local(path: Path) -> Found:
    """A file here: for whom an artifact has to come from somewhere."""
    version = f"sha256:{sha256_of(path)}"
    return Found(version, str(path), lambda to, check: path)


def fetch(location: str, wish: Wish, retries: Retries, check: Check | None = None) -> Path:
    """The artifact at ``location``, as a file in the user's cache folder. Raises as `look_up` and `Puller.fetch` do."""
    found = look_up(location, wish, retries)
    folder = fetched_folder() / hashlib.sha256(f"{found.name} {found.version}".encode()).hexdigest()[:32]
    path = found.get(lambda name: folder / name, check)
    _keep_newest(folder)
    return path


def _keep_newest(used: Path) -> None:
    """Remove what was fetched longest ago."""
    with contextlib.suppress(OSError):
        os.utime(used)
        there = sorted(used.parent.iterdir(), key=lambda folder: folder.stat().st_mtime)
        for folder in there[:-_KEPT]:
            shutil.rmtree(folder, ignore_errors=True)


def fetched_folder() -> Path:
    """Where the last `_KEPT` fetched artifacts lie, each in a folder of its own; who wants the room may empty it."""
    return cache_folder() / "fetched"


def _chosen(listing: Listing, wish: Wish, retries: Retries) -> Candidate:
    if wish.alone and len(listing.candidates) == 1:
        return listing.candidates[0]
    choice = choose(listing, wish.compare, wish.force)
    for candidate, differences in choice.refused:
        retries.watcher.notice(f"refused   {explain(candidate, differences)}")
    return choice.candidate
