"""``cachebuilder push``."""

from __future__ import annotations

from pathlib import Path

import click

from cachebuilder.cli import console, remote, shared


@click.command()
@click.argument("destination", metavar="DESTINATION")
@click.argument("artifacts", metavar="ARTIFACT...", nargs=-1, required=True, type=shared.artifact_type)
@click.option(
    "--platform",
    "platforms",
    multiple=True,
    type=click.Choice(["linux/amd64", "linux/arm64"]),
    help="The hosts that mount the image; its content is the same for all. May be given several times. Default: "
    "linux/amd64.",
)
@shared.progress_options
def push(destination: str, artifacts: tuple[Path, ...], platforms: tuple[str, ...]) -> None:
    """Push ARTIFACT to oci://HOST/NAME:TAG as an image; several, for different GPUs or DeepGEMMs, as an index.

    Or store it: s3://BUCKET/NAME.tar.zst, or each under its own name in s3://BUCKET/FOLDER/. The signature and the
    other signed files beside ARTIFACT are pushed with it. Credentials are docker's, or those of the store's library.
    """
    run_push(destination, artifacts, platforms)


def run_push(destination: str, artifacts: tuple[Path, ...], platforms: tuple[str, ...] = ()) -> None:
    """Push and say what was pushed."""
    if not remote.is_remote(destination):
        raise click.UsageError(f"wanted oci://HOST/NAME:TAG or s3://BUCKET/NAME, found {destination}")
    remote.ready()
    from cachebuilder.ship.locations import is_oci

    if not is_oci(destination):
        from cachebuilder.ship.download import sha256_of
        from cachebuilder.ship.stores import put_all

        with remote.retries() as tries:
            stored = put_all(destination, artifacts, tries)
        for artifact, location in zip(artifacts, stored, strict=True):
            console.echo(f"stored    {location}")
            console.echo(f"sha256    {sha256_of(artifact)}")
        return
    _push_images(destination, artifacts, platforms or ("linux/amd64",))


def _push_images(destination: str, artifacts: tuple[Path, ...], platforms: tuple[str, ...]) -> None:
    from cachebuilder.ship.locations import parse
    from cachebuilder.ship.push import push as push_all

    reference = parse(destination)
    with remote.retries() as tries:
        pushed = push_all(reference, artifacts, platforms, tries)
    for target in pushed.targets:
        signed = "signed" if target.signed else "not signed"
        kernels, fingerprint = len(target.index.entries), target.index.fingerprint
        console.echo(
            f"image     {target.path}: {kernels} kernels, {fingerprint.arch}, {fingerprint.deep_gemm}, {signed}"
        )
        for manifest in target.manifests:
            console.echo(f"          {reference.at(manifest.digest)}, {manifest.platform}")
    console.echo(f"pushed    {reference}")
    console.echo(f"digest    {pushed.digest}")
    shared.remark(f"next      cachebuilder restore {reference.at(pushed.digest)} --to DIR")
