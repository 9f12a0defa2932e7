"""Kernels that were missed although the cache has their source: how the request's key differs from the entry's.

A key holds the source, nvcc's flags, the headers and the compiler's text; a legacy key also holds the install path. The
log has nvcc's command line. It comes from machines that serve models, perhaps through several hands: what it names is
opened only where `Folder` and `is_safe` allow it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Self

from cachebuilder.artifact.index import CACHE, Entry, Fingerprint, Index
from cachebuilder.common.folders import Folder, is_safe
from cachebuilder.deepgemm import entries as entry_files
from cachebuilder.deepgemm import environment as variables
from cachebuilder.deepgemm import installation as installations
from cachebuilder.deepgemm.command import Command
from cachebuilder.deepgemm.source import is_deep_gemms, read_shape
from cachebuilder.errors import ArtifactError, InstallationError
from cachebuilder.restoring import frozen
from cachebuilder.restoring.compatibility import Difference, difference
from cachebuilder.restoring.folder import RestoredFolder, open_folder
from cachebuilder.restoring.machine import Machine

#: What the frozen nvcc puts after the beginning of a command that is too long for its log.
_CUT = "..."
_COMMAND = re.compile(r"[ -~]{1,4096}")
#: The beginning of a legacy source's first line.
_HEADERS_HASH = b"// Includes' hash value: "
_ARCH, _STANDARD = "--gpu-architecture=", "-std="


@dataclass(frozen=True)
class Request:
    """A request to the frozen nvcc, as a line of its log has it.

    Attributes:
        nvcc: the frozen nvcc's path.
        whole: False where the log has only the beginning of the command.
    """

    nvcc: Path
    command: Command
    whole: bool

    @classmethod
    def of(cls, command: object) -> Self | None:
        """The request in the ``command`` of a line; None where it has no flag, as none of DeepGEMM's."""
        if not isinstance(command, str) or not _COMMAND.fullmatch(command):
            return None
        whole = not command.endswith(_CUT)
        nvcc, _, words = (command if whole else command.rpartition(" ")[0]).partition(" ")
        parsed = Command.parse(words)
        return cls(Path(nvcc), parsed, whole) if parsed.flags else None


@dataclass(frozen=True)
class Comparison:
    """A missed kernel beside the cache that was served from.

    Attributes:
        folder: the restored folder; None where it was not found.
        entry: the entry with the kernel's source; None where the cache has none.
        differences: between the key of the entry, or what the artifact was built with, and that of the request.
        unknown: a part of the request's key that cannot be known here, in words.
    """

    folder: str | None = None
    entry: str | None = None
    differences: tuple[Difference, ...] = ()
    unknown: str | None = None

    def advice(self) -> str | None:
        """What to do about a kernel that the cache has; None where it has none."""
        if self.entry is None:
            return None
        known = f"do not add it: the cache has this source, as {self.entry}"
        if self.differences:
            return f"{known}, under another key, since the request differs in:"
        other_causes = (
            f"the request was made before {self.folder} was restored, or DeepGEMM did not look into it "
            "(DG_JIT_CACHE_DIR must lead there: cachebuilder env)"
        )
        if self.unknown:
            return f"{known}; {self.unknown}. If they are the same, {other_causes}"
        return f"{known}, under this request's key: {other_causes}"


NOT_COMPARED = Comparison()


class Caches:
    """The restored folders that the requests in logs were made to.

    Args:
        dir: the only one, where the user names it. Otherwise a log in ``DIR/cachebuilder`` is of DIR, and the lines of
            another one name the frozen nvcc of their folder.

    Raises:
        ArtifactError: ``dir`` is no restored folder.
    """

    def __init__(self, dir: Path | None) -> None:
        self._dir = dir
        self._opened: dict[Path, _Cache | None] = {} if dir is None else {dir: _Cache(open_folder(dir))}

    def compare(self, log: Path, request: Request | None, source: str | None) -> Comparison:
        """Compare a request for the kernel with this source with the cache that did not serve it."""
        dir = self._dir or _folder_of(log) or (frozen.dir_of(request.nvcc) if request else None)
        if dir is None or source is None or not is_deep_gemms(source):
            return NOT_COMPARED
        if dir not in self._opened:
            try:
                self._opened[dir] = _Cache(open_folder(dir))
            except ArtifactError:  # another machine's
                self._opened[dir] = None
        cache = self._opened[dir]
        return cache.compare(request, source) if cache else NOT_COMPARED


