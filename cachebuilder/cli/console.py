"""The one place that writes to the terminal; what it prints may come from anybody.

An artifact, a registry or a manifest can hold escape sequences, with which a terminal moves its cursor, changes what
was printed before, or types. So every character that does more than stand in its line is printed as its escape.
"""

from __future__ import annotations

import json

import click


def printable(text: str) -> str:
    """``text`` with each character that a terminal would obey as its escape; newlines and tabs stay."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)


def echo(text: str = "", *, err: bool = False, newline: bool = True) -> None:
    """Print a text for a person, on standard output or, with ``err``, on standard error."""
    click.echo(printable(text), err=err, nl=newline)


def echo_json(text: str) -> None:
    """Print JSON for a machine: the same document, in which such characters are escaped as JSON does."""
    if not text.replace("\n", "").isprintable():
        text = "".join(c if c.isprintable() or c == "\n" else json.dumps(c)[1:-1] for c in text)
    click.echo(text)


def echo_table(text: str) -> None:
    """Print lines in which `style` has put colours."""
    click.echo(text)


def style(text: str, colour: str) -> str:
    """``text`` in a colour, for `echo_table`."""
    return click.style(printable(text), fg=colour)
