"""Plans and compiled kernels that several builders share: objects in a store behind a URL, written once.

An object is a line of JSON, its `Header`, and then the result's bytes. Each result lies under the digest of everything
that it depends on, so two builders that make the same one must get the same bytes. If they do not, one of them is
wrong: that is an error which names both.

Who may write there decides which kernels are served (docs/explanation/threats.md): give the right to write to builders
that are trusted, and let all others only read.
"""

from __future__ import annotations

import hashlib
import os
import socket
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from cachebuilder.common import records
from cachebuilder.common.records import Line, Record, RecordError, Sha256
from cachebuilder.errors import StoreError, TransferError
from cachebuilder.ship.locations import printable, shown
from cachebuilder.ship.objects import Objects, failure
from cachebuilder.ship.retry import Again, Retries, Watcher, from_environment

#: Names the builder in what it writes; default: this machine's name.
BUILDER_VARIABLE = "CACHEBUILDER_BUILDER"
_MAX_HEADER_BYTES = 4096
_REQUESTS_AT_ONCE = 16


class Header(Record):
    """What stands before a result's bytes.

    Attributes:
        name: the object's own name, so that an object which was moved is not taken for another one.
        sha256: of the result's bytes.
        builder: who made it.
        written: when, UTC, ISO 8601.
    """

    name: Line
    sha256: Sha256
    builder: Line
    written: Line


def open_store(
    url: str, *, read_only: bool = False, notice: Callable[[str], object] = lambda text: None
) -> SharedStore:
    """Open a store that builders share.

    Args:
        url: ``s3://BUCKET/FOLDER``, ``gs://…``, ``file:///…``, whatever else fsspec opens, or a folder.
        read_only: take plans and kernels from there, and write none.
        notice: called with a line for each failed try, and for each damaged object.

    Raises:
        InstallationError: the package for this scheme is not installed.
        TransferError: the folder cannot be opened, or ``CACHEBUILDER_RETRIES`` is not a number.
    """
    return SharedStore(url, from_environment(Watcher(notice=notice)), read_only=read_only)


class _Damage(ValueError):
    """An object that no builder can have written like this."""


