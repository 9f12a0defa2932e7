"""Put an artifact where DeepGEMM reads it: checked whole first, then entry by entry, each by one rename.

DIR afterwards::

    cache/<entry>/…                          what DeepGEMM reads
    cachebuilder/bin/nvcc, version.txt       the frozen nvcc and its text
    cachebuilder/artifacts/<digest>.<sha>.json, .yaml    each restored artifact's index and manifest, written last

Nothing is flushed to the disk: a killed process leaves whole entries only, and a serving image or an init container
has no use for more; after a power cut, restore into a fresh DIR. (DeepGEMM reads entries through the page cache.)
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import io
import os
import re
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from cachebuilder import frozen
from cachebuilder.artifact.index import CACHE, Entry, Fingerprint, Index
from cachebuilder.artifact.read import Archive, open_archive
from cachebuilder.atomic import make_folders, put, write_new
from cachebuilder.compatibility import Difference, with_environment
from cachebuilder.deepgemm import entries as entry_files
from cachebuilder.deepgemm.installation import Installation
from cachebuilder.errors import CompatibilityError, RestoreError
from cachebuilder.nvml import VisibleGpu

if TYPE_CHECKING:  # not imported where no key is given
    from cachebuilder.artifact.signature import TrustedKey

#: DeepGEMM hands paths below DIR to a shell with no quotes around them.
_PLAIN_PATH = re.compile(r"[\w./+@,=-]+")

_FOLDER_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


@dataclass(frozen=True)
class Restored:
    """What a restore did.

    Attributes:
        dir: DIR, absolute.
        index: the artifact's, with the entries' names as restored.
        artifact: the one that was taken.
        refused: the others that were given and do not fit, each with the reasons.
        differences: of the one taken: worth knowing, or overruled by force.
        written: entries made.
        skipped: entries that were there already, equal.
        relocated: legacy entries were renamed for this install path.
        signed_by: the trusted key that signed it; None where no key was given to check with.
    """

    dir: Path
    index: Index
    artifact: Path
    refused: list[tuple[Path, list[Difference]]]
    differences: list[Difference]
    written: int
    skipped: int
    relocated: bool
    signed_by: TrustedKey | None = None


def restore(
    artifacts: Sequence[Path],
    to: Path,
    installation: Installation | None,
    gpu: VisibleGpu | None = None,
    force: bool = False,
    trust: Sequence[TrustedKey] | None = None,
) -> Restored:
    """Restore the first of ``artifacts`` that fits this environment into ``to``.

    The environment is compared before anything is written, and the whole archive is checked before anything becomes
    visible to DeepGEMM; where it fails, ``to`` is as before.

    Args:
        installation: the DeepGEMM that will read the cache; None where none was found, which only ``force`` accepts.
        gpu: the GPU, where one is visible.
        force: take the first artifact, whatever differs.
        trust: keys, by one of which each artifact must be signed; None to take any. The signatures of all are checked
            before anything is decompressed or parsed, and what is parsed are the bytes that were checked.

    Raises:
        SignatureError: an artifact is not signed by a trusted key, or what lies beside it as provenance is not.
        CompatibilityError: none fits, or the entries cannot be relocated.
        ArtifactError: an artifact is damaged or hostile.
        RestoreError: a different entry is in ``to``, or it cannot be written.
    """
    to = Path(os.path.abspath(to))
    refused: list[tuple[Path, list[Difference]]] = []
    taken: Restored | None = None
    if trust is not None:
        for path in artifacts[1:]:  # before the first is written; again when their turn comes
            _checked(path, trust)
    for path in artifacts:
        with _opened(path, trust) as (archive, key):
            nvcc = str(frozen.frozen_nvcc(to))
            found = with_environment(archive.index, installation, gpu, os.environ, relocates=True, frozen_nvcc=nvcc)
            fits = not any(difference.causes_miss for difference in found)
            if not fits and not (force and taken is None):
                refused.append((path, found))
            elif taken is None:
                written, skipped, index = _restore(archive, to, installation)
                relocated = index.fingerprint.install_include != archive.index.fingerprint.install_include
                taken = Restored(to, index, path, refused, found, written, skipped, relocated, key)
    if taken is None:
        raise CompatibilityError(
            "\n".join(explain(path, found) for path, found in refused),
            hint="--force restores all the same; DeepGEMM will not find the kernels then",
        )
    return taken


@contextlib.contextmanager
def _opened(path: Path, trust: Sequence[TrustedKey] | None) -> Iterator[tuple[Archive, TrustedKey | None]]:
    """The artifact, and who signed it."""
    if trust is None:
        with open_archive(path) as archive:
            yield archive, None
    else:
        data, key = _checked(path, trust)
        yield Archive(io.BytesIO(data), path), key


def _checked(path: Path, trust: Sequence[TrustedKey]) -> tuple[bytes, TrustedKey]:
    from cachebuilder.artifact import provenance, signature  # import cryptography

    signed = signature.read_signed(path, trust)
    provenance.read_statement(signed, trust)
    return signed.data, signed.key


def explain(path: Path, differences: Sequence[Difference]) -> str:
    """The differences as a person reads them."""
    lines = [f"{path} does not fit this environment:"]
    lines += [f"  {line}" for difference in differences for line in difference.lines()]
    return "\n".join(lines)


def _restore(archive: Archive, to: Path, installation: Installation | None) -> tuple[int, int, Index]:
    _check_destination(to, archive.index.fingerprint)
    names = _Names(archive.index, installation)
    skipped: list[str] = []
    different: list[str] = []
    try:
        with _Destination(to) as destination:
            there = destination.entries()
            for entry, file, data in archive.files():
                if file.name == entry_files.SOURCE:
                    name = names.add(entry, data)
                    if name in there:
                        (skipped if destination.holds(name, entry) else different).append(name)
                    else:
                        destination.new(name)
                if (name := names.of[entry.name]) not in there:
                    destination.write(name, file.name, data)
            if different:
                raise _different(to, different)
            index = names.index()
            taken_meanwhile = destination.publish({names.of[entry.name]: entry for entry in archive.index.entries})
            if lost := [name for name, equal in taken_meanwhile.items() if not equal]:
                raise _different(to, lost)
            written = len(destination.made) - len(taken_meanwhile)
            own = to / frozen.FOLDER
            digest = index.fingerprint_digest
            frozen.write(own, index.fingerprint.compiler, index.name, digest)
            stem = f"{digest}.{hashlib.sha256(archive.index_bytes).hexdigest()[:16]}"
            folder = own / "artifacts"
            make_folders(folder)
            put(folder / f"{stem}.yaml", archive.manifest, 0o644)
            put(folder / f"{stem}.json", index.model_dump_json(indent=1, exclude_none=True).encode() + b"\n", 0o644)
            destination.keep()
    except OSError as error:
        where = error.filename if isinstance(error.filename, str) and error.filename.startswith("/") else to
        raise RestoreError(f"{where}: cannot be written: {error.strerror}") from error
    return written, len(archive.index.entries) - written, index


def _check_destination(to: Path, fingerprint: Fingerprint) -> None:
    """Raises `RestoreError` where DeepGEMM could not use the folder, or it serves another compiler's kernels."""
    if not _PLAIN_PATH.fullmatch(str(to)):
        raise RestoreError(
            f"{to}: wanted a path of letters, digits and ./_+@,=- only",
            hint="DeepGEMM hands it to a shell with no quotes, and splits lists of roots at ':'",
        )
    with contextlib.suppress(NotADirectoryError):
        text = frozen.version_text(to)
        if text is not None and text != fingerprint.compiler:
            raise RestoreError(
                f"{to}: its frozen nvcc speaks for another compiler\nwanted: {_last(fingerprint.compiler)}\n"
                f"found:  {_last(text)}",
                hint="restore into another folder: one root serves one compiler",
            )


