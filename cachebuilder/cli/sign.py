"""``cachebuilder sign``."""

from __future__ import annotations

from pathlib import Path

import click

from cachebuilder.artifact import provenance, signature
from cachebuilder.artifact.whole import read_bytes
from cachebuilder.cli import shared, signing
from cachebuilder.common.files import write_atomically
from cachebuilder.errors import SignatureError


@click.command()
@click.argument("artifact", type=shared.artifact_type)
@click.option("--key", "key_file", required=True, type=signing.key_type, metavar="KEY.pem", help="The private key.")
def sign(artifact: Path, key_file: Path) -> None:
    """Sign ARTIFACT: writes ARTIFACT.sig, and where it comes from as ARTIFACT.intoto.json.

    The whole artifact is checked first. A report of `verify --device cuda` beside it is named in the statement.
    """
    encrypted = signature.is_encrypted(key_file)
    key = signature.load_key(key_file, signing.passphrase(key_file) if encrypted else None)
    if (mode := key_file.stat().st_mode & 0o777) & 0o077:
        click.echo(f"warning: {key_file} can be read by others (mode {mode:04o}): chmod 600 {key_file}", err=True)
    data = read_bytes(artifact)
    statement = provenance.statement(artifact, data)
    for suffix, content in (
        (signature.SUFFIX, signature.sign(data, key)),
        (provenance.SUFFIX, provenance.seal(statement, key)),
    ):
        beside = artifact.with_name(artifact.name + suffix)
        write_atomically(beside, content, SignatureError)
        click.echo(f"written   {beside}")
    click.echo(f"sha256    {statement['subject'][0]['digest']['sha256']}")
    click.echo(f"next      cachebuilder verify-signature {artifact} --trust {key_file.with_suffix('.pub')}")
