"""The generations of a synced folder: restored folders with a record, and the signed artifact where keys are given.

Other users may be able to write into the synced folder. So everything in it is done by handle (`common.folders`). A
record only saves a fetch, by the version in it. Whether a generation may serve is seen from its bytes. With keys, they
must be those of the artifact that was kept beside them, whose signature is checked each time.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import re
import secrets
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from cachebuilder.artifact.index import CACHE, PROVENANCE_SUFFIX, SIGNATURE_SUFFIX
from cachebuilder.artifact.read import Archive
from cachebuilder.artifact.trust import Trust
from cachebuilder.artifact.whole import MAX_ARTIFACT_BYTES, read_beside, read_bytes
from cachebuilder.common import records
from cachebuilder.common.folders import Folder, open_below
from cachebuilder.common.locks import lock
from cachebuilder.common.records import Record, RecordError
from cachebuilder.deepgemm import entries as entry_files
from cachebuilder.errors import CacheBuilderError
from cachebuilder.restoring.folder import is_restored, open_folder, own_files
from cachebuilder.restoring.machine import Machine
from cachebuilder.restoring.relocation import Relocation
from cachebuilder.ship.description import BESIDE

_RECORD = "synced.json"
_MAX_RECORD_BYTES = 64 << 10
#: The artifact that a generation was restored from, and with a suffix what is signed beside it.
_ARTIFACT = "signed.tar.zst"
_SIGNED = (SIGNATURE_SUFFIX, PROVENANCE_SUFFIX)
_NAME = re.compile(r"([0-9]{6,})-([0-9a-f]{16})")
#: The name of something that is not in place yet, or no longer: a mark of this machine since it was started (names of
#: earlier releases have none), and random digits.
_ASIDE = re.compile(r"\.aside-(?:([0-9a-f]{8})-)?[0-9a-f]{16}")
#: A killed sync left what is older: no fetch and no restore takes a day.
_ABANDONED_SECONDS = 24 * 3600


class _Synced(Record):
    """What a generation's record says: what it was made of, for the next sync and for a person."""

    version: str
    source: str
    signed_by: str | None = None


def key_of(version: str) -> str:
    """The part of a generation's name that stands for the version."""
    return hashlib.sha256(version.encode()).hexdigest()[:16]


def is_name(name: str) -> bool:
    """Whether this is a generation's name."""
    return _NAME.fullmatch(name) is not None


@dataclass(frozen=True)
class Generations:
    """The open folder of the generations.

    Args:
        machine: what will serve.
        trust: the keys, one of which must have signed a generation's artifact.
    """

    folder: Folder
    machine: Machine
    trust: Trust | None

    def names(self) -> list[str]:
        """All of them, the oldest first."""
        return [name for _, name in sorted((_number(name), name) for name in self.folder.names() if is_name(name))]

    def existing(self, version: str) -> str | None:
        """A usable generation of this version, the newest first. The source may have gone back to an older one."""
        for name in reversed(self.names()):
            if name.endswith(key_of(version)) and self._version(name) == version and self.is_usable(name):
                return name
        return None

    def is_usable(self, name: str) -> bool:
        """Whether every byte is right, a trusted key signed it, and the machine's DeepGEMM finds its kernels.

        A power cut may have damaged what a sync had flushed, and another user may have put the generation there.
        """
        with contextlib.suppress(OSError, CacheBuilderError), self.folder.open(name) as generation:
            if generation.is_foreign():
                return False
            path = by_handle(generation)
            if not is_restored(path):
                return False
            restored = open_folder(path)
            if restored.damage() or not all(self.machine.fits(index) for index in restored.indexes):
                return False
            return self.trust is None or _is_as_signed(generation, self.trust, self.machine)
        return False

    @contextlib.contextmanager
    def aside(self) -> Iterator[Folder]:
        """A new folder that no reader sees, locked; removed in the end, unless it was placed."""
        while True:
            name = aside_name()
            with self.folder.make(name) as aside:
                lock(aside.handle)
                # Before it was locked, another sync may have taken it for one that a killed sync left.
                if not _is_at(self.folder, name, aside):
                    continue
                try:
                    yield aside
                finally:
                    if _is_at(self.folder, name, aside):
                        self.folder.remove(name)
                return

    def place(self, aside: Folder, version: str) -> str:
        """Rename a folder to the next number, unless another sync has placed the same version meanwhile."""
        while True:
            # The number comes first: a sync that places the same version after this takes the same name, and one of the
            # two renames fails. A generation that was placed before is found by the look behind it.
            number = max(map(_number, self.names()), default=0) + 1
            if (other := self.existing(version)) is not None:
                return other
            name = f"{number:06}-{key_of(version)}"
            try:
                self.folder.rename(aside.path.name, name)
            except OSError:
                if not os.path.lexists(by_handle(self.folder) / name):
                    raise
                continue
            return name

    def remove(self, name: str) -> str | None:
        """Take a generation away, renamed so that nobody sees half of it; returns its new name, None if it is gone."""
        aside = aside_name()
        try:
            self.folder.rename(name, aside)
        except FileNotFoundError:  # another sync removes it
            return None
        return aside

    def _version(self, name: str) -> str | None:
        """What the record says; None where there is none."""
        try:
            with self.folder.open(name) as generation:
                return records.read(_Synced, generation.read(_RECORD, _MAX_RECORD_BYTES)).version
        except (OSError, RecordError):
            return None