def _folder_of(log: Path) -> Path | None:
    """The restored folder that a log is in, by its path; None where it is in none."""
    parent = Path(os.path.abspath(log)).parent
    return parent.parent if parent.name == frozen.FOLDER else None


class _Cache:
    """One restored folder, and where to find a source in it."""

    def __init__(self, folder: RestoredFolder) -> None:
        self._folder = folder
        self._compared: dict[tuple[Request | None, str], Comparison] = {}

    def compare(self, request: Request | None, source: str) -> Comparison:
        key = request, source
        if key not in self._compared:
            self._compared[key] = self._compare(request, source.encode())
        return self._compared[key]

    def _compare(self, request: Request | None, source: bytes) -> Comparison:
        index, entry = self._same_source.get(_digest(source), (None, None))
        if entry is None and _is_legacy(source):
            index, entry = self._same_body.get(_digest(_body(source)), (None, None))
        index = index or self._folder.indexes[0]
        differences, unknown = self._differences(index, entry, request, source)
        return Comparison(str(self._folder.path), entry.name if entry else None, tuple(differences), unknown)

    def _differences(
        self, index: Index, entry: Entry | None, request: Request | None, source: bytes
    ) -> tuple[list[Difference], str | None]:
        """How a request differs from what an artifact was built with; and what of it cannot be known, in words."""
        fingerprint = index.fingerprint
        generation = "legacy" if _is_legacy(source) else "deepjit"
        if generation != fingerprint.generation:
            return [difference(fingerprint, "generation", fingerprint.generation, generation)], None
        differences = []
        if entry and generation == "legacy":
            wanted, found = (_headers_hash(text) for text in (self._read(entry, entry_files.SOURCE), source))
            if wanted != found:
                differences.append(difference(fingerprint, "headers", wanted, found))
        if entry is None and (sm_counts := self._other_sm_counts(source)):
            differences.append(difference(fingerprint, "sm_counts", *sm_counts))
        if request is None:
            return differences, "its line in the log has no flags, and these may differ"
        if example := entry or next(iter(index.entries), None):
            differences += flags(fingerprint, self._command(index, example), request, known_only=entry is None)
        if generation == "legacy":
            return differences, None
        include = next(iter(request.command.includes), "an unknown folder")
        headers = _installed_headers(include, index)
        if headers is None:
            return differences, f"the headers in {include} cannot be read here and may differ"
        return differences + headers, None

    def _other_sm_counts(self, source: bytes) -> tuple[str, str] | None:
        """The SM counts that the folder's kernels are for, and that of ``source``, where it is none of them."""
        known = {count for index in self._folder.indexes for count in index.fingerprint.sm_counts}
        shape = read_shape(source.decode())
        if shape is None or shape.sm_count in known:
            return None
        return ", ".join(map(str, sorted(known))), str(shape.sm_count)

    def _command(self, index: Index, entry: Entry) -> Command:
        """The command that DeepGEMM compiles an entry with."""
        if index.fingerprint.legacy_flags is not None:
            return Command.parse(index.fingerprint.legacy_flags)
        try:
            command = json.loads(self._read(entry, entry_files.METADATA))["command"]
            return Command.parse(command.partition(" ")[2])
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return Command((), ())

    def _read(self, entry: Entry, file: str) -> bytes:
        """A file of an entry; empty where it cannot be read."""
        try:
            with Folder.at(self._folder.path) as dir, dir.open(CACHE) as cache, cache.open(entry.name) as folder:
                return folder.read(file, entry_files.MAX_BYTES[file])
        except OSError:
            return b""

    @cached_property
    def _same_source(self) -> Mapping[str, tuple[Index, Entry]]:
        """sha256 of a source → its entry."""
        return {
            file.sha256: (index, entry)
            for index in self._folder.indexes
            for entry in index.entries
            for file in entry.files
            if file.name == entry_files.SOURCE
        }

    @cached_property
    def _same_body(self) -> Mapping[str, tuple[Index, Entry]]:
        """sha256 of a legacy source without its first line, which has the hash of the headers → its entry."""
        return {
            _digest(_body(self._read(entry, entry_files.SOURCE))): (index, entry)
            for index in self._folder.indexes
            for entry in index.entries
        }


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _is_legacy(source: bytes) -> bool:
    return source.startswith(_HEADERS_HASH)


