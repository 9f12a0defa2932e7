"""``cachebuilder bake``."""

from __future__ import annotations

from pathlib import Path

import click

from cachebuilder.artifact.pack import pack_with_baked
from cachebuilder.authoring.observe import bake as baking
from cachebuilder.authoring.record import check_writable
from cachebuilder.cli import shared, words
from cachebuilder.cli.observe import find_gpu
from cachebuilder.restoring import baked, serving
from cachebuilder.restoring import place as places
from cachebuilder.restoring.environment import Engine


@click.command()
@click.argument("dir", type=shared.folder_type)
@click.argument("command", metavar="-- CMD...", nargs=-1, required=True, type=click.UNPROCESSED)
@click.option("--gpu", required=True, metavar="NAME", help="The GPU to show to the engine, for example H200.")
@shared.engine_option
@click.option(
    "--artifact",
    metavar="ARTIFACT",
    type=click.Path(path_type=Path, dir_okay=False, exists=True),
    help="The artifact that was restored in DIR, to which --output adds what is baked.",
)
@click.option(
    "-o",
    "--output",
    metavar="FILE",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write an artifact with both.",
)
@shared.progress_options
def bake(
    dir: Path, command: tuple[str, ...], gpu: str, engine: Engine, artifact: Path | None, output: Path | None
) -> None:
    """Run an engine's serve command CMD on a virtual GPU, and keep what its other compilers make in DIR.

    An artifact was restored in DIR before. CMD is run as it will serve from there: Triton, torch.compile and vLLM fill
    caches in DIR/baked, and `run` and `env` lead the engine to them. Do it in the image that serves: the same Python,
    packages, folders and variables. No GPU and no weights are needed.

    With --artifact and -o, what was baked travels in an artifact, which `restore` puts into DIR of another machine.
    """
    if (artifact is None) != (output is None):
        raise click.UsageError("wanted --artifact and -o together, found one of them")
    target = find_gpu(gpu)
    folder = serving.open_whole(dir)
    if artifact is not None:
        folder.require_restored(artifact)
    if output is not None:
        check_writable(output)  # before the minutes that a bake takes
    place = places.usable(dir, folder.indexes, None)
    environment = serving.process_environment(place, folder.indexes, engine)
    with shared.show_progress() as progress:
        filled = baking.bake(dir, command, target, environment, progress)
    for change in filled.changes:
        shared.say(f"changed   {change.what}: {change.why}")
    shared.say(f"ran       {words.several(filled.run.requests, 'request')}, {filled.run.seconds:.0f} s")
    for name, (files, size) in filled.sizes.items():
        shared.say(f"baked     {name}: {words.several(files, 'file')}, {size / 1e6:.1f} MB")
    shared.say(
        "timing    no choice by timing is kept: the candidates are compiled, and the card chooses at its first start"
    )
    if artifact is not None and output is not None:
        packed = pack_with_baked(artifact, baked.collect(dir), dir / baked.FOLDER).write(output)
        shared.say(f"wrote     {packed.path}: {words.size(packed.size)}, sha256 {packed.sha256}")
    shared.say(
        f"next      cachebuilder run {dir} --engine {engine} -- CMD, checked with {dir / baked.FOLDER / baked.RECORD}"
    )
