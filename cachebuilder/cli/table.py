"""Lines of a name and a text, within 80 columns; a colour for what a person should see first, on a terminal only.

`click.echo` takes colours out where the output is no terminal; `NO_COLOR` (no-color.org) does so on one.
"""

from __future__ import annotations

import os
import textwrap

import click

WIDTH = 80

GOOD, BAD, UNSURE, TITLE = "green", "red", "yellow", "cyan"


def follow_no_color(context: click.Context) -> None:
    """Take the user's word: a ``NO_COLOR`` that is not empty means none, on a terminal too."""
    if os.environ.get("NO_COLOR"):
        context.color = False


def line(name: str, text: str, colour: str | None = None, column: int = 10) -> None:
    """``name``, and ``text`` from ``column`` on, wrapped between words.

    A key that does not fit beside the name stands below it with as little indent as there can be; a path, which may
    be of any length, stays.
    """
    shown = click.style(name, fg=colour) if colour else name
    parts = _wrap(text, WIDTH - column)
    if all(len(part) <= WIDTH - column or "/" in part for part in parts):
        click.echo(shown + " " * max(column - len(name), 1) + f"\n{'':<{column}}".join(parts))
        return
    indent = " " * (len(name) - len(name.lstrip()) + 1)
    if name:
        click.echo(shown)
    for part in _wrap(text, WIDTH - len(indent)):
        click.echo(part if len(part) > WIDTH - len(indent) else indent + part)


def title(text: str) -> None:
    """A line over others."""
    click.echo("\n".join(click.style(part, fg=TITLE) for part in _wrap(text, WIDTH)))


def _wrap(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False) or [""]