def _headers_hash(source: bytes) -> str:
    """The hash of the headers in a legacy source's first line."""
    return _shown(source.partition(b"\n")[0].removeprefix(_HEADERS_HASH))


def _body(source: bytes) -> bytes:
    return source.partition(b"\n")[2]


def _shown(text: str | bytes) -> str:
    """A text as the frozen nvcc's log has it."""
    data = text.encode() if isinstance(text, str) else text
    return "".join(chr(byte) if 32 <= byte < 127 else "?" for byte in data)


def _installed_headers(include: str, index: Index) -> list[Difference] | None:
    """How the DeepGEMM with this include folder differs from the artifact's; None where it cannot be read here."""
    package = Path(include).parent
    try:
        with Folder.at(package) as folder, Folder.at(Path(include)) as headers, headers.open("deep_gemm") as own:
            if not (is_safe(folder.status()) and is_safe(own.status())):
                return None
        differences = Machine(installations.find(package)).differences(index)
    except (OSError, InstallationError):
        return None
    return [one for one in differences if one.causes_miss]


def flags(fingerprint: Fingerprint, wanted: Command, request: Request, known_only: bool) -> list[Difference]:
    """How the flags of a request differ from those that the kernel was built with.

    Args:
        known_only: leave out flags that no known variable adds: DeepGEMM may give other kernels other flags.
    """
    if not wanted.flags:
        return []
    built, asked = Counter(map(_shown, wanted.flags)), Counter(request.command.flags)
    changed = [list(built - asked) if request.whole else [], list(asked - built)]
    differences = []
    if any(values := [[word for word in words if word.startswith(_ARCH)] for words in changed]):
        differences.append(difference(fingerprint, "arch", *map(_joined, values)))
    by_variable = variables.ADDED_FLAGS[fingerprint.generation]
    known = (_STANDARD, *(flag for flags in by_variable.values() for flag in flags))
    lacking, added = (
        [word for word in words if not word.startswith(_ARCH) and (not known_only or word.startswith(known))]
        for words in changed
    )
    if words := {*lacking, *added}:
        names = [name for name, flags in by_variable.items() if words.issuperset(flags)]
        if any(word.startswith(_STANDARD) for word in words):
            names.append(variables.CPP_STANDARD)
        remedy = _remedy(fingerprint, names)
        differences.append(Difference("flags", _joined(lacking), _joined(added), True, remedy))
    include, found = fingerprint.install_include, next(iter(request.command.includes), None)
    if include and found and _shown(include) != found:
        differences.append(difference(fingerprint, "install_include", include, found))
    return differences


def _joined(words: Sequence[str]) -> str:
    return " ".join(words) or "no such flag"


def _remedy(fingerprint: Fingerprint, names: Sequence[str]) -> str:
    """What to do about flags that one or several of these variables change."""
    generation = fingerprint.generation
    built_with = [pair for name in names if (pair := variables.get(generation, fingerprint.environment, name))]
    if built_with:
        pairs = " ".join(map("=".join, built_with))
        return f"the artifact was built with {pairs}: set it where DeepGEMM serves, as cachebuilder env does"
    if not names:
        return "no variable of DeepGEMM changes them: build with the DeepGEMM that serves"
    first, *others = variables.PREFIXES[generation]
    same = f" (and the same with {others[0]}_)" if others else ""
    spelled = ", ".join(f"{first}_{name}" for name in names)
    return (
        f"unset {spelled}{same} where DeepGEMM serves, or set the same value under environment: in the manifest and "
        "build again"
    )
