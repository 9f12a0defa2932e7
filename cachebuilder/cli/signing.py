"""What the verbs around signatures share."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from cachebuilder.artifact.signature import TrustedKey

#: Of a private key; asked for where it is not set.
PASSPHRASE = "CACHEBUILDER_KEY_PASSPHRASE"

#: Public keys, separated by colons: what ``--trust`` is where it is not given.
TRUST = "CACHEBUILDER_TRUST"

key_type = click.Path(path_type=Path, dir_okay=False)
trust_option = click.option(
    "--trust",
    multiple=True,
    type=key_type,
    envvar=TRUST,
    show_envvar=True,
    metavar="KEY.pub",
    help="Take only what this key signed. Several may be given.",
)


def trusted(trust: tuple[Path, ...]) -> tuple[TrustedKey, ...] | None:
    """The keys; None where none was given."""
    if not trust:
        return None
    from cachebuilder.artifact.signature import load_trusted  # imports cryptography

    return load_trusted(trust)


def passphrase(key: Path, confirm: bool = False) -> bytes:
    """The passphrase of a key: from the environment, else from a person."""
    given = os.environ.get(PASSPHRASE)
    if given is None:
        given = click.prompt(f"Passphrase of {key}", hide_input=True, confirmation_prompt=confirm, err=True)
    return given.encode()
