"""Where a process that serves reads kernels, writes its own, and finds the frozen nvcc.

DeepGEMM needs a root that it can write to before it asks any compiler for a kernel that the cache lacks, and a compiler
that can be executed before it looks for any kernel. Whether a folder allows that depends on the user and on the mount.
So the process that will serve finds it out, and where the restored folder does not allow it, a private folder of this
user is used.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from cachebuilder.artifact.index import CACHE, FLASHINFER, FLASHINFER_CACHE, FLASHINFER_MODULES, Index
from cachebuilder.common.cache import open_own
from cachebuilder.common.folders import Folder, WrongFile, is_safe, others_may_write
from cachebuilder.deepgemm.generation import Generation
from cachebuilder.errors import InstallationError, RestoreError
from cachebuilder.restoring import baked, flashinfer_files, frozen

_OWN_SCRATCH = "name a folder of your own with --scratch"


@dataclass(frozen=True)
class Place:
    """What a process serves from.

    Attributes:
        dir: the restored folder.
        roots: DeepGEMM's cache roots, the writable one first; legacy DeepGEMM has only that one.
        nvcc: the frozen nvcc.
        log: where it logs misses; None for its own place, beside it.
        private: the private folders that are used in place of the restored folder's own.
        notes: what is in them, and why; a sentence each.
        flashinfer: FlashInfer's folder, with ``cache``, ``modules``, ``python`` and ``tmp``; None where no artifact has
            something for it.
        baked: whether the engine's other compilers read what was baked in ``dir``.
    """

    dir: Path
    roots: tuple[Path, ...]
    nvcc: Path
    log: Path | None = None
    private: tuple[Path, ...] = ()
    notes: tuple[str, ...] = ()
    flashinfer: Path | None = None
    baked: bool = False


def generation_of(dir: Path, indexes: Sequence[Index]) -> Generation:
    """The cache generation of the artifacts in ``dir``. Raises `RestoreError` if they are of two."""
    generation, *more = sorted({index.fingerprint.generation for index in indexes})
    if more:
        raise RestoreError(
            f"{dir}: wanted artifacts of one cache generation, found {generation} and {more[0]}",
            hint="restore each generation into a folder of its own",
        )
    return generation


def usual(dir: Path, indexes: Sequence[Index], scratch: Path | None) -> Place:
    """The place for a process that runs elsewhere: nothing is made or checked here.

    Args:
        indexes: those of the artifacts in ``dir``.
        scratch: DeepJIT's writable root; None for ``dir/scratch``. Legacy DeepGEMM writes into ``dir``.

    Raises:
        RestoreError: as `generation_of` does.
    """
    dir = _absolute(dir)
    legacy = generation_of(dir, indexes) == "legacy"
    roots = (dir,) if legacy else (_absolute(scratch or dir / "scratch"), dir)
    flashinfer = dir / FLASHINFER if any(index.flashinfer for index in indexes) else None
    return Place(dir, roots, frozen.frozen_nvcc(dir), flashinfer=flashinfer, baked=baked.is_baked(dir))


def usable(dir: Path, indexes: Sequence[Index], scratch: Path | None) -> Place:
    """The place for a process of this user on this machine: its first root can be written to, its nvcc can be run.

    What ``dir`` does not allow is made in a private folder of this user: below ``scratch`` if that is given, else in
    the user's cache folder, else in ``$TMPDIR`` or ``/tmp``, else in ``/dev/shm``. Arguments are as of `usual`.

    Raises:
        RestoreError: as `generation_of` does; ``scratch`` is not this user's, or cannot be written to; or no folder can
            be found that allows what ``dir`` does not.
    """
    dir, place = _absolute(dir), usual(dir, indexes, scratch)
    if generation_of(dir, indexes) == "deepjit":
        place = _with_writable_root(dir, scratch, place)
    elif reason := _unwritable(dir) or _unwritable(dir / CACHE):
        place = _with_links(dir, indexes, scratch, place, reason)
    if place.flashinfer:
        place = _with_flashinfer(dir, indexes, scratch, place)
    if _unwritable(dir / frozen.FOLDER):
        place = replace(place, log=place.roots[0] / frozen.LOG_NAME)
    return place if os.access(place.nvcc, os.X_OK) else _with_executable_nvcc(dir, indexes, place)


def _with_writable_root(dir: Path, scratch: Path | None, place: Place) -> Place:
    """DeepJIT's place with a first root that this user can write to and no other user can put kernels into."""
    try:
        root = private_root(place.roots[0])
        if not (reason := _unwritable(root)):
            return replace(place, roots=(root, dir))
        another_will_do = scratch is None
    except OSError as error:
        reason = f"{error.filename or place.roots[0]} cannot be made or entered: {error.strerror}"
        another_will_do = scratch is None and error.errno in (errno.EROFS, errno.EACCES, errno.EPERM)
    if not another_will_do:
        raise RestoreError(f"wanted a root that DeepGEMM can write to: {reason}", hint=_OWN_SCRATCH)
    with _private_folder(dir) as folder, folder.make("root", 0o700) as own:
        note = f"{reason}; kernels that the cache lacks go into {own.path}"
        return replace(place, roots=(own.path, dir), private=(folder.path,), notes=(note,))


