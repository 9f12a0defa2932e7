"""``cachebuilder pull``."""

from __future__ import annotations

from pathlib import Path

import click

from cachebuilder.cli import console, remote, shared, signing
from cachebuilder.errors import RestoreError
from cachebuilder.restoring.machine import Machine


@click.command()
@click.argument("source", metavar="SOURCE")
@click.option("-o", "--output", type=shared.artifact_type, metavar="FILE", help="Default: the name it was pushed with.")
@click.option("--force", is_flag=True, help="Replace FILE where it is another artifact.")
@shared.serving_deep_gemm_option
@signing.trust_option
@shared.progress_options
def pull(source: str, output: Path | None, force: bool, deep_gemm: Path | None, trust: tuple[Path, ...]) -> None:
    """Fetch the artifact at SOURCE (oci://…, s3://…) with its signature, byte for byte as it was pushed.

    If SOURCE stands for several, take the one that fits this machine's DeepGEMM and GPU, and say why those before it do
    not fit. A transfer that broke off is resumed.
    """
    if not remote.is_remote(source):
        raise click.UsageError(f"wanted oci://HOST/NAME:TAG or s3://BUCKET/NAME, found {source}")
    remote.ready()
    from cachebuilder.ship.download import Target, sha256_of
    from cachebuilder.ship.fetch import look_up

    keys = signing.load_trust(trust)
    with remote.retries() as tries:
        located = look_up(source, Machine.here(deep_gemm), tries)

        def to(name: str) -> Target:
            path = output or Path(name)
            if not force and path.exists() and located.version != f"sha256:{sha256_of(path)}":
                raise RestoreError(
                    f"{path}: wanted no file or this artifact, found another one\nwanted: {located.version}",
                    hint="--force replaces it; -o FILE puts this one elsewhere",
                )
            return Target.at(path)

        path = located.get(to, keys)
    console.echo(f"pulled    {path}, from {located.name}")
    console.echo(f"sha256    {sha256_of(path)}")
    shared.remark(f"next      cachebuilder restore {path} --to DIR")
