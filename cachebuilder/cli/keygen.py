"""``cachebuilder keygen``."""

from __future__ import annotations

from pathlib import Path

import click

from cachebuilder.artifact import signature
from cachebuilder.cli import console, signing


@click.command()
@click.option("--out", required=True, type=click.Path(path_type=Path, dir_okay=False), metavar="KEY.pem")
@click.option(
    "--passphrase", "encrypt", is_flag=True, help=f"Encrypt the key with a passphrase: {signing.PASSPHRASE}, or typed."
)
def keygen(out: Path, encrypt: bool) -> None:
    """Make a key pair to sign artifacts with: KEY.pem, which only you can read, and KEY.pub for everybody."""
    public = signature.generate_key(out, signing.passphrase(out, confirm=True) if encrypt else None)
    console.echo(f"private   {out}: keep it where artifacts are signed, and nowhere else")
    console.echo(f"public    {public}, {signature.load_trusted([public])[0].fingerprint}")
    console.echo(f"next      cachebuilder sign ARTIFACT --key {out}")
