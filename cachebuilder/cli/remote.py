"""What the verbs share that take an artifact from elsewhere: ``oci://…``, ``s3://…``, ``file://…``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cachebuilder.artifact.trust import Trust
from cachebuilder.cli import shared
from cachebuilder.errors import InstallationError
from cachebuilder.restoring.machine import Machine

if TYPE_CHECKING:  # imports requests
    from cachebuilder.ship.retry import Retries


def is_remote(text: str | Path) -> bool:
    """Whether this is a location and not a path."""
    return "://" in str(text)


def local(text: Any) -> Any:
    """The path of a ``file://`` location; anything else as it is."""
    if not str(text).startswith("file://"):
        return text
    return Path("/" + str(text).removeprefix("file://").removeprefix("localhost").lstrip("/"))


class LocationType(click.Path):
    """A path, or a location, whose artifact is fetched and takes the location's place."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The path."""
        value = local(value)
        if is_remote(value):
            return fetched(str(value), Machine.here())
        return super().convert(value, param, ctx)


class NamedType(click.Path):
    """A path, or a location as it is: the verb fetches its artifact when it has all its options."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The path or the location's text."""
        value = local(value)
        return str(value) if is_remote(value) else super().convert(value, param, ctx)


@contextmanager
def retries() -> Iterator[Retries]:
    """How often to try again, with this command line's progress and remarks."""
    ready()
    from cachebuilder.ship.retry import Watcher, from_environment

    with shared.show_progress(in_bytes=True) as progress:
        yield from_environment(Watcher(progress, shared.remark))


def ready() -> None:
    """Raises `InstallationError` where the packages of the extra ``ship`` are missing."""
    try:
        import requests  # noqa: F401
    except ModuleNotFoundError as error:
        raise InstallationError(
            f"wanted {error.name}, which transfers need, found no such package",
            hint="pip install 'cachebuilder[ship]'",
        ) from None


def fetched(location: str, machine: Machine, trust: Trust | None = None, force: bool = False) -> Path:
    """The artifact at a location, as a file that stays until the verb ends; of several, the one that fits.

    Arguments as of `fetch.fetched`.
    """
    with retries() as tries:
        from cachebuilder.ship import fetch
        from cachebuilder.ship.locations import shown

        artifact = fetch.fetched(location, machine, tries, force=force, trust=trust)
        path = click.get_current_context().with_resource(artifact)
    shared.remark(f"fetched   {shown(location)} to {path}")
    return path
