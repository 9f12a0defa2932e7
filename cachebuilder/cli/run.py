"""``cachebuilder run``."""

from __future__ import annotations

import os
from pathlib import Path

import click
from click.core import ParameterSource

from cachebuilder.cli import remote, shared, signing
from cachebuilder.cli.restore import run_restore
from cachebuilder.cuda import nvml
from cachebuilder.errors import CommandError, VerifyError
from cachebuilder.restoring.environment import Engine, variables
from cachebuilder.restoring.folder import RestoredFolder, open_folder


@click.command()
@click.argument("source", metavar="ARTIFACT|DIR", type=remote.NamedType(path_type=Path, exists=True))
@click.argument("command", metavar="-- CMD...", nargs=-1, required=True, type=click.UNPROCESSED)
@click.option("--to", metavar="DIR", type=shared.folder_type, help="Where to restore; default: in the user's cache.")
@shared.serving_deep_gemm_option
@shared.engine_option
@shared.scratch_option
@shared.force_option
@signing.trust_option
def run(
    source: Path | str,
    command: tuple[str, ...],
    to: Path | None,
    deep_gemm: Path | None,
    engine: Engine,
    scratch: Path | None,
    force: bool,
    trust: tuple[Path, ...],
) -> None:
    """Run CMD from ARTIFACT, which is restored first, or from DIR, where one was restored.

    CMD is not started from entries that are damaged: of a cubin cut short the GPU's driver makes an error, a crash or a
    process that hangs.
    """
    if remote.is_remote(source):
        wish = remote.wish(remote.installation(deep_gemm), nvml.first_gpu(), to=to, force=force)
        with remote.retries() as tries:
            source = remote.fetched(str(source), wish, tries, signing.trusted(trust))
    source = Path(source)
    if source.is_dir():
        if to is not None:
            raise click.UsageError(f"--to goes with an artifact; {source} is a folder")
        if trust:
            _say_unchecked(source)
        folder = open_folder(source)
        _require_whole(folder)
        found = folder.indexes
        dir = source
    else:
        if to is None:
            to = _own_folder(source)
        done = run_restore((source,), to, deep_gemm, force, trust)
        found = [done.index]
        dir = done.dir
    environment = os.environ | {v.name: v.value for v in variables(dir, found, engine, scratch, os.environ)}
    try:
        os.execvpe(command[0], command, environment)
    except OSError as error:
        raise CommandError(f"{command[0]}: cannot be run: {error.strerror}") from error


def _say_unchecked(dir: Path) -> None:
    """A folder bears no signature: asked to check one, refuse; where every restore is to check, say it."""
    if click.get_current_context().get_parameter_source("trust") is ParameterSource.COMMANDLINE:
        raise click.UsageError(
            f"--trust goes with an artifact; {dir} is a folder, checked when it was restored or never"
        )
    click.echo(f"unchecked {dir}: a folder bears no signature; it was checked when it was restored, or never", err=True)


def _require_whole(folder: RestoredFolder) -> None:
    """What `restore` checks of what is there already."""
    if damage := folder.damage():
        more = f" and {len(damage) - 1} more" if damage[1:] else ""
        raise VerifyError(f"{folder.path}: damaged: {damage[0]}{more}", hint=shared.RESTORE_AGAIN)


def _own_folder(artifact: Path) -> Path:
    """One folder for each artifact's bytes, so that no two meet in one."""
    import hashlib

    from cachebuilder.artifact.read import open_file
    from cachebuilder.common.cache import cache_folder

    with open_file(artifact) as file:
        return cache_folder() / "restored" / hashlib.file_digest(file, "sha256").hexdigest()[:16]
