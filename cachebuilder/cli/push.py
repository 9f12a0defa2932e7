"""``cachebuilder push``."""

from __future__ import annotations

from pathlib import Path

import click

from cachebuilder.cli import remote, shared


@click.command()
@click.argument("destination", metavar="oci://HOST/NAME:TAG")
@click.argument("artifacts", metavar="ARTIFACT...", nargs=-1, required=True, type=shared.artifact_type)
@click.option(
    "--platform",
    "platforms",
    multiple=True,
    type=click.Choice(["linux/amd64", "linux/arm64"]),
    help="The hosts that mount the image; the content is the same. Several may be given. Default: linux/amd64.",
)
@shared.progress_options
def push(destination: str, artifacts: tuple[Path, ...], platforms: tuple[str, ...]) -> None:
    """Push ARTIFACT to a registry, as an image; several, for different GPUs or DeepGEMMs, as an index of images.

    ARTIFACT.sig, and what else is signed, goes along where it lies beside ARTIFACT. Credentials are docker's.
    """
    remote.ready()
    from cachebuilder.ship.locations import parse
    from cachebuilder.ship.push import push as push_all

    reference = parse(destination)
    with remote.retries() as tries:
        done = push_all(reference, artifacts, platforms or ("linux/amd64",), tries)
    for target in done.targets:
        signed = "signed" if target.signed else "not signed"
        kernels, fingerprint = len(target.index.entries), target.index.fingerprint
        click.echo(f"image     {target.path}: {kernels} kernels, {fingerprint.arch}, {fingerprint.deep_gemm}, {signed}")
        for manifest in target.manifests:
            click.echo(f"          {reference.at(manifest.digest)}, {manifest.platform}")
    click.echo(f"pushed    {reference}")
    click.echo(f"digest    {done.digest}")
    shared.remark(f"next      cachebuilder restore {reference.at(done.digest)} --to DIR")
