"""What is wrong in a restored folder: each file of an entry and each of our own files that is not as it was restored.

Nothing in the folder is run, and no link is followed. Files that an engine or a person adds elsewhere are no damage:
entries that no index lists, a log of misses, DeepJIT's writable root, what an engine adds to baked caches.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from cachebuilder.artifact.baked import BakedFile, BakedPart
from cachebuilder.artifact.index import CACHE, Entry, Index
from cachebuilder.common.folders import Folder, open_below
from cachebuilder.flashinfer import stand_in
from cachebuilder.restoring import baked
from cachebuilder.restoring.flashinfer_files import NO_BYTECODE, PYTHON, STAND_IN, stand_in_of
from cachebuilder.restoring.frozen import FOLDER, LOG_NAME, NVCC, VERSION, WORKING_FOLDERS, files

_READ_BYTES = 1 << 20
#: What may be in cachebuilder/ beside bin/ and artifacts/.
_OTHERS = {WORKING_FOLDERS, LOG_NAME, f"{LOG_NAME}.d"}
#: A file that is being written, or that a killed restore left: only a rename gives it a name that anybody reads.
_UNFINISHED = re.compile(r"\..+\.[0-9a-f]{16}")
#: The index and the manifest of an artifact. A killed restore leaves a manifest without its index.
_OF_ARTIFACT = re.compile(r"[0-9a-f]{64}\.[0-9a-f]{16}\.(json|yaml)")


@dataclass(frozen=True)
class Damage:
    """One file that is not as it was restored.

    Attributes:
        entry: the folder's name in ``cache/``; for other files, their folder's path below DIR.
        file: None where the whole entry is missing or is no folder.
    """

    entry: str
    file: str | None
    wanted: str
    found: str

    def __str__(self) -> str:
        where = f"{self.entry}/{self.file}" if self.file else self.entry
        return f"{where}: wanted {self.wanted}, found {self.found}"


def find(dir: Folder, indexes: Sequence[Index]) -> list[Damage]:
    """All damage: missing entries, then what differs in the others, then what differs in our own files."""
    damage = []
    for path in sorted({path for index in indexes for path in index.folders}):
        damage += _in_folder(dir, path, [entry for index in indexes for entry in index.folders.get(path, ())])
    damage += [*_in_own(dir, indexes), *_in_stand_in(dir, indexes)]
    for part in filter(None, (index.baked for index in indexes)):
        # An artifact's caches need not be restored, and a bake in this folder may have taken their place.
        if baked.read(dir.path) == part.record:
            damage += in_baked(dir, part)
    return damage


def in_baked(dir: Folder, part: BakedPart) -> list[Damage]:
    """What differs in DIR's baked caches from those of an artifact.

    An engine leaves these files as they are: it writes the same bytes again, and adds files (vLLM 0.25.0, by their
    sha256 before and after a start on a virtual GPU and on an H200).
    """
    by_folder: dict[str, list[BakedFile]] = {}
    for file in part.files:
        by_folder.setdefault(f"{baked.FOLDER}/{file.path}".rpartition("/")[0], []).append(file)
    damage = []
    for path, baked_files in sorted(by_folder.items()):
        try:
            with open_below(dir, path) as folder:
                for file in baked_files:
                    name = file.path.rpartition("/")[2]
                    if differs := _difference(folder, name, file.size, file.sha256):
                        damage.append(Damage(path, name, *differs))
        except OSError as error:
            damage.append(Damage(path, None, "a folder", _words(error)))
    return damage


def _in_folder(dir: Folder, path: str, entries: Sequence[Entry]) -> list[Damage]:
    """What is wrong with the entries in the folder ``path`` below DIR."""
    expected = {entry.name: entry for entry in entries}
    prefix = "" if path == CACHE else f"{path}/"
    damage = []
    try:
        with open_below(dir, path) as cache:
            statuses = {name: _kind(cache, name) for name in expected}
            damage += [
                Damage(prefix + name, None, "an entry", "none") for name in sorted(expected) if not statuses[name]
            ]
            for name in sorted(expected):
                if statuses[name] == "a folder":
                    damage += _in_entry(cache, prefix, expected[name])
                elif statuses[name]:
                    damage.append(Damage(prefix + name, None, "a folder", statuses[name]))
    except OSError as error:
        damage = [Damage(path, None, "a folder", _words(error))] if expected else []
    return damage


def _in_entry(cache: Folder, prefix: str, entry: Entry) -> list[Damage]:
    where = prefix + entry.name
    try:
        with cache.open(entry.name) as folder:
            damage = [
                Damage(where, file.name, *differs)
                for file in sorted(entry.files, key=lambda file: file.name)
                if (differs := _difference(folder, file.name, file.size, file.sha256))
            ]
            return damage + _extra(folder, where, {file.name for file in entry.files})
    except OSError as error:
        return [Damage(where, None, "a folder that can be read", _words(error))]


def _in_stand_in(dir: Folder, indexes: Sequence[Index]) -> Iterator[Damage]:
    """What differs in the stand-in for FlashInfer's package of modules: Python runs it in the serving process."""
    wanted = {stand_in_of(index.flashinfer) for index in indexes if index.flashinfer}
    if not wanted:
        return
    where, _, name = STAND_IN.rpartition("/")
    try:
        with open_below(dir, PYTHON) as python:
            yield from _extra(python, PYTHON, {stand_in.PACKAGE})
            with python.open(stand_in.PACKAGE) as package:
                bytecode = NO_BYTECODE.rpartition("/")[2]
                yield from _extra(package, where, {name, bytecode})
                if package.read(bytecode, _READ_BYTES) or package.read(name, _READ_BYTES) not in wanted:
                    yield Damage(where, name, "what this version of cachebuilder writes", "a changed one")
    except OSError as error:
        yield Damage(where, name, "a file", _words(error))


