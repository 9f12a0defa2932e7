"""``cachebuilder sync``."""

from __future__ import annotations

from pathlib import Path

import click

from cachebuilder.cli import console, remote, shared, signing
from cachebuilder.cli.restore import ArtifactOptions
from cachebuilder.errors import CacheBuilderError
from cachebuilder.restoring.machine import Machine

_force_option = click.option("--force", is_flag=True, help="Work in DIR even if it is another user's.")


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
@click.option("--allow-stale", is_flag=True, help="If SOURCE cannot be reached, keep DIR/current and succeed.")
@shared.option_group(
    "options",
    ArtifactOptions,
    shared.serving_deep_gemm_option,
    _force_option,
    signing.trust_option,
    signing.name_option,
    signing.not_before_option,
)
@shared.progress_options
def sync(source: Path | str, to: Path, keep: int, allow_stale: bool, options: ArtifactOptions) -> None:
    """Keep DIR/current at the artifact that SOURCE (oci://…, s3://…) stands for: for an init container or a DaemonSet.

    The artifact is fetched only if it has changed, restored aside, and put in place by one rename. If that fails,
    DIR/current stays what it is. Several syncs may work in one DIR.
    """
    remote.ready()
    from cachebuilder.ship import fetch
    from cachebuilder.ship.sync import CURRENT, SyncedFolder

    keys = options.load_trust()
    signing.warn_unchecked(keys)
    machine = Machine.here(options.deep_gemm)
    folder = SyncedFolder(to, machine, keys, force=options.force)
    with remote.retries() as tries:
        try:
            synced = folder.sync(lambda: fetch.look_up(str(source), machine, tries), keep=keep, allow_stale=allow_stale)
        except CacheBuilderError:
            if (kept := folder.current()) is not None:
                console.echo(f"kept      {to / CURRENT}, {kept.name}", err=True)
            raise
    if synced.stale is not None:
        console.echo(f"stale     {to / CURRENT} stays {synced.generation.name}: {synced.stale}", err=True)
        return
    if synced.restored is not None:
        shared.remark(f"restored  {synced.restored.index.name}: {synced.restored.written} kernels")
    for name in synced.removed:
        shared.remark(f"removed   {name}")
    console.echo(f"{'now      ' if synced.changed else 'unchanged'} {to / CURRENT}, {synced.generation.name}")
