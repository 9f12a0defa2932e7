"""Object stores through `fsspec`: ``s3://…``, ``gs://…``, and whatever else it has a file system for.

Stores have no digest in common, so a location may state one: ``s3://b/a.tar.zst#sha256=…``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from cachebuilder.artifact.whole import read_beside, read_bytes
from cachebuilder.errors import InstallationError, TransferError
from cachebuilder.ship.description import BESIDE
from cachebuilder.ship.download import RemoteFile, Target, download
from cachebuilder.ship.locations import printable, shown
from cachebuilder.ship.pull import Check, put_beside
from cachebuilder.ship.retry import Again, Retries

#: Bytes of one request: a broken one costs no more than this again.
_RANGE_BYTES = 16 << 20
_PIN = re.compile(r"sha256=([0-9a-f]{64})")
_FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,254}")


@dataclass(frozen=True)
class Stored:
    """An object as the store describes it now; its version is its ETag, or what the store has instead."""

    size: int
    version: str


class Store:
    """One object, and the objects beside it that are signed.

    Attributes:
        location: what messages and records call it: without a user, a password or a signed query.

    Raises:
        InstallationError: the package for this scheme is not installed.
        TransferError: from every call: the store cannot be reached, refuses, or has no such object.
    """

    def __init__(self, location: str, retries: Retries) -> None:
        url, _, pin = location.partition("#")
        self.location = shown(url)
        self._retries = retries
        self.sha256: str | None = None
        if pin:
            if (match := _PIN.fullmatch(pin)) is None:
                raise TransferError(
                    f"{self.location}: wanted #sha256= and 64 hexadecimal digits, found #{printable(pin)}"
                )
            self.sha256 = match[1]
        if "::" in url or not _FILE.fullmatch(url.rpartition("/")[2]):
            raise TransferError(
                f"{self.location}: wanted an object's name at the end, as in s3://bucket/caches/a.tar.zst"
            )
        self._fs, self._path = _open(url, self.location)

    @property
    def name(self) -> str:
        """The last part of the object's name."""
        return self.location.rpartition("/")[2]

    def describe(self) -> Stored:
        """The object as it is now."""
        info = self._ask("info", self._path)
        size = info.get("size")
        if info.get("type") != "file" or type(size) is not int:
            raise TransferError(f"{self.location}: wanted an object, found a folder or something else")
        version = info.get("ETag") or info.get("etag") or info.get("md5Hash") or self._fs.ukey(self._path)
        return Stored(size, str(version).strip('"'))

    def fetch(self, stored: Stored, to: Callable[[str], Target], check: Check | None = None) -> Path:
        """Fetch the object and the signed objects beside it; arguments, result and errors as of `Puller.fetch`."""
        remote = RemoteFile(
            self.location,
            stored.size,
            version=f"{self.location} {stored.version}",
            sha256=self.sha256,
            read=lambda offset: (offset, self._ranges(offset, stored)),
        )
        with to(self.name) as target:

            def accept(whole: BinaryIO) -> None:
                if self.describe() != stored:
                    raise TransferError(f"{self.location}: the object changed during the fetch", hint="fetch it again")
                files = self._read_beside()
                if check is not None:
                    check(whole.read(), files)
                put_beside(target, files)

            download(remote, target, self._retries, accept)
            return target.path

    def put(self, artifact: Path) -> None:
        """Store an artifact under this name, after the signed files beside it."""
        data = read_bytes(artifact)
        for suffix, (_, most) in BESIDE.items():
            beside = read_beside(artifact.with_name(artifact.name + suffix), most)
            if beside is not None:
                self._ask("pipe_file", self._path + suffix, beside)
            elif self._ask("exists", self._path + suffix):
                self._ask("rm_file", self._path + suffix)
        self._ask("pipe_file", self._path, data)
        self._retries.watcher.progress(f"push {artifact.name}", len(data), len(data))

    def _ranges(self, offset: int, stored: Stored) -> Iterator[bytes]:
        while offset < stored.size:
            end = min(offset + _RANGE_BYTES, stored.size)
            try:
                part = self._fs.cat_file(self._path, start=offset, end=end, **self._deadline(end - offset))
            except Exception as error:
                raise _failure(error, self.location) from None
            if not part:
                return
            yield part
            offset += len(part)

    def _read_beside(self) -> dict[str, bytes]:
        """The signed objects beside this one, by suffix."""
        files = {}
        for suffix, (_, most) in BESIDE.items():
            path = self._path + suffix
            if not self._ask("exists", path):
                continue
            size = self._ask("info", path).get("size")
            if type(size) is not int or size > most:
                raise TransferError(f"{self.location}{suffix}: wanted at most {most} bytes, found {size}")
            files[suffix] = self._ask("cat_file", path, start=0, end=size)
        return files

    def _ask(self, method: str, *arguments: Any, **options: Any) -> Any:
        """Call a method of the file system, and try again where that may help."""
        size = max([_RANGE_BYTES, *(len(data) for data in arguments if isinstance(data, bytes))])

        def once() -> Any:
            try:
                return getattr(self._fs, method)(*arguments, **options, **self._deadline(size))
            except Exception as error:
                raise _failure(error, self.location) from None

        return self._retries.run(once)

    def _deadline(self, size: int) -> dict[str, float]:
        """The option that ends a call which does not come to an end: fsspec's `sync` takes it for its own stores."""
        patience = self._retries.patience
        is_async = getattr(self._fs, "async_impl", False)
        return {"timeout": patience.seconds + size / patience.bytes_per_second} if is_async else {}


