"""``cachebuilder observe``."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

import click

from cachebuilder.authoring.observe import observe as observing
from cachebuilder.authoring.observe.observe import Observation
from cachebuilder.authoring.record import check_writable
from cachebuilder.cli import console, shared, words
from cachebuilder.common.files import write_atomically
from cachebuilder.cuda import gpus
from cachebuilder.cuda.gpus import Gpu
from cachebuilder.errors import ManifestError, VerifyError


@dataclass(frozen=True)
class EngineOptions:
    """How an engine is observed: the name of the GPU that it sees; whether it takes from FlashInfer what it would."""

    gpu: str | None
    with_flashinfer: bool


@click.command()
@click.argument("command", metavar="-- CMD...", nargs=-1, required=True, type=click.UNPROCESSED)
@click.option("-o", "--output", type=click.Path(path_type=Path, dir_okay=False), help="The manifest to write.")
@click.option(
    "--check",
    "known",
    metavar="MANIFEST",
    type=click.Path(path_type=Path, dir_okay=False, exists=True),
    help="Compare with this manifest: exit code 11 if it lacks a kernel.",
)
@shared.option_group(
    "engine",
    EngineOptions,
    click.option("--gpu", required=True, metavar="NAME", help="The GPU to show to the engine, for example H200."),
    shared.with_flashinfer_option,
)
@click.option("--name", help="The manifest's name; default: the model's and the GPU's.")
@shared.nvcc_option
@shared.progress_options
def observe(
    command: tuple[str, ...],
    output: Path | None,
    known: Path | None,
    engine: EngineOptions,
    name: str | None,
    nvcc: Path | None,
) -> None:
    """Run an engine's serve command CMD on a virtual GPU, and write what it asks DeepGEMM for into a manifest.

    No GPU and no weights are needed: a folder with the model's config.json will do. cachebuilder must be installed
    beside the engine. CMD is started, sent requests and stopped; a program that serves nothing is run to its end.
    """
    if output is None and known is None:
        raise click.UsageError("wanted -o FILE for a new manifest, or --check MANIFEST, or both")
    target = find_gpu(engine.gpu or "")
    if output is not None:
        check_writable(output)
    lack = None
    with shared.show_progress() as progress:
        observation = observing.observe(
            command,
            observing.Host(target, os.environ, nvcc),
            name=name,
            with_flashinfer=engine.with_flashinfer,
            progress=progress,
        )
        if output is not None:
            write_atomically(output, observation.manifest.encode(), ManifestError)
        if known is not None:
            lack = observing.check(observation, known, nvcc, progress)
    print_summary(observation)
    if output is not None:
        shared.say(f"manifest  {output}")
        shared.say(f"next      cachebuilder build {output} --deep-gemm {observation.installation.path}")
    if known is not None and lack is not None:
        _print_lack(observation, known, lack)


def find_gpu(name: str) -> Gpu:
    """The GPU that ``--gpu`` names."""
    try:
        return gpus.find(name)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--gpu") from None


def print_summary(observation: Observation) -> None:
    """Print what was changed, called and planned."""
    run, observed = observation.run, observation.observed
    for change in observation.changes:
        shared.say(f"changed   {change.what}: {change.why}")
    shared.say(f"using     {observation.installation}")
    calls, requests = words.several(observed.calls, "call"), words.several(run.requests, "request")
    shared.say(f"observed  {calls}, {requests}; the engine was up after {run.up_seconds:.0f} s of {run.seconds:.0f} s")
    for what, count in observed.unexpressed.items():
        seen = words.several(count, "call")
        shared.say(f"no op     {what}: {seen}; sources ask for this run's kernels, and another M may need more")
    for one in observed.uncalled:
        modules, shapes = words.several(one.count, "module"), ", ".join(map(str, map(list, one.shapes)))
        by_warmup = ", called by the engine's warm-up alone" if one.warmed else ""
        shared.say(
            f"uncalled  {one.modules}: {modules} with quantised weights {shapes}{by_warmup}: no request reached them, "
            "or the engine serves them with another kernel"
        )
    if needs := observation.flashinfer:
        parts = [*needs.modules, *([words.several(len(needs.gemms), "GEMM shape")] if needs.gemms else [])]
        then = "" if observation.with_flashinfer else "; --with-flashinfer adds it to the manifest"
        shared.say(f"compiles  FlashInfer would compile in the serving process: {', '.join(parts)}{then}")
    ops, sources = words.several(len(observed.ops), "op"), words.several(observation.sources, "source")
    shared.say(
        f"kernels   {len(observation.requested)} asked for in this run; {ops} and {sources} ask for "
        f"{len(observation.planned)}"
    )


def _print_lack(observation: Observation, known: Path, lack: observing.Lack) -> None:
    """Print what a manifest lacks, and end the process if it lacks something."""
    if not lack:
        shared.say(f"check     {known} asks for all of them")
        return
    for name, count in lack.names.items():
        console.echo(f"missing   {name}: {words.several(count, 'kernel')}")
    for gemm in lack.flashinfer.gemms:
        console.echo(f"missing   FlashInfer's GEMM {gemm} up to m={gemm.max_m}")
    for module in lack.flashinfer.modules:
        console.echo(f"missing   FlashInfer's module {module}")
    if lack.kernels:
        console.echo(f"{known} lacks {lack.kernels} kernels, of which this run asked for {lack.requested}.")
    console.echo("What was observed:")
    console.echo(observation.manifest, newline=False)
    sys.exit(VerifyError.exit_code)
