"""``cachebuilder cache``."""

from __future__ import annotations

import re
from typing import Any

import click

from cachebuilder.cli import console, shared, table, words
from cachebuilder.common import kept

_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
_BYTES = {"": 1, "k": 1000, "M": 1000**2, "G": 1000**3, "T": 1000**4}


class _Age(click.ParamType[float]):
    """A time span such as ``30d`` or ``12h``, in seconds."""

    name = "age"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        match = re.fullmatch(r"(\d+)([smhdw])", str(value))
        if match is None:
            self.fail(f"wanted a number and s, m, h, d or w, such as 30d; found {value!r}", param, ctx)
        return float(match[1]) * _SECONDS[match[2]]


class _Size(click.ParamType[int]):
    """A number of bytes such as ``10GB`` or ``500MB``."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        match = re.fullmatch(r"(\d+(?:\.\d+)?)([kMGT]?)B?", str(value))
        if match is None:
            self.fail(f"wanted a number and kB, MB, GB or TB, such as 10GB; found {value!r}", param, ctx)
        return int(float(match[1]) * _BYTES[match[2]])


@click.group()
def cache() -> None:
    """Show or shrink the cache folder, which holds plans, compiled kernels and what `run` restored.

    Everything in it can be made again. All three commands are safe while a build runs.
    """


@cache.command()
@shared.json_option
def dir(as_json: bool) -> None:
    """Print the path of the cache folder, and the size of each part."""
    usage = kept.usage()
    if as_json:
        console.echo_json(usage.to_json())
        return
    console.echo(usage.folder)
    for part in usage.parts:
        table.line(part.name, f"{words.size(part.bytes):>9} in {part.items:>5}: {part.holds}", column=12)


@cache.command()
@click.option("--older-than", type=_Age(), metavar="AGE", help="Remove items unused for this long, such as 30d or 12h.")
@click.option(
    "--max-size",
    type=_Size(),
    metavar="SIZE",
    help="Then remove the least recently used items until the folder is down to this size, such as 10GB.",
)
@click.option("--dry-run", is_flag=True, help="Remove nothing; print what would be removed.")
def prune(older_than: float | None, max_size: int | None, dry_run: bool) -> None:
    """Remove items by the time since their last use, by the size of the folder, or both."""
    if older_than is None and max_size is None:
        raise click.UsageError("wanted --older-than AGE, --max-size SIZE, or both")
    _print_removed(kept.prune(unused_seconds=older_than, max_bytes=max_size, dry_run=dry_run), dry_run)


@cache.command()
def clean() -> None:
    """Remove everything that no running process uses."""
    _print_removed(kept.prune(unused_seconds=0), dry_run=False)


def _print_removed(removed: kept.Removed, dry_run: bool) -> None:
    verb = "would remove" if dry_run else "removed"
    in_use = f"; {words.several(removed.in_use, 'item')} in use left alone" if removed.in_use else ""
    console.echo(f"{verb} {words.several(removed.items, 'item')}, {words.size(removed.bytes)}{in_use}")