def _with_links(dir: Path, indexes: Sequence[Index], scratch: Path | None, place: Place, reason: str) -> Place:
    """Legacy's place for a ``dir`` that cannot be written to: a private root with a link to each entry in ``dir``."""
    with _private_folder(dir, scratch) as folder, folder.make("root", 0o700) as root:
        with root.make(CACHE, 0o700) as cache:
            entries = {entry.name for index in indexes for entry in index.entries}
            for name in entries.difference(cache.names()):
                os.symlink(dir / CACHE / name, name, dir_fd=cache.handle)
        note = f"{reason}; DeepGEMM's root is {root.path}, which has links to the entries"
        return replace(place, roots=(root.path,), private=(folder.path,), notes=(note,))


def _with_flashinfer(dir: Path, indexes: Sequence[Index], scratch: Path | None, place: Place) -> Place:
    """The place with a folder in which FlashInfer can make kernels, and with the modules of its own package.

    FlashInfer has one folder for cubins, which it writes into before it looks at a kernel that the cache lacks; and it
    looks for modules in one package, which ours would hide.
    """
    own_modules = flashinfer_files.package_modules()
    reason = next(filter(None, (_unwritable(dir / name) for name in (FLASHINFER_CACHE, f"{FLASHINFER}/tmp"))), None)
    if not reason and not own_modules:
        return place
    with _private_folder(dir, scratch) as folder, folder.make(FLASHINFER, 0o700) as root:
        with root.make("cache", 0o700) as cache, root.make("modules", 0o700) as modules:
            for index in indexes:
                for opened, path in ((cache, FLASHINFER_CACHE), (modules, FLASHINFER_MODULES)):
                    links = {entry.name: dir / path / entry.name for entry in index.folders.get(path, ())}
                    if opened is modules:
                        links |= own_modules
                    for name in links.keys() - set(opened.names()):
                        os.symlink(links[name], name, dir_fd=opened.handle)
        with root.make("python", 0o700) as python:
            flashinfer_files.write_stand_in(python, indexes)
    why = reason or "the package flashinfer-jit-cache is installed, and has modules, too"
    note = f"{why}; FlashInfer's folder is {root.path}, which has links"
    return replace(place, flashinfer=root.path, private=(*place.private, folder.path), notes=(*place.notes, note))


def _with_executable_nvcc(dir: Path, indexes: Sequence[Index], place: Place) -> Place:
    """The place with a copy of the frozen nvcc where programs can be run."""
    writable = place.roots[0] if place.roots[0] != dir else None
    with _private_folder(dir, writable, executable=True) as folder:
        index = indexes[0]
        own = folder.path / frozen.FOLDER
        nvcc = frozen.write(own, index.fingerprint.compiler, index.name, index.fingerprint_digest)
    note = f"{place.nvcc} cannot be executed here; its copy {nvcc} is taken"
    log = place.log or dir / frozen.FOLDER / frozen.LOG_NAME
    return replace(place, nvcc=nvcc, log=log, private=(*place.private, folder.path), notes=(*place.notes, note))


