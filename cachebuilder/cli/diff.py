"""``cachebuilder diff``."""

from __future__ import annotations

from pathlib import Path

import click

from cachebuilder.cli import console, remote, shared, table
from cachebuilder.inspecting.diff import Comparison, compare, read

_EITHER = remote.LocationType(path_type=Path, exists=True)


@click.command()
@click.argument("a", type=_EITHER)
@click.argument("b", type=_EITHER)
@shared.json_option
def diff(a: Path, b: Path, as_json: bool) -> None:
    """Compare A and B, each an artifact or a restored folder. Exits with 0 if they are equal, with 1 if not."""
    comparison = compare(read(a), read(b))
    if as_json:
        console.echo_json(comparison.to_json())
    else:
        _print(comparison)
    if not comparison.same:
        raise click.exceptions.Exit(1)


def _print(comparison: Comparison) -> None:
    if not comparison.fingerprint:
        table.line("fingerprint", "equal", table.GOOD, column=13)
    for difference in comparison.fingerprint:
        table.line("fingerprint", difference.field, table.UNSURE, column=13)
        a, b = difference.short()
        console.echo(f"  A: {a}\n  B: {b}")
    for title, entries in (("only in A", comparison.only_a), ("only in B", comparison.only_b)):
        for entry in entries:
            table.line(title, entry, table.UNSURE, column=13)
    for changed in comparison.changed:
        table.line("other bytes", changed.entry, table.BAD, column=13)
        table.line("", ", ".join(changed.files), column=13)
    console.echo(
        f"kernels      {len(comparison.equal)} equal, {len(comparison.changed)} with other bytes, "
        f"{len(comparison.only_a)} only in A, {len(comparison.only_b)} only in B"
    )
