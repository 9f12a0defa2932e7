"""``cachebuilder inspect``."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from pathlib import Path

import click

from cachebuilder.artifact.index import REPORT_SUFFIX
from cachebuilder.artifact.read import read_index
from cachebuilder.cli import remote, shared, table, words
from cachebuilder.deepgemm import entries as entry_files

#: Where the fields' values stand: a digest then just fits.
_COLUMN = 16


@click.command()
@click.argument("artifact", type=remote.LocationType(path_type=Path, dir_okay=False))
@shared.json_option
def inspect(artifact: Path, as_json: bool) -> None:
    """Print what is in ARTIFACT and what must agree for it to be of use. Reads the index only."""
    index = read_index(artifact)
    if as_json:
        click.echo(index.model_dump_json(indent=1, exclude_none=True))
        return
    with artifact.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    unpacked = sum(file.size for entry in index.entries for file in entry.files)
    sizes = f"{words.size(artifact.stat().st_size)} ({words.size(unpacked)} unpacked)"
    table.title(f"{index.name}: {words.several(len(index.entries), 'kernel')}, {sizes}")
    table.line("sha256", digest, column=13)
    if text := _verified(artifact, digest):
        table.line("verified", text, table.GOOD if text.startswith("right") else table.BAD, column=13)
    table.line("fingerprint", index.fingerprint_digest, column=13)
    for field, value in index.fingerprint.model_dump(mode="json", exclude_none=True).items():
        text = value if isinstance(value, str) else json.dumps(value)
        first, *rest = text.strip().splitlines() or [""]
        table.line(f"  {field}", first, column=_COLUMN)
        for line in rest:
            table.line("", line, column=_COLUMN)
    click.echo("recorded")
    for field, value in index.recorded.items():
        table.line(f"  {field}", value, column=_COLUMN)
    families = Counter(entry_files.kernel_name(index.fingerprint.generation, e.name) for e in index.entries)
    click.echo("kernels")
    for name, count in sorted(families.items(), key=str):
        click.echo(f"  {count:>6}  {name}")


def _verified(artifact: Path, sha256: str) -> str | None:
    """What the report beside the artifact says, if there is one: `verify --device cuda` writes it."""
    path = artifact.with_name(artifact.name + REPORT_SUFFIX)
    try:
        report = json.loads(path.read_bytes())
        same, right, gpu = report["artifact"]["sha256"] == sha256, report["right"], report["device"].get("name")
        calls = sum(replay["calls"] for replay in report["replays"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{path.name} cannot be read"
    if not same:
        return f"{path.name} is of another artifact"
    return f"{'right' if right else 'WRONG'} on {gpu}, {calls} calls ({path.name})"
