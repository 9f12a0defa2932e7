"""``cachebuilder verify-signature``."""

from __future__ import annotations

import json
from pathlib import Path

import click

from cachebuilder.artifact import provenance, signature
from cachebuilder.cli import remote, shared, signing


@click.command("verify-signature")
@click.argument("artifact", type=remote.LocationType(path_type=Path, dir_okay=False))
@signing.trust_option
@shared.json_option
def verify_signature(artifact: Path, trust: tuple[Path, ...], as_json: bool) -> None:
    """Check who signed ARTIFACT, and what was said of it. Nothing in it is decompressed."""
    if not trust:
        raise click.UsageError(f"wanted --trust KEY.pub, or {signing.TRUST}")
    trusted = signature.load_trusted(trust)
    signed = signature.read_signed(artifact, trusted)
    statement = provenance.read_statement(signed, trusted)
    report = provenance.check_report_beside(artifact, statement) if statement else None
    if as_json:
        key = {"path": str(signed.key.path), "fingerprint": signed.key.fingerprint}
        click.echo(json.dumps({"sha256": signed.sha256, "key": key, "statement": statement}, indent=1))
        return
    click.echo(f"signed    {artifact}, by {signed.key.path} ({signed.key.fingerprint})")
    click.echo(f"sha256    {signed.sha256}")
    if statement is None:
        click.echo("provenance none: the key's owner signed the bytes and said no more")
        return
    click.echo(f"provenance signed, {statement['predicateType']}; --json prints it")
    if report:
        click.echo(f"report    {report}, as signed")
