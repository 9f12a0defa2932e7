"""``cachebuilder schema``."""

from __future__ import annotations

import click

from cachebuilder.cli import console
from cachebuilder.inspecting import schemas


@click.command(epilog="\b\n" + "\n".join(f"{name:<9} {title}" for name, (title, _) in schemas.SCHEMAS.items()))
@click.argument("name", type=click.Choice(list(schemas.SCHEMAS)), metavar="|".join(schemas.SCHEMAS))
def schema(name: str) -> None:
    """Print the JSON schema of a file that cachebuilder reads or writes, or of what a verb's --json prints."""
    console.echo(schemas.text(name), newline=False)