def _last(text: str) -> str:
    return (text.strip().splitlines() or [""])[-1]


def _different(to: Path, names: Sequence[str]) -> RestoreError:
    more = f", and {len(names) - 3} more" if len(names) > 3 else ""
    return RestoreError(
        f"{to}: wanted no entry or an equal one, found a different {', '.join(sorted(names)[:3])}{more}",
        hint="restore into a fresh folder, or remove the entry if it is yours to remove",
    )


class _Names:
    """Each entry's name in DIR: as packed, or for a legacy cache that moves, what DeepGEMM will look for."""

    def __init__(self, index: Index, installation: Installation | None) -> None:
        self._index = index
        self.of: dict[str, str] = {}
        self._new: Fingerprint | None = None
        fingerprint = index.fingerprint
        if fingerprint.generation != "legacy" or installation is None or installation.generation != "legacy":
            return
        include = str(installation.imported_as / "include")
        if include == fingerprint.install_include:
            return
        old, flags = f"-I{fingerprint.install_include}", (fingerprint.legacy_flags or "").split(" ")
        release = re.search(r"release (\d+\.\d+)", fingerprint.compiler)
        if flags.count(old) != 1 or release is None:
            raise CompatibilityError(
                f"cannot be relocated: wanted one {old} among the flags and nvcc's release, "
                f"found {fingerprint.legacy_flags!r}"
            )
        self._release = release[1]
        new_flags = " ".join(f"-I{include}" if flag == old else flag for flag in flags)
        self._new = fingerprint.model_copy(update={"install_include": include, "legacy_flags": new_flags})

    def add(self, entry: Entry, source: bytes) -> str:
        """Take an entry; returns its name in DIR. Raises `CompatibilityError` where the formula does not hold."""
        name = entry.name
        if self._new is not None:
            old = self._index.fingerprint
            kernel, text = entry_files.kernel_name("legacy", name) or "", source.decode("utf-8", "surrogateescape")
            as_built = entry_files.legacy_entry(kernel, self._release, old.legacy_flags or "", text)
            if as_built != name:
                raise CompatibilityError(
                    "cannot be relocated to this install path, the names do not follow from the sources\n"
                    f"wanted: {as_built}\nfound:  {name}",
                    hint=f"restore where DeepGEMM's headers are in {old.install_include}, or build for this machine",
                )
            name = entry_files.legacy_entry(kernel, self._release, self._new.legacy_flags or "", text)
        self.of[entry.name] = name
        return name

    def index(self) -> Index:
        """The index as restored."""
        if self._new is None:
            return self._index
        entries = [entry.model_copy(update={"name": self.of[entry.name]}) for entry in self._index.entries]
        return self._index.model_copy(
            update={
                "fingerprint": self._new,
                "fingerprint_digest": self._new.digest(),
                "entries": tuple(sorted(entries, key=lambda entry: entry.name)),
            }
        )


