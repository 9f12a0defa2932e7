"""What the verbs around signatures share."""

from __future__ import annotations

import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

from cachebuilder.artifact.trust import Trust
from cachebuilder.cli import console

#: The passphrase of a private key; cachebuilder asks for it where this is not set.
PASSPHRASE = "CACHEBUILDER_KEY_PASSPHRASE"

#: Public keys, separated by colons: what ``--trust`` is where it is not given.
TRUST = "CACHEBUILDER_TRUST"


class _KeyFile(click.Path):
    """A key's file, not an empty text: that usually comes from an unset variable."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value == "":
            self.fail("wanted a key's file, found an empty text", param, ctx)
        return super().convert(value, param, ctx)


def _refuse_empty(context: click.Context, parameter: click.Parameter, keys: tuple[Path, ...]) -> tuple[Path, ...]:
    """Whoever sets `TRUST` means it: an empty text, as of a variable that was not set, does not turn checks off."""
    if not keys and TRUST in os.environ:
        raise click.UsageError(
            f"{TRUST}: wanted public keys, separated by ':', found an empty text; unset it if no "
            "signature is to be checked"
        )
    return keys


key_type = _KeyFile(path_type=Path, dir_okay=False)
trust_option = click.option(
    "--trust",
    multiple=True,
    type=key_type,
    envvar=TRUST,
    show_envvar=True,
    callback=_refuse_empty,
    metavar="KEY.pub",
    help="Take only artifacts that this key signed. May be given several times.",
)


class _Time(click.ParamType):  # type: ignore[type-arg]  # click before 8.4 has no arguments for it
    """A day or a time of ISO 8601; without a time zone it is UTC, whatever the machine's is."""

    name = "time"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            time = datetime.fromisoformat(value)
        except ValueError:
            self.fail(f"wanted a time such as 2026-11-28 or 2026-11-28T01:40:00Z, found {value!r}", param, ctx)
        return time if time.tzinfo else time.replace(tzinfo=UTC)


name_option = click.option(
    "--name", metavar="NAME", help="Take only artifacts of this name among those that a trusted key signed."
)
not_before_option = click.option(
    "--not-before",
    type=_Time(),
    metavar="TIME",
    help="Take only artifacts whose signed provenance says that they were signed at this time or later.",
)


def load_trust(keys: tuple[Path, ...], name: str | None = None, not_before: datetime | None = None) -> Trust | None:
    """The trusted keys, and what is wanted of what they signed; None where no key was given."""
    if not keys and (name is not None or not_before is not None):
        raise click.UsageError("--name and --not-before go with --trust KEY.pub: what nobody signed proves neither")
    return Trust.load(keys, name=name, not_before=not_before) if keys else None


def warn_unchecked(trust: Trust | None) -> None:
    """Say that an artifact's origin is not checked, where no key was given to check it with."""
    if trust is None:
        console.echo(
            "unchecked origin, no --trust KEY.pub was given; whoever made this file decides what runs", err=True
        )


def passphrase(key: Path, confirm: bool = False) -> bytes:
    """The passphrase of a key: from the environment, else from a person."""
    text = os.environ.get(PASSPHRASE)
    if text is None:
        text = click.prompt(f"Passphrase of {key}", hide_input=True, confirmation_prompt=confirm, err=True)
    return text.encode()
