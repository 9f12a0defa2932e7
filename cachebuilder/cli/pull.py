"""``cachebuilder pull``."""

from __future__ import annotations

from pathlib import Path

import click

from cachebuilder.cli import remote, shared, signing
from cachebuilder.errors import RestoreError


@click.command()
@click.argument("source", metavar="SOURCE")
@click.option("-o", "--output", type=shared.artifact_type, metavar="FILE", help="Default: the name it was pushed with.")
@click.option("--force", is_flag=True, help="Replace FILE where it is another artifact.")
@shared.serving_deep_gemm_option
@signing.trust_option
@shared.progress_options
def pull(source: str, output: Path | None, force: bool, deep_gemm: Path | None, trust: tuple[Path, ...]) -> None:
    """Fetch the artifact at SOURCE (oci://…, s3://…), with its signature, to the byte as it was pushed.

    Where SOURCE stands for several, the one that fits this machine's DeepGEMM and GPU; the others are told with the
    reasons. One that broke off goes on where it ended.
    """
    if not remote.is_remote(source):
        raise click.UsageError(f"wanted oci://HOST/NAME:TAG or s3://BUCKET/NAME, found {source}")
    remote.ready()
    from cachebuilder.ship.download import sha256_of
    from cachebuilder.ship.fetch import look_up

    trusted = signing.trusted(trust)
    with remote.retries() as tries:
        found = look_up(source, remote.here(deep_gemm), tries)

        def to(name: str) -> Path:
            path = output or Path(name)
            if not force and path.exists() and found.version != f"sha256:{sha256_of(path)}":
                raise RestoreError(
                    f"{path}: wanted no file or this artifact, found another one\nwanted: {found.version}",
                    hint="--force replaces it; -o FILE puts this one elsewhere",
                )
            return path

        path = found.get(to, remote.checker(trusted, source))
    click.echo(f"pulled    {path}, from {found.name}")
    click.echo(f"sha256    {sha256_of(path)}")
    shared.remark(f"next      cachebuilder restore {path} --to DIR")