def private_root(path: Path) -> Path:
    """The writable root at ``path``, which DeepGEMM reads first: no other user may be able to put kernels there.

    It is made if it is missing. In a folder of this user or root that others may write to, it is a folder of this
    user's own.

    Raises:
        OSError: it cannot be made or opened.
        RestoreError: it is another user's, or kernels in it are.
    """
    with Folder.make_at(path.parent, exact=False) as parent, _enter(parent, path) as root:
        _require_own(root)
        if not others_may_write(root.status()):
            return path
        with root.make(f"private-{os.geteuid()}", 0o700) as private:
            _require_own(private)
            return private.path


def _private_folder(dir: Path, first: Path | None = None, *, executable: bool = False) -> Folder:
    """A folder of this user for what ``dir`` does not allow: the first that can be written to.

    Args:
        first: a folder to try before the usual ones.
        executable: programs must be able to run from it, too.

    Raises:
        RestoreError: there is none; it says why, for each that was tried.
    """
    name = hashlib.sha256(os.fsencode(dir)).hexdigest()[:16]
    temporary = dict.fromkeys([Path(os.environ.get("TMPDIR") or "/tmp"), Path("/dev/shm")])
    makers: list[Callable[[], Folder]] = [partial(open_own, "served", name)]
    makers += [partial(_below, base, name) for base in temporary]
    if first is not None:
        makers.insert(0, partial(_named, first))
    reasons = []
    for make in makers:
        try:
            folder = make()
        except (InstallationError, OSError) as error:
            reasons.append(
                str(error) if isinstance(error, InstallationError) else f"{error.filename}: {error.strerror}"
            )
            continue
        reason = _unwritable(folder.path)
        if not reason and executable and os.statvfs(folder.handle).f_flag & os.ST_NOEXEC:
            reason = f"{folder.path} is mounted noexec"
        if not reason:
            return folder
        folder.close()
        reasons.append(reason)
    kind = "can be written to, and in which programs can be run" if executable else "can be written to"
    raise RestoreError(
        f"wanted a folder that {kind}, for what {dir} does not allow; found none: {'; '.join(reasons)}",
        hint="mount such a folder (on Kubernetes an emptyDir), and name it with --scratch",
    )


def _named(path: Path) -> Folder:
    return Folder.at(private_root(path))


def _below(base: Path, name: str) -> Folder:
    """A folder of this user in ``base``, which other users may share. Raises `OSError`, also if another user has it."""
    with Folder.at(base) as shared, shared.make(f"cachebuilder-{os.geteuid()}", 0o700) as own:
        if not is_safe(own.status()):
            raise WrongFile(errno.EPERM, "another user can change it", str(own.path))
        return own.make(name, 0o700)


def _unwritable(path: Path) -> str | None:
    """Why this user cannot make files in the folder ``path``; None if it can."""
    if os.access(path, os.W_OK | os.X_OK, effective_ids=True):
        return None
    return f"{path} cannot be written to by user {os.geteuid()}"


def _absolute(path: Path) -> Path:
    return Path(os.path.abspath(path))


def _enter(parent: Folder, path: Path) -> Folder:
    """The folder at ``path``, which may be a link of this user or root; made if it is missing, for this user to write.

    Other users may look into it: a server of another user would otherwise fail at a hit, since DeepJIT looks into its
    first root for every kernel (`std::filesystem::exists` throws where it may not look; deep_jit/cache/disk.hpp).
    """
    try:
        if stat.S_ISLNK(parent.status(path.name).st_mode) and parent.status(path.name).st_uid in (0, os.geteuid()):
            return Folder.at(path)
    except FileNotFoundError:
        pass
    return parent.make(path.name)


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