def _difference(folder: Folder, name: str, size: int, sha256: str) -> tuple[str, str] | None:
    """What was wanted and what was found; None where the file is as it should be."""
    try:
        with folder.open_file(name) as file:
            length = os.fstat(file.fileno()).st_size
            if length != size:
                return f"{size} bytes", f"{length}"
            digest = hashlib.sha256()
            while size and (part := file.read(min(size, _READ_BYTES))):
                digest.update(part)
                size -= len(part)
    except FileNotFoundError:
        return "a file", "none"
    except OSError as error:
        return "a file", _words(error)
    return None if digest.hexdigest() == sha256 else (f"sha256 {sha256[:16]}…", f"{digest.hexdigest()[:16]}…")


def _in_own(dir: Folder, indexes: Sequence[Index]) -> Iterator[Damage]:
    """What differs in cachebuilder/ from what a restore of these artifacts writes there."""
    where = f"{FOLDER}/bin"
    try:
        with dir.open(FOLDER) as own:
            yield from _extra(own, FOLDER, {"bin", "artifacts", *_OTHERS})
            with own.open("artifacts") as artifacts:
                allowed = {name for name in artifacts.names() if _OF_ARTIFACT.fullmatch(name)}
                yield from _extra(artifacts, f"{FOLDER}/artifacts", allowed)
            with own.open("bin") as bin:
                yield from _extra(bin, where, {NVCC, VERSION})
                for name in (NVCC, VERSION):
                    yield from _in_frozen(bin, name, indexes)
    except OSError as error:
        yield Damage(where, None, "cachebuilder's own files", _words(error))


def _in_frozen(bin: Folder, name: str, indexes: Sequence[Index]) -> Iterator[Damage]:
    """What differs in one file of the frozen nvcc, which is the one of the artifact that was restored last."""
    where = f"{FOLDER}/bin"
    contents = {
        files(index.fingerprint.compiler, index.name, index.fingerprint_digest)[f"{where}/{name}"][0]
        for index in indexes
    }
    try:
        data = bin.read(name, _READ_BYTES)
        executable = bool(bin.status(name).st_mode & stat.S_IXUSR)
    except FileNotFoundError:
        yield Damage(where, name, "a file", "none")
    except OSError as error:
        yield Damage(where, name, "what this version of cachebuilder writes", _words(error))
    else:
        if data not in contents:
            wanted = "what this version of cachebuilder writes"
            yield Damage(where, name, wanted, "another version's or a changed one")
        elif name == NVCC and not executable:
            yield Damage(where, name, "a file that can be executed", "one that cannot")


def _extra(folder: Folder, where: str, allowed: set[str]) -> list[Damage]:
    """What is in a folder that is not allowed there."""
    return [
        Damage(where, name, "no such file", _kind(folder, name) or "one that has just gone")
        for name in folder.names()
        if name not in allowed and not _UNFINISHED.fullmatch(name)
    ]


def _kind(folder: Folder, name: str) -> str:
    """What something in a folder is, in words; empty where there is nothing."""
    try:
        mode = folder.status(name).st_mode
    except OSError:
        return ""
    if stat.S_ISDIR(mode):
        return "a folder"
    return "a link" if stat.S_ISLNK(mode) else "a file" if stat.S_ISREG(mode) else "another kind of file"


def _words(error: OSError) -> str:
    """The end of an error's text, for ``wanted a file, found …``."""
    return (error.strerror or str(error)).rpartition("found ")[2]
