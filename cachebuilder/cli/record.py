"""``cachebuilder record``."""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cachebuilder.authoring import record as recording
from cachebuilder.cli import shared, table
from cachebuilder.errors import CacheBuilderError, ManifestError, RecordingError

if TYPE_CHECKING:
    from cachebuilder.authoring.sources import NewSource
    from cachebuilder.cuda.gpus import Gpu
    from cachebuilder.cuda.toolchain import Toolchain
    from cachebuilder.manifest.schema import Manifest


@click.command()
@click.argument("command", metavar="-- CMD...", nargs=-1, required=True, type=click.UNPROCESSED)
@click.option("-o", "--output", type=click.Path(path_type=Path, dir_okay=False), help="A new manifest to write.")
@click.option(
    "--add-to",
    "known",
    metavar="MANIFEST",
    type=click.Path(path_type=Path, dir_okay=False, exists=True),
    help="A manifest to add to: the kernels that its ops do not ask for.",
)
@click.option("--gpu", metavar="NAME", help="With -o: the GPU that CMD runs on; default: the one that is here.")
@click.option("--name", default="recorded", show_default=True, help="With -o: the manifest's name.")
@shared.nvcc_option
@shared.deep_gemm_option
@shared.progress_options
def record(
    command: tuple[str, ...],
    output: Path | None,
    known: Path | None,
    gpu: str | None,
    name: str,
    nvcc: Path | None,
    deep_gemm: Path | None,
) -> None:
    """Run CMD with an empty cache, and write every kernel that its DeepGEMM asks for into a manifest.

    Each is compiled as always, so CMD takes as long as it does at its first start. Ctrl-C or SIGTERM ends CMD, and the
    manifest is written then, too. The exit code is CMD's, or 0 where it was ended so.
    """
    from cachebuilder.common.cache import cache_folder
    from cachebuilder.cuda import toolchain  # pydantic's import is slow: not for a synopsis
    from cachebuilder.manifest import schema as manifests

    # All that could go wrong afterwards is looked at first: what is recorded took an hour of somebody's GPU.
    manifest: Manifest | None = None
    if known is not None and output is None:
        if gpu is not None:
            raise click.UsageError("--gpu goes with -o; the manifest of --add-to has its target")
        manifest = manifests.load(known)[0]
        target = manifest.target.gpu
    elif output is not None and known is None:
        target = _target(gpu)
        manifests.parse(
            json.dumps({"name": name, "target": {"gpu": target.name}, "sources": [{"source": "x"}]}).encode()
        )
    else:
        raise click.UsageError("wanted -o FILE for a new manifest, or --add-to MANIFEST, and not both")
    path = known or output
    assert path is not None
    _check_writable(path, new=manifest is None)
    recording.check_environment(os.environ)
    compiler = toolchain.find(nvcc or recording.compiler_of(os.environ))
    recording.check_compiler(compiler)

    root = cache_folder() / "recordings"
    root.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=root))
    program = re.sub(r"[^ -~]", "?", os.path.basename(command[0]))  # for a comment in YAML
    try:
        code, told = recording.run(command, os.environ | recording.variables(folder, compiler, os.environ))
        found = recording.read(folder)
        recording.require_kernels(found, f"{program} (exit code {code})")
        recording.require_target(found, target.name, target.major)
        if manifest is None:
            count = _create(path, name, target, program, found)
        else:
            count = _add(path, manifest, compiler, deep_gemm, program, found)
    except CacheBuilderError as error:
        if any((folder / "root").glob("cache/*")):
            error.hint = f"{f'{error.hint}; ' if error.hint else ''}what was recorded is kept in {folder}"
        else:
            recording.remove(folder)
        raise
    except OSError as error:
        raise ManifestError(
            f"{path}: cannot be written: {error.strerror}", hint=f"what was recorded is kept in {folder}"
        ) from error
    except KeyboardInterrupt:
        click.echo(f"what was recorded is kept in {folder}", err=True)
        raise
    recording.remove(folder)
    table.line("recorded", f"{len(found.kernels)} kernels of {program}, {found.requests} compilations")
    for miss in found.failed:
        table.line("", f"{miss.kernel}: asked for, and did not compile or was cut short: left out")
    table.line("manifest", f"{path}: {count} sources {'added' if manifest else 'written'}")
    if ops := _ops(found.kernels):
        click.echo("ops that ask for such kernels, each for every M (fill in each ?):")
        for op in ops:
            click.echo(f"  {op}")
    table.line("next", f"cachebuilder build {path}")
    sys.exit(0 if told else code)


