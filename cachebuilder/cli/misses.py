"""``cachebuilder misses``."""

from __future__ import annotations

import textwrap
from pathlib import Path

import click

from cachebuilder.authoring import sources
from cachebuilder.cli import console, shared, table
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
    missed = reading.read(log)
    if manifest is not None:
        addition = sources.add_missed(manifest, missed)
        console.echo(f"{manifest}: {addition.new} sources added, {addition.known} were in it already", err=True)
        if addition.without_source:
            console.echo(
                f"note: {addition.without_source} kernels have no kept source: add their ops by hand", err=True
            )
    if as_json:
        console.echo_json(missed.model_dump_json(indent=1))
        return
    for miss in missed.misses:
        _print(miss)
    console.echo(f"kernels missed: {len(missed.misses)}, requests: {missed.requests()}")
    if missed.unreadable_lines:
        console.echo(f"note: {missed.unreadable_lines} lines of the log are not the frozen nvcc's")
    if missed.misses:
        console.echo("next: add the ops to the manifest (fill in each ?), or the kernels as they are")
        console.echo("      with --add-to MANIFEST; build, and check the artifact with")
        console.echo("      cachebuilder verify ARTIFACT --manifest MANIFEST")


def _print(miss: reading.Miss) -> None:
    table.title(f"{miss.kernel}: {miss.occurrences()}")
    if miss.artifacts:
        _print_wrapped(f"not in {', '.join(miss.artifacts)}")
    if miss.shape and miss.shape.op:  # to be copied as one line
        console.echo(f"  {miss.advice}")
    else:
        _print_wrapped(miss.advice)
    if miss.shape:
        note = f"under target.sm_counts, or the op's own: {miss.shape.sm_count}"
        if miss.shape.op and miss.shape.n is None:
            note += "; n and k are not compiled in, so this kernel serves many shapes"
        _print_wrapped(note, indent="    ")


def _print_wrapped(text: str, indent: str = "  ") -> None:
    console.echo(textwrap.fill(text, table.WIDTH, initial_indent="  ", subsequent_indent=indent))
