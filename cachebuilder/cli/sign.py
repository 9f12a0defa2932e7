"""``cachebuilder sign``."""

from __future__ import annotations

from pathlib import Path

import click

from cachebuilder.artifact import provenance, signature
from cachebuilder.cli import console, shared, signing


@click.command()
@click.argument("artifact", type=shared.artifact_type)
@click.option("--key", "key_file", required=True, type=signing.key_type, metavar="KEY.pem", help="The private key.")
def sign(artifact: Path, key_file: Path) -> None:
    """Sign ARTIFACT: write its signature, ARTIFACT.sig, and where it comes from, ARTIFACT.intoto.json.

    The whole artifact is checked first. The statement names the report of `verify --device cuda`, where one lies
    beside ARTIFACT.
    """
    encrypted = signature.is_encrypted(key_file)
    key = signature.load_key(key_file, signing.passphrase(key_file) if encrypted else None)
    sha256, files = provenance.sign_file(artifact, key)
    for file in files:
        console.echo(f"written   {file}")
    console.echo(f"sha256    {sha256}")
    console.echo(f"next      cachebuilder verify-signature {artifact} --trust {key_file.with_suffix('.pub')}")
