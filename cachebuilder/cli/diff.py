"""``cachebuilder diff``."""

from __future__ import annotations

from pathlib import Path

import click

from cachebuilder.cli import remote, shared, table
from cachebuilder.inspecting import diff as comparing
from cachebuilder.inspecting import documents

_EITHER = remote.LocationType(path_type=Path, exists=True)


@click.command()
@click.argument("a", type=_EITHER)
@click.argument("b", type=_EITHER)
@shared.json_option
def diff(a: Path, b: Path, as_json: bool) -> None:
    """Compare A and B, each an artifact or a restored folder. Exits with 0 if they are equal, with 1 if not."""
    found = comparing.compare(comparing.read(a), comparing.read(b))
    if as_json:
        document = documents.Diff(
            same=found.same,
            fingerprint=tuple(documents.FieldDifference(d.field, d.wanted, d.found) for d in found.fields),
            only_a=found.only_a,
            only_b=found.only_b,
            equal=found.equal,
            changed=tuple(documents.ChangedEntry(entry, files) for entry, files in found.changed),
        )
        click.echo(document.text())
    else:
        _print(found)
    if not found.same:
        raise click.exceptions.Exit(1)


def _print(found: comparing.Comparison) -> None:
    if not found.fields:
        table.line("fingerprint", "equal", table.GOOD, column=13)
    for difference in found.fields:
        table.line("fingerprint", difference.field, table.UNSURE, column=13)
        a, b = difference.short()
        click.echo(f"  A: {a}\n  B: {b}")
    for title, entries in (("only in A", found.only_a), ("only in B", found.only_b)):
        for entry in entries:
            table.line(title, entry, table.UNSURE, column=13)
    for entry, files in found.changed:
        table.line("other bytes", entry, table.BAD, column=13)
        table.line("", ", ".join(files), column=13)
    click.echo(
        f"kernels      {len(found.equal)} equal, {len(found.changed)} with other bytes, "
        f"{len(found.only_a)} only in A, {len(found.only_b)} only in B"
    )