class SharedStore:
    """A store of results, which implements `common.results.Results`.

    Args:
        url: a URL that fsspec opens, or a folder.
        retries: how often to try again; its watcher hears of damaged objects.
        read_only: take results from there, and write none.

    Raises:
        InstallationError: the package for this scheme is not installed.
        TransferError: from every call: the store cannot be reached, or refuses.
    """

    def __init__(self, url: str, retries: Retries, *, read_only: bool = False) -> None:
        self.url = url
        self.location = shown(url).rstrip("/")
        self.read_only = read_only
        self._retries = retries
        self._objects = Objects(url, self.location, retries)
        self._root = self._objects.path.rstrip("/")
        self._builder = printable(os.environ.get(BUILDER_VARIABLE) or socket.gethostname())
        self._damaged: set[str] = set()
        if self._objects.is_local and not read_only:
            self._make_root()

    def get(self, names: Sequence[str]) -> dict[str, bytes]:
        """Those of ``names`` that are there and whole, with their bytes.

        A damaged object counts as missing, and the watcher hears of it; `put` replaces it.
        """
        paths = {self._path(name): name for name in names}
        results = {}
        for path, data in self._objects.read(list(paths)).items():
            name = paths[path]
            try:
                results[name] = _parse(name, data)[1]
            except _Damage as damage:
                self._damaged.add(name)
                self._retries.watcher.notice(f"{self.location}/{name}: damaged: {damage}; it is made again")
        return results

    def absent(self, names: Sequence[str]) -> list[str]:
        """Those of ``names`` that are not there; none if the store is read-only, since they cannot be put there."""
        if self.read_only or not names:
            return []
        with ThreadPoolExecutor(min(len(names), _REQUESTS_AT_ONCE)) as pool:
            is_there = pool.map(lambda name: self._objects.ask("exists", self._path(name)), names)
            return [name for name, exists in zip(names, is_there, strict=True) if not exists]

    def put(self, name: str, data: bytes) -> None:
        """Store a result, unless it is there already. Does nothing if the store is read-only.

        Raises:
            StoreError: another result is there under this name.
        """
        if self.read_only:
            return
        content = self._with_header(name, data)
        if name in self._damaged:
            self._overwrite(name, content)
            self._damaged.discard(name)
        elif not self._create(name, content):
            self._require_same(name, content)

    def replace(self, name: str, data: bytes) -> None:
        """Store something that is no result, in place of what is there. Does nothing if the store is read-only."""
        if not self.read_only:
            self._overwrite(name, self._with_header(name, data))

    def check_writable(self) -> None:
        """Raise `TransferError` if nothing can be written there, before hours of work are lost to that."""
        self.replace("writable", b"")

    def names(self, folder: str) -> set[str]:
        """The names of all objects below a folder of the store."""
        try:
            paths = self._objects.ask("find", self._path(folder))
        except TransferError as error:
            if "not found" in str(error):
                return set()
            raise
        return {path[len(self._root) + 1 :] for path in paths if not path.rpartition("/")[2].startswith(".")}

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _with_header(self, name: str, data: bytes) -> bytes:
        header = Header(
            name=name,
            sha256=hashlib.sha256(data).hexdigest(),
            builder=self._builder,
            written=datetime.now(UTC).isoformat(timespec="seconds"),
        )
        return header.model_dump_json().encode() + b"\n" + data

    def _create(self, name: str, content: bytes) -> bool:
        """Write an object if there is none; returns whether there was none."""

        def once() -> bool:
            try:
                self._write(name, content, "create")
            except FileExistsError:
                return False
            except Exception as error:
                if _says_that_it_exists(error):
                    return False
                raise _with_hint(failure(error, f"{self.location}/{name}")) from None
            return True

        return self._retries.run(once)

    def _overwrite(self, name: str, content: bytes) -> None:
        """Write an object in place of what is there."""

        def once() -> None:
            try:
                self._write(name, content, "overwrite")
            except Exception as error:
                raise _with_hint(failure(error, f"{self.location}/{name}")) from None

        self._retries.run(once)

    def _write(self, name: str, content: bytes, mode: Literal["create", "overwrite"]) -> None:
        """Write an object, whole or not at all; "create" raises an error if it is there."""
        path = self._path(name)
        if self._objects.is_local:
            _write_file(path, content, os.link if mode == "create" else os.replace)
        else:  # of "create", s3fs, gcsfs and others make one conditional request (If-None-Match)
            self._objects.fs.pipe_file(path, content, mode=mode, **self._objects.deadline(len(content)))

    def _require_same(self, name: str, content: bytes) -> None:
        """Compare a result with the one that another builder has stored meanwhile."""
        path = self._path(name)
        own, _ = _parse(name, content)
        data = self._objects.read([path]).get(path)
        try:
            if data is None:
                raise _Damage("wanted an object, found none that can be read")
            other, _ = _parse(name, data)
        except _Damage as damage:
            self._retries.watcher.notice(f"{self.location}/{name}: damaged: {damage}; replaced")
            self._overwrite(name, content)
            return
        if other.sha256 != own.sha256:
            raise StoreError(
                f"{self.location}/{name}: two builders made different results of the same inputs: {other.builder} at "
                f"{other.written} (sha256 {other.sha256}), {own.builder} now (sha256 {own.sha256})",
                hint="find out which machine is wrong (compiler, memory, a changed file) before serving either; "
                "remove the object to accept the next result",
            )

    def _make_root(self) -> None:
        """Make the store's folder. Its parent must exist: a disk that is not mounted is not replaced by a folder."""
        try:
            Path(self._root).mkdir(exist_ok=True)
        except OSError as error:
            raise TransferError(
                f"{self.location}: cannot be opened: {error.strerror}",
                hint="the folder above it must exist; check that its disk is mounted",
            ) from None


def _parse(name: str, content: bytes) -> tuple[Header, bytes]:
    """An object's header and bytes. Raises `_Damage` if they do not belong to each other and to ``name``."""
    line, separator, data = content[:_MAX_HEADER_BYTES].partition(b"\n")
    if not separator:
        raise _Damage(f"wanted a header, found {len(content)} bytes without one")
    data = content[len(line) + 1 :]
    try:
        header = records.read(Header, line)
    except RecordError as error:
        raise _Damage(f"its header: {error}") from None
    if header.name != name:
        raise _Damage(f"wanted the object {name}, found {header.name}")
    if (digest := hashlib.sha256(data).hexdigest()) != header.sha256:
        raise _Damage(f"wanted sha256 {header.sha256}, found {digest}")
    return header, data


def _write_file(path: str, content: bytes, put: Callable[[str, str], None]) -> None:
    """Write a file beside ``path``, and have ``put`` give it that name."""
    folder = Path(path).parent
    folder.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=".", dir=folder)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            os.fchmod(file.fileno(), 0o644)
        put(temporary, path)
    finally:
        with suppress(OSError):
            os.unlink(temporary)


def _says_that_it_exists(error: Exception) -> bool:
    """Whether a conditional request failed because the object exists. Each library raises exceptions of its own."""
    words = f"{type(error).__name__} {error}"
    return any(word in words for word in ("PreconditionFailed", "Precondition Failed", "At least one of the pre-cond"))


def _with_hint(reason: Exception) -> Exception:
    """A refusal to write, with what to do."""
    refused = isinstance(reason, TransferError) and "Permission" in str(reason)
    if not refused or isinstance(reason, Again):
        return reason
    return TransferError(str(reason), hint="use credentials that may write, or only read: --read-only")
