"""``cachebuilder run``."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

import click
from click.core import ParameterSource

from cachebuilder.cli import console, remote, shared
from cachebuilder.cli.restore import RestoreOptions, restore_options, run_restore, say_differences
from cachebuilder.errors import CommandError
from cachebuilder.restoring import baked, serving
from cachebuilder.restoring import place as places
from cachebuilder.restoring.environment import Engine, notes
from cachebuilder.restoring.machine import Machine


@dataclass(frozen=True)
class ServingOptions:
    """How the process is to serve."""

    engine: Engine
    scratch: Path | None


@click.command()
@click.argument("source", metavar="ARTIFACT|DIR", type=remote.NamedType(path_type=Path, exists=True))
@click.argument("command", metavar="-- CMD...", nargs=-1, required=True, type=click.UNPROCESSED)
@click.option("--to", metavar="DIR", type=shared.folder_type, help="Where to restore; default: in the user's cache.")
@shared.option_group("how", ServingOptions, shared.engine_option, shared.scratch_option)
@restore_options
def run(
    source: Path | str, command: tuple[str, ...], to: Path | None, how: ServingOptions, options: RestoreOptions
) -> None:
    """Run CMD from ARTIFACT, which is restored first, or from DIR, where one was restored.

    CMD is not started from damaged entries: they would make the GPU's driver fail, crash or hang. It is not started
    either if DeepGEMM would miss the kernels of DIR here; --force starts it.
    """
    machine, trust = Machine.here(options.deep_gemm), options.load_trust()
    if remote.is_remote(source):
        source = remote.fetched(str(source), machine, trust, options.force)
    source = Path(source)
    if source.is_dir():
        if to is not None:
            raise click.UsageError(f"--to goes with an artifact; {source} is a folder")
        if trust is not None:
            _say_unchecked(source)
        folder = serving.open_whole(source)
        say_differences(serving.require_fit(folder, machine, force=options.force))
        dir, indexes = source, folder.indexes
    else:
        restored = run_restore([source], to or serving.own_folder(source), machine, trust, options)
        dir, indexes = restored.dir, [restored.index]
    place = places.usable(dir, indexes, how.scratch)
    place = replace(place, baked=place.baked and options.with_baked)
    serving.keep_in_use(dir, *place.private)
    for note in (*place.notes, *notes(indexes, how.engine, os.environ, command)):
        console.echo(f"note      {note}", err=True)
    environment = serving.process_environment(place, indexes, how.engine)
    if place.baked and not options.force:
        baked.require_fit(dir, environment)
    try:
        os.execvpe(command[0], command, environment)
    except OSError as error:
        raise CommandError(f"{command[0]}: cannot be run: {error.strerror}") from error


def _say_unchecked(dir: Path) -> None:
    """A folder has no signature. With ``--trust`` that is an error; where a variable set the keys, it is a remark."""
    if click.get_current_context().get_parameter_source("trust") is ParameterSource.COMMANDLINE:
        raise click.UsageError(f"--trust goes with an artifact; {dir} is a folder, and only its restore could check it")
    console.echo(f"unchecked {dir}: a folder has no signature; only its restore could check one", err=True)
