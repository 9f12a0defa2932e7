"""Any location as a file here: fetched into the user's cache folder, with its signature beside it."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from cachebuilder.artifact.trust import Trust
from cachebuilder.common.cache import cache_folder
from cachebuilder.common.folders import Folder
from cachebuilder.common.locks import lock
from cachebuilder.errors import InstallationError
from cachebuilder.restoring.machine import Compared, Machine, choose
from cachebuilder.ship import locations
from cachebuilder.ship.download import Target, sha256_of
from cachebuilder.ship.pull import Candidate, Check, Puller
from cachebuilder.ship.retry import Retries

#: How many fetched artifacts are kept, so that the next verb on the same one need not fetch it. They may be removed at
#: any time.
_KEPT = 8
#: How often a folder is made again that another process has removed.
_TRIES = 100


@dataclass(frozen=True)
class Located:
    """The artifact that a location stands for now, not fetched yet.

    Attributes:
        version: changes when the artifact does.
        name: what a person calls the artifact.
        get: fetches the artifact. Given its file name, the first argument says where to write it; with the second, one
            of its keys must have signed the artifact.
    """

    version: str
    name: str
    get: Callable[[Callable[[str], Target], Trust | None], Path]


def look_up(location: str, machine: Machine, retries: Retries, *, force: bool = False) -> Located:
    """The artifact that ``location`` stands for now; of several, the one that fits ``machine``.

    An artifact that is the only one is taken without comparing it: a restore compares it.

    Args:
        force: of several, take the first one where none fits.

    Raises:
        TransferError: it cannot be reached.
        CompatibilityError: there are several, and none fits.
    """
    if locations.is_oci(location):
        reference = locations.parse(location)
        puller = Puller(reference, retries)
        candidate = _chosen(puller.look_up(), machine, force, retries)
        return Located(
            candidate.described.digest,
            str(candidate),
            lambda to, trust: puller.fetch(candidate, to, checker(trust, location)),
        )
    if "://" not in location:
        path = Path(location)  # a file here: nothing to fetch, and a restore checks the signature beside it
        return Located(f"sha256:{sha256_of(path)}", location, lambda to, trust: path)
    from cachebuilder.ship.stores import Store  # imports fsspec, which a registry does not need

    store = Store(location, retries)
    stored = store.describe()
    version = f"sha256:{store.sha256}" if store.sha256 else stored.version
    return Located(version, store.location, lambda to, trust: store.fetch(stored, to, checker(trust, location)))


@contextlib.contextmanager
def fetched(
    location: str, machine: Machine, retries: Retries, *, force: bool = False, trust: Trust | None = None
) -> Iterator[Path]:
    """The artifact at ``location``, as a file in the user's cache folder that stays there until the context ends.

    Raises:
        CacheBuilderError: as from `look_up` and `Puller.fetch`.
    """
    located = look_up(location, machine, retries, force=force)
    key = hashlib.sha256(f"{located.name} {located.version}".encode()).hexdigest()[:32]
    path = cache_folder() / "fetched"
    try:
        parent = Folder.make_at(path, exact=False)
    except OSError as error:
        raise InstallationError(
            f"{path}: cannot be made: {error.strerror}", hint="set CACHEBUILDER_CACHE_DIR to a folder of your own"
        ) from error
    with parent, _in_use(parent, key):
        path = located.get(lambda name: Target(parent.make(key, 0o700), name), trust)
        _keep_newest(parent, key)
        yield path


@contextlib.contextmanager
def _in_use(parent: Folder, name: str) -> Iterator[None]:
    """Keep other processes from removing a folder, which is made if it is missing."""
    for _ in range(_TRIES):
        try:
            folder = parent.make(name, 0o700)
        except FileNotFoundError:  # another process removed it after it was made, and before it was opened
            continue
        with folder:
            lock(folder.handle, wait=True, shared=True)  # waits only for a process that removes it
            if _is_still(parent, name, folder):
                yield
                return
    raise InstallationError(
        f"{parent.path / name}: made {_TRIES} times, and removed each time before it could be used",
        hint="find out what removes it, or set CACHEBUILDER_CACHE_DIR to another folder",
    )


def _is_still(parent: Folder, name: str, folder: Folder) -> bool:
    """Whether an open folder still has its name: it was not removed before it was locked."""
    try:
        return os.path.samestat(folder.status(), parent.status(name))
    except FileNotFoundError:
        return False


def checker(trust: Trust | None, location: str) -> Check | None:
    """Checks a fetched artifact with the files beside it; errors call the artifact ``location``, without secrets."""
    if trust is None:
        return None

    def check(data: bytes, files: dict[str, bytes]) -> None:
        trust.check(data, files, locations.shown(location))

    return check


def _chosen(candidates: Sequence[Candidate], machine: Machine, force: bool, retries: Retries) -> Candidate:
    if len(candidates) == 1:
        return candidates[0]
    compared = [
        Compared(candidate, tuple(machine.differences(candidate.described, relocates=True))) for candidate in candidates
    ]
    choice = choose(compared, force=force, hint=f"name one by its digest: {candidates[0].reference}")
    for refused in compared[: compared.index(choice)]:
        retries.watcher.notice(f"refused   {refused}")
    return choice.artifact


def _keep_newest(parent: Folder, used: str) -> None:
    """Remove the artifacts that were fetched longest ago, but none that a process uses."""
    ages: list[tuple[float, str]] = []
    for name in parent.names():
        with contextlib.suppress(OSError):  # another process has just removed it
            if name == used:
                os.utime(name, dir_fd=parent.handle, follow_symlinks=False)
            ages.append((parent.status(name).st_mtime, name))
    for _, name in sorted(ages)[:-_KEPT]:
        with contextlib.suppress(OSError), parent.open(name) as folder:
            if lock(folder.handle):
                folder.clear()
                parent.rmdir(name)
