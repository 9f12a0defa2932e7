"""``cachebuilder sync``."""

from __future__ import annotations

import os
from pathlib import Path

import click

from cachebuilder.cli import remote, shared, signing
from cachebuilder.cuda import nvml
from cachebuilder.errors import CacheBuilderError, TransferError
from cachebuilder.restoring import entries as restoring
from cachebuilder.restoring.compatibility import with_environment
from cachebuilder.restoring.folder import open_folder


@click.command()
@click.argument("source", metavar="SOURCE", type=remote.NamedType(path_type=Path, dir_okay=False))
@click.option("--to", required=True, metavar="DIR", type=shared.folder_type, help="Serve from DIR/current.")
@click.option(
    "--keep",
    type=click.IntRange(1, 1000),
    default=3,
    show_default=True,
    help="How many generations stay, the current one among them.",
)
@click.option("--allow-stale", is_flag=True, help="Where SOURCE cannot be reached, be content with DIR/current.")
@shared.serving_deep_gemm_option
@signing.trust_option
@shared.progress_options
def sync(
    source: Path | str,
    to: Path,
    keep: int,
    allow_stale: bool,
    deep_gemm: Path | None,
    trust: tuple[Path, ...],
) -> None:
    """Keep DIR/current at the artifact that SOURCE (oci://…, s3://…) stands for: for an init container or a DaemonSet.

    Fetched only where it is another one than before; restored aside, then put in place by one rename. Where that
    fails, DIR/current stays what it is. Several may work in one DIR.
    """
    remote.ready()
    from cachebuilder.ship import fetch
    from cachebuilder.ship import sync as syncing

    trusted = signing.trusted(trust)
    if trusted is None:
        click.echo(restoring.UNCHECKED, err=True)
    installation, gpu = remote.installation(deep_gemm), nvml.first_gpu()

    def restore(artifact: Path, folder: Path) -> str | None:
        done = restoring.restore([artifact], folder, installation, gpu, trust=trusted)
        for path, differences in done.refused:
            click.echo(f"refused   {restoring.explain(path, differences)}", err=True)
        shared.remark(f"restored  {done.index.name}: {done.written} kernels")
        return done.signed_by.fingerprint if done.signed_by else None

    def usable(generation: Path, signed_by: str | None) -> bool:
        """A key that is trusted now signed it, and the DeepGEMM that is here now finds what is in it."""
        if trusted is not None and signed_by not in [key.fingerprint for key in trusted]:
            return False
        [index] = open_folder(generation).indexes
        differences = with_environment(index, installation, gpu, os.environ)
        return not any(difference.causes_miss for difference in differences)

    with remote.retries() as tries:
        wish = remote.wish(installation, gpu)
        try:
            done = syncing.sync(
                lambda: fetch.look_up(str(source), wish, tries),
                to,
                restore,
                usable,
                keep,
                remote.checker(trusted, str(source)),
            )
        except CacheBuilderError as error:
            generation = syncing.current(to, usable)
            if not allow_stale or generation is None or not isinstance(error, TransferError):
                if generation is not None:
                    click.echo(f"kept      {to / syncing.CURRENT}, {generation.name}", err=True)
                raise
            click.echo(f"stale     {to / syncing.CURRENT} stays {generation.name}: {error}", err=True)
            return
    for name in done.removed:
        shared.remark(f"removed   {name}")
    click.echo(f"{'now      ' if done.changed else 'unchanged'} {to / syncing.CURRENT}, {done.generation.name}")
