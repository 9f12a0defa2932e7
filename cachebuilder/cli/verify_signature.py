"""``cachebuilder verify-signature``."""

from __future__ import annotations

import json
from pathlib import Path

import click

from cachebuilder.artifact import provenance
from cachebuilder.artifact.trust import Trust
from cachebuilder.cli import console, remote, shared, signing


@click.command("verify-signature")
@click.argument("artifact", type=remote.LocationType(path_type=Path, dir_okay=False))
@signing.trust_option
@shared.json_option
def verify_signature(artifact: Path, trust: tuple[Path, ...], as_json: bool) -> None:
    """Check who signed ARTIFACT, and the signed statement about it. Nothing in it is decompressed."""
    if not trust:
        raise click.UsageError(f"wanted --trust KEY.pub, or {signing.TRUST}")
    signed = Trust.load(trust).check_file(artifact)
    report = provenance.check_report_beside(artifact, signed.statement) if signed.statement else None
    if as_json:
        key = {"path": str(signed.key.path), "fingerprint": signed.key.fingerprint}
        console.echo_json(json.dumps({"sha256": signed.sha256, "key": key, "statement": signed.statement}, indent=1))
        return
    console.echo(f"signed    {artifact}, by {signed.key.path} ({signed.key.fingerprint})")
    console.echo(f"sha256    {signed.sha256}")
    if signed.statement is None:
        console.echo("provenance none: only the artifact's bytes are signed")
        return
    console.echo(f"provenance signed, {signed.statement['predicateType']}; --json prints it")
    if report:
        console.echo(f"report    {report}, as signed")
