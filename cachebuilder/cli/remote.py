"""What the verbs share that take an artifact from elsewhere: ``oci://…``, ``s3://…``, ``file://…``."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cachebuilder.cli import shared
from cachebuilder.errors import InstallationError, SignatureError
from cachebuilder.restoring import frozen
from cachebuilder.restoring.compatibility import with_environment

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cachebuilder.artifact.signature import TrustedKey
    from cachebuilder.cuda.nvml import VisibleGpu
    from cachebuilder.deepgemm.installation import Installation
    from cachebuilder.ship.fetch import Wish
    from cachebuilder.ship.pull import Check
    from cachebuilder.ship.retry import Retries


def is_remote(text: str | Path) -> bool:
    """Whether this names something that is not a path."""
    return "://" in str(text)


def local(text: Any) -> Any:
    """The path of a ``file://`` location; anything else as it is."""
    if not str(text).startswith("file://"):
        return text
    return Path("/" + str(text).removeprefix("file://").removeprefix("localhost").lstrip("/"))


class LocationType(click.Path):
    """A path, or a location whose artifact is fetched and takes its place."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The path."""
        value = local(value)
        if is_remote(value):
            with retries() as tries:
                return fetched(str(value), here(), tries)
        return super().convert(value, param, ctx)


class NamedType(click.Path):
    """A path, or a location as it is: the verb fetches it, when it knows what for."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The path or the location's text."""
        value = local(value)
        return str(value) if is_remote(value) else super().convert(value, param, ctx)


@contextmanager
def retries() -> Iterator[Retries]:
    """How often to try, with this command line's progress and remarks."""
    ready()
    from cachebuilder.ship.retry import Watcher, from_environment

    with shared.show_progress(in_bytes=True) as progress:
        yield from_environment(Watcher(progress, shared.remark))


def ready() -> None:
    """Raises `InstallationError` where the extra is not installed."""
    try:
        import requests  # noqa: F401
    except ModuleNotFoundError as error:
        raise InstallationError(
            f"wanted {error.name}, which transfers need; it is not installed", hint="pip install 'cachebuilder[ship]'"
        ) from None


def fetched(location: str, wish: Wish, tries: Retries, trusted: Sequence[TrustedKey] | None = None) -> Path:
    """The artifact at a location, as a file; with keys, only with a signature of one of them."""
    from cachebuilder.ship import fetch

    path = fetch.fetch(location, wish, tries, checker(trusted, location))
    shared.remark(f"fetched   {location} to {path}")
    return path


def checker(trusted: Sequence[TrustedKey] | None, what: str) -> Check | None:
    """What tells whether an artifact's signature is of one of these keys. ``what``: what it is called in errors."""
    if trusted is None:
        return None
    from cachebuilder.artifact import provenance, signature
    from cachebuilder.artifact.whole import read_bytes

    def check(path: Path, files: dict[str, bytes]) -> None:
        if signature.SUFFIX not in files:
            raise SignatureError(
                f"{what}: not signed: no signature is with it", hint="cachebuilder sign, then push again"
            )
        data = read_bytes(path)
        signature.check(data, files[signature.SUFFIX], trusted, what)
        if envelope := files.get(provenance.SUFFIX):
            provenance.open_envelope(envelope, trusted, hashlib.sha256(data).hexdigest(), f"{what}: provenance")

    return check


def here(deep_gemm: Path | None = None) -> Wish:
    """Of several artifacts, the one for this machine; a single one is taken as it is, and the machine not looked at."""
    from cachebuilder.ship.fetch import Wish

    @cache
    def machine() -> tuple[Installation | None, VisibleGpu | None]:
        from cachebuilder.cuda import nvml

        return installation(deep_gemm), nvml.first_gpu()

    return Wish(lambda index: with_environment(index, *machine(), os.environ, relocates=True))


def wish(found: Installation | None, gpu: VisibleGpu | None, *, to: Path | None = None, force: bool = False) -> Wish:
    """Of several artifacts, the one that a restore would take. ``to``: where it goes."""
    from cachebuilder.ship.fetch import Wish

    nvcc = str(frozen.frozen_nvcc(Path(os.path.abspath(to)))) if to else None
    return Wish(
        lambda index: with_environment(index, found, gpu, os.environ, relocates=True, frozen_nvcc=nvcc), force=force
    )


def installation(deep_gemm: Path | None) -> Installation | None:
    """The DeepGEMM that serves here; None where none was found and none was named."""
    from cachebuilder.deepgemm import installation as installations

    try:
        return installations.find(deep_gemm)
    except InstallationError:
        if deep_gemm is not None:
            raise
        return None
