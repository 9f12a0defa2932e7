"""``cachebuilder misses``."""

from __future__ import annotations

import textwrap
from datetime import UTC, datetime
from pathlib import Path

import click

from cachebuilder.cli import shared, table
from cachebuilder.inspecting import documents
from cachebuilder.restoring import misses as reading


@click.command()
@click.argument("log", type=click.Path(path_type=Path, dir_okay=False))
@click.option(
    "--add-to",
    "manifest",
    metavar="MANIFEST",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write the missed kernels' sources into MANIFEST: the next build contains them.",
)
@shared.json_option
def misses(log: Path, manifest: Path | None, as_json: bool) -> None:
    """Group the kernels in the frozen nvcc's LOG and say what to add to the manifest."""
    found = reading.read(log)
    if manifest is not None:
        _add(found, manifest)
    if as_json:
        click.echo(_document(found).text())
        return
    for miss in found.misses:
        _print(miss)
    requests = sum(miss.count for miss in found.misses)
    click.echo(f"kernels missed: {len(found.misses)}, requests: {requests}")
    if found.unreadable:
        click.echo(f"note: {found.unreadable} lines of the log are none of the frozen nvcc's")
    if found.misses:
        click.echo("next: add the ops to the manifest (fill in each ?), or the kernels as they are")
        click.echo("      with --add-to MANIFEST; build, and check the artifact with")
        click.echo("      cachebuilder verify ARTIFACT --manifest MANIFEST")


def _add(found: reading.Log, manifest: Path) -> None:
    from cachebuilder.authoring import sources  # pydantic's import is slow, and only this needs it

    known = [
        sources.NewSource(
            miss.source, f"{miss.kernel}: missed {_times(miss)}, not in {', '.join(miss.artifacts) or 'the cache'}"
        )
        for miss in found.misses
        if miss.source is not None
    ]
    added = sources.add(manifest, known)
    click.echo(f"{manifest}: {added} sources added, {len(known) - added} there already", err=True)
    if lost := len(found.misses) - len(known):
        click.echo(f"note: of {lost} kernels no copy of the source was kept: add their ops by hand", err=True)


def _times(miss: reading.Miss) -> str:
    first, last = _time(miss.first), _time(miss.last)
    return f"{miss.count} {'time' if miss.count == 1 else 'times'}, {first if first == last else f'{first} to {last}'}"


def _print(miss: reading.Miss) -> None:
    table.title(f"{miss.kernel}: {_times(miss)}")
    if miss.artifacts:
        click.echo(
            textwrap.fill(f"not in {', '.join(miss.artifacts)}", 80, initial_indent="  ", subsequent_indent="  ")
        )
    advice = reading.advice(miss.shape)
    if miss.shape and miss.shape.op:  # a line to copy, which must stay one
        click.echo(f"  {advice}")
    else:
        click.echo(textwrap.fill(advice, 80, initial_indent="  ", subsequent_indent="  "))
    if miss.shape:
        notes = f"under target.sm_counts, or the op's own: {miss.shape.sm_count}"
        if miss.shape.op and miss.shape.n is None:
            notes += "; n and k are not compiled in, so this kernel serves many shapes"
        click.echo(textwrap.fill(notes, 80, initial_indent="  ", subsequent_indent="    "))


def _time(seconds: int | None) -> str:
    if seconds is None:
        return "at an unknown time"
    try:
        return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%SZ")
    except (OverflowError, OSError, ValueError):
        return f"at {seconds} s"


def _document(found: reading.Log) -> documents.Misses:
    return documents.Misses(
        unreadable_lines=found.unreadable,
        misses=tuple(
            documents.MissedKernel(
                kernel=miss.kernel,
                count=miss.count,
                first=miss.first,
                last=miss.last,
                artifacts=miss.artifacts,
                shape=miss.shape,
                advice=reading.advice(miss.shape),
                source=miss.source,
            )
            for miss in found.misses
        ),
    )
