"""Lines of a name and a text, within 80 columns; on a terminal, a colour marks what a person should see first.

`click.echo` removes colours where the output is no terminal; `NO_COLOR` (no-color.org) removes them on a terminal.
"""

from __future__ import annotations

import os
import textwrap

import click

WIDTH = 80

GOOD, BAD, UNSURE, TITLE = "green", "red", "yellow", "cyan"


def follow_no_color(context: click.Context) -> None:
    """Turn colours off where the user sets ``NO_COLOR`` to anything but an empty text."""
    if os.environ.get("NO_COLOR"):
        context.color = False


def line(name: str, text: str, colour: str | None = None, column: int = 10) -> None:
    """Print ``name``, and ``text`` from ``column`` on, wrapped between words.

    A word that does not fit beside the name goes below it, with as little indent as there can be. A path may be of any
    length and stays beside the name.
    """
    styled_name = click.style(name, fg=colour) if colour else name
    parts = _wrap(text, WIDTH - column)
    if all(len(part) <= WIDTH - column or "/" in part for part in parts):
        click.echo(styled_name + " " * max(column - len(name), 1) + f"\n{'':<{column}}".join(parts))
        return
    indent = " " * (len(name) - len(name.lstrip()) + 1)
    if name:
        click.echo(styled_name)
    for part in _wrap(text, WIDTH - len(indent)):
        click.echo(part if len(part) > WIDTH - len(indent) else indent + part)


def title(text: str) -> None:
    """Print a line that stands above others."""
    click.echo("\n".join(click.style(part, fg=TITLE) for part in _wrap(text, WIDTH)))


def _wrap(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False) or [""]