def _target(name: str | None) -> Gpu:
    """The GPU called ``name``, or the one that is here."""
    from cachebuilder.cuda import gpus, nvml

    here = nvml.first_gpu() if name is None else None
    if name is None and here is None:
        raise RecordingError("wanted --gpu, the GPU that the program runs on: none is seen here")
    try:
        return gpus.find(name or here.name)  # type: ignore[union-attr]  # one of them there is
    except ValueError as error:
        raise RecordingError(f"--gpu: {error}") from None


def _check_writable(path: Path, new: bool) -> None:
    if new and path.exists():
        raise ManifestError(f"{path}: is there already", hint=f"add to it with --add-to {path}, or name another file")
    if not os.access(path.absolute().parent, os.W_OK):
        raise ManifestError(f"{path}: cannot be written: its folder is not there, or not to be written")


def _create(path: Path, name: str, target: Gpu, program: str, found: recording.Recording) -> int:
    from cachebuilder.authoring import sources
    from cachebuilder.common.version import __version__
    from cachebuilder.deepgemm.environment import kernel_variables

    assert found.generation is not None, "there are kernels"
    fields: dict[str, object] = {"name": name, "target": {"gpu": target.name}}
    if variables := kernel_variables(found.generation, os.environ):
        fields["environment"] = variables
    comment = (
        f"What {program} asked DeepGEMM for ({found.generation} cache), recorded by cachebuilder {__version__}.\n"
        "A source is one kernel; an op, where one asks for it, is all of them for every M."
    )
    sources.create(path, fields, comment, _sources(found.kernels, program))
    return len(found.kernels)


def _add(
    path: Path,
    manifest: Manifest,
    compiler: Toolchain,
    deep_gemm: Path | None,
    program: str,
    found: recording.Recording,
) -> int:
    """Add what the manifest's own ops do not ask for; everything, where that cannot be told."""
    from cachebuilder.authoring import sources
    from cachebuilder.deepgemm import installation
    from cachebuilder.deepgemm.environment import kernel_variables
    from cachebuilder.manifest.inputs import Inputs
    from cachebuilder.planning import make as plan

    assert found.generation is not None, "there are kernels"
    covered: set[str] = set()
    try:
        copy = installation.find(deep_gemm)
        if copy.generation != found.generation:
            raise RecordingError(
                f"wanted kernels of the {copy.generation} generation, for {copy}, found {found.generation} ones",
                hint="name the DeepGEMM that the program uses with --deep-gemm",
            )
        with shared.show_progress() as progress:
            made = plan.make(Inputs(manifest, path.read_bytes(), compiler, copy), progress=progress)
        covered = {kernel.source for kernel in made.kernels}
    except RecordingError:
        raise
    except CacheBuilderError as error:
        shared.remark(f"the manifest cannot be planned here, so every kernel is added: {error}")
    if (variables := kernel_variables(found.generation, os.environ)) != manifest.environment:
        shared.remark(f"the manifest's environment is {manifest.environment}, the program ran with {variables}")
    new = [kernel for kernel in found.kernels if kernel.source not in covered]
    if covered:
        table.line("covered", f"{len(found.kernels) - len(new)} kernels by what the manifest has")
    return sources.add(path, _sources(new, program))


def _sources(kernels: Sequence[recording.Recorded], program: str) -> list[NewSource]:
    """For a manifest; above each, the op that asks for such kernels, as far as the source tells."""
    from cachebuilder.authoring.sources import NewSource

    made = []
    for kernel in kernels:
        ops = _ops([kernel])
        op = f"; an op for it: {ops[0].removeprefix('- ')}" if ops else ""
        made.append(NewSource(kernel.source, f"{kernel.name}, asked for by {program}{op}", kernel.name))
    return made


def _ops(kernels: Sequence[recording.Recorded]) -> list[str]:
    """Lines of a manifest, as `misses` advises them."""
    from cachebuilder.deepgemm.source import read_shape
    from cachebuilder.restoring import misses

    shapes = [read_shape(kernel.source) for kernel in kernels]
    return list(dict.fromkeys(misses.advice(shape) for shape in shapes if shape and shape.op))