@dataclass
class _Destination:
    """DIR while it is written: entries are made in a folder of our own under it, then renamed into ``cache/``.

    What is not kept is taken away again: the working folder, and folders that were not there before.
    """

    to: Path
    made: list[str] = field(default_factory=list)
    _created: list[Path] = field(default_factory=list)
    _work: int | None = None
    _work_path: Path | None = None
    _cache: int | None = None
    _done: bool = False

    def __enter__(self) -> _Destination:
        with contextlib.suppress(FileNotFoundError):
            self._cache = os.open(self.to / CACHE, _FOLDER_FLAGS)
        return self

    def entries(self) -> set[str]:
        """What is in ``cache/`` now."""
        return set(os.listdir(self._cache)) if self._cache is not None else set()

    def new(self, name: str) -> None:
        """Begin an entry."""
        if self._work is None:
            self._make_work()
        os.mkdir(name, 0o755, dir_fd=self._work)
        os.chmod(name, 0o755, dir_fd=self._work)
        self.made.append(name)

    def write(self, name: str, file: str, data: bytes) -> None:
        """Write one file of an entry that has begun."""
        write_new(f"{name}/{file}", data, 0o644, self._work)

    def holds(self, name: str, entry: Entry) -> bool:
        """Whether ``cache/`` has this entry, equal to the last byte and with nothing else in it."""
        try:
            folder = os.open(name, _FOLDER_FLAGS, dir_fd=self._cache)
        except OSError:
            return False
        try:
            if set(os.listdir(folder)) != {file.name for file in entry.files}:
                return False
            return all(_equal(folder, file.name, file.size, file.sha256) for file in entry.files)
        finally:
            os.close(folder)

    def publish(self, entries: dict[str, Entry]) -> dict[str, bool]:
        """Rename all that was made into ``cache/``; returns which another restore had made first, and if equal."""
        if self._cache is None:
            self._created += make_folders(self.to / CACHE)
            self._cache = os.open(self.to / CACHE, _FOLDER_FLAGS)
        taken: dict[str, bool] = {}
        for name in self.made:
            try:
                os.rename(name, name, src_dir_fd=self._work, dst_dir_fd=self._cache)
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                    raise
                taken[name] = self.holds(name, entries[name])
        return taken

    def keep(self) -> None:
        """What was made stays."""
        self._done = True

    def __exit__(self, *_: object) -> None:
        if self._work is not None and self._work_path is not None:
            left = os.listdir(self._work)
            for name in left:
                _remove_entry(self._work, name)
            with contextlib.suppress(OSError):
                self._work_path.rmdir()
            os.close(self._work)
        _remove_root(self.to / frozen.FOLDER / "tmp")
        if self._cache is not None:
            os.close(self._cache)
        if not self._done:
            for folder in reversed(self._created):
                with contextlib.suppress(OSError):
                    folder.rmdir()

    def _make_work(self) -> None:
        root = self.to / frozen.FOLDER / "tmp"
        for lock in self._locked(root):
            for left in os.listdir(lock):
                _sweep(lock, left)
            name = f"{os.getpid()}-{secrets.token_hex(8)}"
            os.mkdir(name, 0o700, dir_fd=lock)
            self._work_path = root / name
            self._work = os.open(name, _FOLDER_FLAGS, dir_fd=lock)
            _lock(self._work, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def _locked(self, root: Path) -> Iterator[int]:
        """Hold ``root`` alone, once: who sweeps meets no folder that is made but not locked yet."""
        for _ in range(100):
            self._created += make_folders(root)
            try:
                lock = os.open(root, _FOLDER_FLAGS)
            except FileNotFoundError:  # another restore ended and took it away
                continue
            try:
                _lock(lock, fcntl.LOCK_EX)
                with contextlib.suppress(FileNotFoundError):
                    if os.path.samestat(os.fstat(lock), os.stat(root)):
                        yield lock
                        return
            finally:
                os.close(lock)
        raise RestoreError(f"{root}: cannot be made: it goes away again and again")


def _lock(handle: int, kind: int) -> bool:
    """Lock; the lock ends with the process. False where another has it, or the file system knows no locks."""
    try:
        fcntl.flock(handle, kind)
    except OSError:
        return False
    return True


def _remove_root(root: Path) -> None:
    """Remove the folder of working folders, with what killed restores left, if none works in it, nor is about to."""
    with contextlib.suppress(OSError):
        lock = os.open(root, _FOLDER_FLAGS)
        try:
            if _lock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB):
                for left in os.listdir(lock):
                    _sweep(lock, left)
                root.rmdir()
        finally:
            os.close(lock)


def _sweep(root: int, name: str) -> None:
    """Remove a working folder that a killed restore left."""
    try:
        folder = os.open(name, _FOLDER_FLAGS, dir_fd=root)
    except OSError:
        return
    try:
        if _lock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB):
            for entry in os.listdir(folder):
                _remove_entry(folder, entry)
            with contextlib.suppress(OSError):
                os.rmdir(name, dir_fd=root)
    finally:
        os.close(folder)


def _remove_entry(folder: int, name: str) -> None:
    """Remove an entry's folder and its files, no deeper."""
    with contextlib.suppress(OSError):
        entry = os.open(name, _FOLDER_FLAGS, dir_fd=folder)
        try:
            for file in os.listdir(entry):
                os.unlink(file, dir_fd=entry)
        finally:
            os.close(entry)
        os.rmdir(name, dir_fd=folder)


def _equal(folder: int, name: str, size: int, sha256: str) -> bool:
    try:
        handle = os.open(name, _FILE_FLAGS, dir_fd=folder)
    except OSError:
        return False
    with os.fdopen(handle, "rb") as file:
        if os.fstat(handle).st_size != size:
            return False
        return hashlib.file_digest(file, "sha256").hexdigest() == sha256
