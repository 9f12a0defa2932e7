"""Lines of a name and a text, within 80 columns; on a terminal, a colour marks what a person should see first.

`click.echo` removes colours where the output is no terminal; `NO_COLOR` (no-color.org) removes them on a terminal.
"""

from __future__ import annotations

import os
import textwrap

import click

from cachebuilder.cli import console

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
    name, text = console.printable(name), console.printable(text)
    styled_name = console.style(name, colour) if colour else name
    parts = _wrap(text, WIDTH - column)
    if all(len(part) <= WIDTH - column or "/" in part for part in parts):
        console.echo_table(styled_name + " " * max(column - len(name), 1) + f"\n{'':<{column}}".join(parts))
        return
    indent = " " * (len(name) - len(name.lstrip()) + 1)
    if name:
        console.echo_table(styled_name)
    for part in _wrap(text, WIDTH - len(indent)):
        console.echo_table(part if len(part) > WIDTH - len(indent) else indent + part)


def title(text: str) -> None:
    """Print a line that stands above others."""
    console.echo_table("\n".join(console.style(part, TITLE) for part in _wrap(text, WIDTH)))


def _wrap(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False) or [""]