def put_all(destination: str, artifacts: Sequence[Path], retries: Retries) -> list[str]:
    """Store one artifact as ``destination``, or several in it if it ends with ``/``; returns each one's location."""
    if not destination.endswith("/") and len(artifacts) > 1:
        raise TransferError(
            f"{shown(destination)}: wanted a folder, which ends with /, for {len(artifacts)} artifacts, "
            "found an object's name"
        )
    locations = []
    for artifact in artifacts:
        store = Store(destination + artifact.name if destination.endswith("/") else destination, retries)
        store.put(artifact)
        locations.append(store.location)
    return locations


def _open(url: str, location: str) -> tuple[Any, str]:
    import fsspec  # slow to import

    try:
        # Without a cache of listings, so that each `describe` asks the store.
        fs, path = fsspec.url_to_fs(url, use_listings_cache=False)
    except ImportError as error:
        raise InstallationError(
            f"{location}: {_words(error)}",
            hint="s3:// needs pip install 'cachebuilder[ship]', gs:// needs gcsfs",
        ) from None
    except ValueError as error:
        raise TransferError(f"{location}: {_words(error)}") from None
    except Exception as error:
        raise TransferError(f"{location}: {type(error).__name__}: {_words(error)}") from None
    return fs, path


def _failure(error: Exception, what: str) -> Exception:
    """The error of a store's library as `Again` or a `TransferError`. Each library raises exceptions of its own."""
    if isinstance(error, FileNotFoundError):
        return TransferError(f"{what}: not found", hint="check the bucket and the name")
    text = f"{type(error).__name__}: {_words(error)}"
    if "Skewed" in text or "RequestExpired" in text or "request signature we calculated" in text:
        return TransferError(f"{what}: {text}", hint="check this machine's clock (date), then the credentials")
    if isinstance(error, PermissionError) or type(error).__name__ == "NoCredentialsError":
        return TransferError(f"{what}: {text}", hint="check the credentials; the store's own library reads them")
    if isinstance(error, (OSError, TimeoutError)) or type(error).__module__.startswith(("aiohttp", "botocore")):
        return Again(TransferError(f"{what}: {text}", hint="run the same command again once the store can be reached"))
    return TransferError(f"{what}: {text}")


def _words(error: Exception) -> str:
    """A library's own text, which may hold the location that it was given."""
    return printable(shown(str(error)))
