"""DIR while a restore writes it: no reader and no other restore ever sees half an entry.

An entry is known here by its path below DIR, such as ``cache/NAME``.

Other users may be able to write into DIR. So everything below it is done by handle (`common.folders`).
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from cachebuilder.artifact.baked import BakedFile
from cachebuilder.artifact.index import CACHE, FLASHINFER, FLASHINFER_CACHE, FLASHINFER_MODULES, Entry
from cachebuilder.common.folders import Folder, MadeFolder, write_new
from cachebuilder.common.locks import lock
from cachebuilder.errors import RestoreError
from cachebuilder.restoring import baked, frozen
from cachebuilder.restoring.flashinfer_files import PYTHON

#: The name of a working folder: the process's number and random digits.
_WORKING_FOLDER = re.compile(r"[0-9]+-[0-9a-f]{16}")
#: The folders that a restore writes into, if they exist already: none may be another user's.
_WRITTEN = (
    *(CACHE, frozen.FOLDER, f"{frozen.FOLDER}/bin", f"{frozen.FOLDER}/artifacts"),
    *(FLASHINFER, FLASHINFER_CACHE, FLASHINFER_MODULES, PYTHON, f"{FLASHINFER}/tmp"),
    baked.FOLDER,
)


_MAX_OWN_BYTES = 64 << 10


@dataclass
class Destination:
    """DIR while it is written: entries are made in a working folder under it, then renamed into their folders.

    In the end the working folder is removed; without `keep`, so are the folders that did not exist before.

    Args:
        force: write into folders of another user as well.

    Attributes:
        made: paths of the entries that were made, in order.
    """

    to: Path
    force: bool = False
    made: list[str] = field(default_factory=list)
    _new_folders: list[MadeFolder] = field(default_factory=list)
    #: The folders that are open: names below DIR → the folder.
    _open: dict[tuple[str, ...], Folder] = field(default_factory=dict)
    _owners: set[int] = field(default_factory=lambda: {0, os.geteuid()})
    _work: Folder | None = None
    _kept: bool = False

    def __enter__(self) -> Destination:
        try:
            for path in ("", *_WRITTEN):
                self._existing(*filter(None, path.split("/")))
        except BaseException:
            self._close()
            raise
        return self

    def version_text(self) -> str | None:
        """The text that DIR's frozen nvcc answers with; None where there is none yet."""
        folder = self._existing(frozen.FOLDER, "bin")
        return frozen.version_text_in(folder) if folder is not None else None

    def entries(self, *folders: str) -> set[str]:
        """The paths of what is in these folders now."""
        return {
            f"{path}/{name}"
            for path in folders
            if (folder := self._existing(*path.split("/"))) is not None
            for name in folder.names()
        }

    def new(self, path: str) -> None:
        """Begin an entry."""
        if self._work is None:
            self._work = self._make_work()
        # Only this user can look into the working folder, so nobody can exchange what is in it.
        os.mkdir(_working_name(path), 0o755, dir_fd=self._work.handle)
        os.chmod(_working_name(path), 0o755, dir_fd=self._work.handle)  # whatever the umask
        self.made.append(path)

    def write(self, path: str, file: str, data: bytes) -> None:
        """Write one file of an entry that was begun."""
        assert self._work is not None
        write_new(f"{_working_name(path)}/{file}", data, 0o644, self._work.handle)

    def write_baked(self, file: BakedFile, data: bytes) -> None:
        """Write one file of the baked caches; `publish_baked` puts all in place."""
        if self._work is None:
            self._work = self._make_work()
        *folders, name = file.path.split("/")
        with contextlib.ExitStack() as stack:
            folder = self._work
            for one in (baked.FOLDER, *folders):
                folder = stack.enter_context(folder.make(one))
            folder.write_new(name, data, 0o755 if file.executable else 0o644)
            os.utime(name, (file.modified, file.modified), dir_fd=folder.handle)

    def publish_baked(self, record: bytes) -> bool:
        """Put the baked caches and their record in place. Returns False where another restore has just done it."""
        assert self._work is not None
        with self._work.open(baked.FOLDER) as folder:
            folder.write_new(baked.RECORD, record, 0o644)
        try:
            self._work.rename(baked.FOLDER, baked.FOLDER, self._folder())
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise
            return False
        return True

    def with_baked(self) -> Folder | None:
        """DIR, if it has a folder of baked caches; else None."""
        return self._existing() if self._existing(baked.FOLDER) is not None else None

    def holds(self, path: str, entry: Entry) -> bool:
        """Whether DIR has this entry, with equal bytes and no other file, and no other user owns it."""
        *names, name = path.split("/")
        parent = self._existing(*names)
        assert parent is not None
        try:
            with parent.open(name) as folder:
                if not self.force and folder.status().st_uid not in self._owners:
                    return False
                if folder.names() != sorted(file.name for file in entry.files):
                    return False
                return all(_equal(folder, file.name, file.size, file.sha256) for file in entry.files)
        except OSError:
            return False

    def publish(self, entries: dict[str, Entry]) -> dict[str, bool]:
        """Rename every entry that was made to its path.

        Returns:
            The entries that another restore put there first, and whether each is equal.
        """
        self._folder(CACHE)
        made_by_others: dict[str, bool] = {}
        for path in self.made:
            *names, name = path.split("/")
            assert self._work is not None
            try:
                self._work.rename(_working_name(path), name, self._folder(*names))
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                    raise
                made_by_others[path] = self.holds(path, entries[path])
        return made_by_others

    def read_own(self, path: str) -> bytes | None:
        """One of cachebuilder's own files, at ``path`` below DIR; None if there is none."""
        *folders, name = path.split("/")
        try:
            folder = self._existing(*folders)
            return folder.read(name, _MAX_OWN_BYTES) if folder is not None else None
        except FileNotFoundError:
            return None

    def write_own(self, path: str, data: bytes, mode: int) -> None:
        """Write one of cachebuilder's own files, at ``path`` below DIR, whole or not at all."""
        *folders, name = path.split("/")
        self._folder(*folders).write(name, data, mode)

    def keep(self) -> None:
        """Everything that was made stays."""
        self._kept = True

    def __exit__(self, *_: object) -> None:
        if self._work is not None:
            own = self._folder(frozen.FOLDER)
            with contextlib.suppress(OSError), own.open(frozen.WORKING_FOLDERS) as root:
                self._work.clear()
                root.rmdir(self._work.path.name)
            self._work.close()
        if (own_folder := self._open.get((frozen.FOLDER,))) is not None:
            _remove_root(own_folder)
        self._close()

    def _close(self) -> None:
        for folder in self._open.values():
            folder.close()
        for made in reversed(self._new_folders):
            made.keep() if self._kept else made.remove()

    def _folder(self, *names: str) -> Folder:
        """The folder of these names below DIR, which is made if it is missing."""
        if names not in self._open:
            *parents, name = names or (None,)
            if name is None:
                folder = Folder.make_at(self.to, made=self._new_folders)
            else:
                folder = self._folder(*parents).make(name, made=self._new_folders)
            self._open[names] = folder
            self._require_ours(folder)
        return self._open[names]

    def _existing(self, *names: str) -> Folder | None:
        """The folder of these names below DIR; None if it is missing."""
        if names not in self._open:
            try:
                if not names:
                    folder = Folder.at(self.to)
                elif (parent := self._existing(*names[:-1])) is not None:
                    folder = parent.open(names[-1])
                else:
                    return None
            except FileNotFoundError:
                return None
            self._open[names] = folder
            self._require_ours(folder)
        return self._open[names]

    def _require_ours(self, folder: Folder) -> None:
        """Raise `RestoreError` if the folder is another user's, who could exchange what is put there."""
        owner = folder.status().st_uid
        if self.force or owner in self._owners:
            return
        if folder.is_foreign():
            raise RestoreError(
                f"{folder.path}: wanted a folder of this user or root, found one of user {owner}",
                hint="restore as that user or into a folder of your own; --force takes it, and what that user may put "
                "there",
            )
        self._owners.add(owner)

    def _make_work(self) -> Folder:
        with self._locked_root() as root:
            _sweep(root)
            work = root.make(f"{os.getpid()}-{os.urandom(8).hex()}", 0o700)
            lock(work.handle)
            return work

    @contextlib.contextmanager
    def _locked_root(self) -> Iterator[Folder]:
        """Lock the folder of working folders: a restore that sweeps it then meets no working folder without a lock."""
        own = self._folder(frozen.FOLDER)
        for _ in range(100):
            try:
                root = own.make(frozen.WORKING_FOLDERS)
            except FileNotFoundError:  # another restore has just removed it
                continue
            with root:
                self._require_ours(root)
                lock(root.handle, wait=True)
                with contextlib.suppress(FileNotFoundError):
                    if os.path.samestat(root.status(), own.status(frozen.WORKING_FOLDERS)):
                        yield root
                        return
        raise RestoreError(
            f"{own.path / frozen.WORKING_FOLDERS}: cannot be made: other restores keep removing it",
            hint="restore again",
        )


def _working_name(path: str) -> str:
    """An entry's name in the working folder: no two paths share one, since no name of a folder has a dot."""
    return path.replace("/", ".")


def _remove_root(own: Folder) -> None:
    """Remove the folder of working folders and what killed restores left in it, unless another restore works there."""
    with contextlib.suppress(OSError), own.open(frozen.WORKING_FOLDERS) as root:
        if root.is_ours() and lock(root.handle):
            _sweep(root)
            own.rmdir(frozen.WORKING_FOLDERS)


def _sweep(root: Folder) -> None:
    """Remove the working folders of this user whose lock no restore holds: killed restores left them."""
    for name in root.names():
        if not _WORKING_FOLDER.fullmatch(name):
            continue
        with contextlib.suppress(OSError), root.open(name) as folder:
            if folder.status().st_uid == os.geteuid() and lock(folder.handle):
                folder.clear()
                root.rmdir(name)


def _equal(folder: Folder, name: str, size: int, sha256: str) -> bool:
    with folder.open_file(name) as file:
        return os.fstat(file.fileno()).st_size == size and hashlib.file_digest(file, "sha256").hexdigest() == sha256