def write_record(generation: Folder, version: str, source: str, signed_by: str | None) -> None:
    """Write what a generation was made of."""
    record = _Synced(version=version, source=source, signed_by=signed_by)
    generation.write_new(_RECORD, record.model_dump_json().encode() + b"\n", 0o644)


def keep_signed(generation: Folder, artifact: Path) -> None:
    """Keep an artifact with its signature in the generation that was restored from it, for later checks."""
    generation.write_new(_ARTIFACT, read_bytes(artifact), 0o644)
    for suffix in _SIGNED:
        data = read_beside(artifact.with_name(artifact.name + suffix), BESIDE[suffix][1])
        if data is not None:
            generation.write_new(_ARTIFACT + suffix, data, 0o644)


def _is_as_signed(generation: Folder, trust: Trust, machine: Machine) -> bool:
    """Whether what DeepGEMM reads here is what the kept artifact holds, which a trusted key signed.

    Raises:
        CacheBuilderError: the artifact is not signed by a trusted key, or damaged.
        OSError: there is none, or something cannot be read.
    """
    attached = {}
    for suffix in _SIGNED:
        with contextlib.suppress(FileNotFoundError):
            attached[suffix] = generation.read(_ARTIFACT + suffix, BESIDE[suffix][1])
    data = trust.check(generation.read(_ARTIFACT, MAX_ARTIFACT_BYTES), attached, generation.path).data
    archive = Archive(io.BytesIO(data), generation.path)
    relocation = Relocation(archive.index, machine.installation)
    digests: dict[str, str] = {}
    for member, content in archive.files():
        if member.folder == CACHE and member.file.name == entry_files.SOURCE:
            relocation.add(member.entry, content)
        digests[relocation.path(member)] = member.file.sha256
    archive.drain()
    index_bytes = relocation.index_bytes(archive.index_bytes)
    for name, (content, _) in own_files(relocation.index(), archive.index_bytes, archive.manifest, index_bytes).items():
        digests[name] = hashlib.sha256(content).hexdigest()
    for folder, entries in relocation.index().folders.items():
        with open_below(generation, folder) as opened:
            if opened.names() != sorted(entry.name for entry in entries):
                return False
    return _digests(generation, digests) == digests


def _digests(generation: Folder, expected: Iterable[str]) -> dict[str, str]:
    """sha256 of every file in the folders that these files are in. Links raise `OSError`."""
    digests: dict[str, str] = {}
    for path in sorted({name.rpartition("/")[0] for name in expected}):
        with open_below(generation, path) as folder:
            for name in folder.names():
                with folder.open_file(name) as file:
                    digests[f"{path}/{name}"] = hashlib.file_digest(file, "sha256").hexdigest()
    return digests


def by_handle(folder: Folder) -> Path:
    """A path of an open folder that nobody can lead elsewhere, for code that takes paths (proc(5), /proc/pid/fd)."""
    return Path(f"/proc/self/fd/{folder.handle}")


def aside_name() -> str:
    """A fresh name for something that is not in place."""
    return f".aside-{_mark()}-{secrets.token_hex(8)}"


def remove_abandoned(root: Folder, generations: Folder, fetched: Folder | None) -> None:
    """Remove what killed syncs left, if this user owns it.

    A folder that a process of this machine made and no process has locked is nobody's. Locks of other machines may not
    be seen, so their folders go after a day, and so do fetches, which the next sync may continue. The file system's own
    clock decides: this machine's clock may be wrong.
    """
    probe = aside_name()
    with contextlib.suppress(OSError):
        root.write_new(probe, b"", 0o600)
        now = root.status(probe).st_mtime
        root.unlink(probe)
        for folder in (root, generations, *([fetched] if fetched else [])):
            for name in folder.names():
                match = _ASIDE.fullmatch(name)
                if match or folder is fetched:
                    with contextlib.suppress(OSError):
                        status = folder.status(name)
                        if status.st_uid != os.geteuid():
                            continue
                        is_old = now - status.st_mtime > _ABANDONED_SECONDS
                        if is_old or (match and match[1] == _mark() and _is_unlocked(folder, name)):
                            folder.remove(name)


def _is_unlocked(parent: Folder, name: str) -> bool:
    """Whether it is a folder that no process has locked."""
    with contextlib.suppress(OSError), parent.open(name) as folder:
        return lock(folder.handle)
    return False


@cache
def _mark() -> str:
    """Eight digits that processes see each other's locks by: those of one machine since it was started."""
    with contextlib.suppress(OSError):
        return hashlib.sha256(Path("/proc/sys/kernel/random/boot_id").read_bytes()).hexdigest()[:8]
    return secrets.token_hex(4)


def _number(name: str) -> int:
    match = _NAME.fullmatch(name)
    return int(match[1]) if match else 0


def _is_at(parent: Folder, name: str, folder: Folder) -> bool:
    """Whether the name is that of the open folder."""
    try:
        return os.path.samestat(folder.status(), parent.status(name))
    except FileNotFoundError:
        return False
