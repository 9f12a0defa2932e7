"""A file system of `fsspec`, opened at a URL: its calls with retries and deadlines, its errors in our words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cachebuilder.common.files import is_full
from cachebuilder.errors import InstallationError, TransferError
from cachebuilder.ship.locations import printable, shown
from cachebuilder.ship.retry import Again, Retries

#: The data that a call moves unless its arguments say otherwise, for its deadline.
_USUAL_BYTES = 16 << 20


class Objects:
    """An object store.

    Attributes:
        location: what messages call it.
        fs: the file system of fsspec.
        path: the URL's path in it.

    Raises:
        InstallationError: the package for this scheme is not installed.
        TransferError: from every call: the store cannot be reached, or refuses.
    """

    def __init__(self, url: str, location: str, retries: Retries) -> None:
        self.location = location
        self._retries = retries
        self.fs, self.path = _open(url, location)

    @property
    def is_local(self) -> bool:
        """Whether it is a folder of this machine."""
        import fsspec.implementations.local as local  # slow to import

        return isinstance(self.fs, local.LocalFileSystem)

    def ask(self, method: str, *arguments: Any, **options: Any) -> Any:
        """Call a method of the file system, and try again where that may help."""
        size = max([_USUAL_BYTES, *(len(data) for data in arguments if isinstance(data, bytes))])

        def once() -> Any:
            try:
                return getattr(self.fs, method)(*arguments, **options, **self.deadline(size))
            except Exception as error:
                raise failure(error, self.location) from None

        return self._retries.run(once)

    def read(self, paths: Sequence[str]) -> dict[str, bytes]:
        """The objects at those of ``paths`` that exist; several at once where the file system can."""

        def once() -> dict[str, bytes]:
            try:
                answers = self.fs.cat(list(paths), on_error="return", **self.deadline(len(paths) << 20))
            except Exception as error:
                raise failure(error, self.location) from None
            for answer in answers.values():
                if isinstance(answer, Exception) and not _is_missing(answer):
                    raise failure(answer, self.location) from None
            return {path: data for path, data in answers.items() if isinstance(data, bytes)}

        return self._retries.run(once) if paths else {}

    def deadline(self, size: int) -> dict[str, float]:
        """The option that ends a call which does not come to an end: fsspec's `sync` takes it for its own stores."""
        patience = self._retries.patience
        is_async = getattr(self.fs, "async_impl", False)
        return {"timeout": patience.seconds + size / patience.bytes_per_second} if is_async else {}


def failure(error: Exception, what: str) -> Exception:
    """The error of a store's library as `Again` or a `TransferError`. Each library raises exceptions of its own."""
    if isinstance(error, FileNotFoundError):
        return TransferError(f"{what}: not found", hint="check the bucket and the name")
    text = f"{type(error).__name__}: {_words(error)}"
    if "Skewed" in text or "RequestExpired" in text or "request signature we calculated" in text:
        return TransferError(f"{what}: {text}", hint="check this machine's clock (date), then the credentials")
    if isinstance(error, PermissionError) or type(error).__name__ == "NoCredentialsError":
        return TransferError(f"{what}: {text}", hint="check the credentials; the store's own library reads them")
    if isinstance(error, OSError) and is_full(error):
        return TransferError(f"{what}: {text}", hint="make room there")
    if isinstance(error, (OSError, TimeoutError)) or type(error).__module__.startswith(("aiohttp", "botocore")):
        return Again(TransferError(f"{what}: {text}", hint="run the same command again once the store can be reached"))
    return TransferError(f"{what}: {text}")


def _is_missing(error: Exception) -> bool:
    return isinstance(error, FileNotFoundError | NotADirectoryError)


def _open(url: str, location: str) -> tuple[Any, str]:
    try:
        import fsspec  # slow to import

        # Without a cache of listings, so that each call asks the store.
        fs, path = fsspec.url_to_fs(url, use_listings_cache=False)
    except ImportError as error:
        raise InstallationError(
            f"{location}: {_words(error)}",
            hint="pip install 'cachebuilder[ship]', which brings s3://; gs:// needs gcsfs as well",
        ) from None
    except ValueError as error:
        raise TransferError(f"{location}: {_words(error)}") from None
    except Exception as error:
        raise TransferError(f"{location}: {type(error).__name__}: {_words(error)}") from None
    return fs, path


def _words(error: Exception) -> str:
    """A library's own text, which may hold the location that it was given."""
    return printable(shown(str(error)))
