"""``cachebuilder inspect``."""

from __future__ import annotations

import json
from pathlib import Path

import click

from cachebuilder.artifact.baked import BakedPart
from cachebuilder.artifact.index import FlashInferPart
from cachebuilder.cli import console, remote, shared, table, words
from cachebuilder.inspecting.summary import Summary, summarise

#: The column of the fields' values: a digest then just fits.
_COLUMN = 16


@click.command()
@click.argument("artifact", type=remote.LocationType(path_type=Path, dir_okay=False))
@shared.json_option
def inspect(artifact: Path, as_json: bool) -> None:
    """Print what is in ARTIFACT and what must agree for it to be of use. Reads the index only."""
    summary = summarise(artifact)
    if as_json:
        console.echo_json(summary.index.model_dump_json(indent=1, exclude_none=True))  # as in the artifact
    else:
        _print(summary)


def _print(summary: Summary) -> None:
    index = summary.index
    sizes = f"{words.size(summary.size)} ({words.size(summary.unpacked_size)} unpacked)"
    table.title(f"{index.name}: {words.several(len(index.entries), 'kernel')}, {sizes}")
    table.line("sha256", summary.sha256, column=13)
    if verdict := summary.verdict:
        table.line("verified", verdict.text, table.GOOD if verdict.right else table.BAD, column=13)
    table.line("fingerprint", index.fingerprint_digest, column=13)
    for field, value in index.fingerprint.model_dump(mode="json", exclude_none=True).items():
        text = value if isinstance(value, str) else json.dumps(value)
        first, *rest = text.strip().splitlines() or [""]
        table.line(f"  {field}", first, column=_COLUMN)
        for line in rest:
            table.line("", line, column=_COLUMN)
    console.echo("recorded")
    for field, value in index.recorded.items():
        table.line(f"  {field}", value, column=_COLUMN)
    console.echo("kernels")
    for name, count in sorted(summary.families.items()):
        console.echo(f"  {count:>6}  {name}")
    if index.flashinfer:
        _print_flashinfer(index.flashinfer)
    if index.baked:
        _print_baked(index.baked)


def _print_flashinfer(part: FlashInferPart) -> None:
    console.echo("flashinfer")
    for field, value in part.fingerprint.model_dump(mode="json").items():
        table.line(f"  {field}", value, column=_COLUMN)
    for module in part.modules:
        table.line("  module", f"{module.name}, {words.size(module.files[0].size)}", column=_COLUMN)
    for entry in part.entries:
        table.line("  kernel", entry.name, column=_COLUMN)


def _print_baked(part: BakedPart) -> None:
    console.echo("baked")
    record = part.record
    facts = {"command": record.command, "gpu": record.gpu, "python": record.python, "dir": record.dir}
    for field, value in (facts | record.packages).items():
        table.line(f"  {field}", value, column=_COLUMN)
    sizes: dict[str, list[int]] = {}
    for file in part.files:
        sizes.setdefault(file.path.split("/")[0], []).append(file.size)
    for cache, of_files in sizes.items():
        table.line(f"  {cache}", f"{words.several(len(of_files), 'file')}, {words.size(sum(of_files))}", column=_COLUMN)
