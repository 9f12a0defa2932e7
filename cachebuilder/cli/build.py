"""``cachebuilder build``."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import click

import cachebuilder
from cachebuilder.authoring.observe import observe as observing
from cachebuilder.authoring.record import check_writable
from cachebuilder.building import Built
from cachebuilder.cli import remote, shared
from cachebuilder.cli.observe import EngineOptions, find_gpu, print_summary
from cachebuilder.cli.push import run_push
from cachebuilder.cli.words import several, size
from cachebuilder.common.files import make_folders, write_atomically
from cachebuilder.compiling.compiler import CompileOptions
from cachebuilder.cuda.device import DeviceChoice
from cachebuilder.errors import ManifestError
from cachebuilder.manifest import schema as manifests


@dataclass(frozen=True)
class _Options:
    device: DeviceChoice
    jobs: int | None
    separate: bool
    check_code: int


@click.command()
@click.argument("manifest_or_command", metavar="MANIFEST | -- CMD...", nargs=-1, required=True, type=click.UNPROCESSED)
@shared.option_group(
    "engine",
    EngineOptions,
    click.option("--gpu", metavar="NAME", help="With -- CMD: the GPU to show to the engine, for example H200."),
    shared.with_flashinfer_option,
)
@click.option(
    "-o",
    "--output",
    type=remote.NamedType(path_type=Path, dir_okay=False),
    help="The artifact's file; default: dist/<name>.tar.zst. oci://… or s3://…: write the default file and push it.",
)
@shared.tools_options
@shared.progress_options
@shared.store_options
@shared.option_group(
    "how",
    _Options,
    shared.device_option,
    click.option("-j", "--jobs", type=click.IntRange(min=1), help="Compilers at once; default: one for each core."),
    click.option("--separate", is_flag=True, help="Compile each kernel by itself: slower, but the same bytes."),
    click.option(
        "--check-code",
        type=click.IntRange(min=0),
        default=1,
        show_default=True,
        metavar="N",
        help="Choose N new kernels at random, and compare their code with what nvcc makes of each alone.",
    ),
)
def build(
    manifest_or_command: tuple[str, ...],
    engine: EngineOptions,
    output: Path | str | None,
    tools: shared.ToolPaths,
    kept: shared.StoreOptions,
    how: _Options,
) -> None:
    """Plan MANIFEST, compile every kernel, and pack them into one artifact.

    With --gpu and an engine's serve command CMD, `observe` writes the manifest first, as ARTIFACT.manifest.yaml. Also
    writes the record of the build, ARTIFACT.build.json, which `report` reads.
    """
    shared_store = kept.open()
    if engine.gpu is not None:
        manifest, tools, output = _observe(manifest_or_command, engine, output, tools)
    elif engine.with_flashinfer:
        raise click.UsageError("--with-flashinfer goes with -- CMD; a MANIFEST has a field flashinfer")
    elif len(manifest_or_command) > 1:
        words = " ".join(manifest_or_command)
        raise click.UsageError(f"wanted one MANIFEST, found {words}; an engine's command wants --gpu NAME")
    else:
        manifest = Path(manifest_or_command[0])
    inputs = tools.load_manifest(manifest)
    shared.say(f"using     {inputs.installation}")
    shared.say(f"          {inputs.toolchain}")
    destination = str(output) if output and remote.is_remote(output) else None
    if destination is not None:
        remote.ready()
    if output is None or destination is not None:
        output = Path("dist") / f"{inputs.manifest.name}.tar.zst"
    options = CompileOptions(how.jobs, kept.use_store, not how.separate, how.check_code, shared_store)
    with shared.show_progress() as progress:
        built = cachebuilder.build(inputs, output, options=options, device=how.device, progress=progress)
    _print_summary(built)
    if destination is not None:
        run_push(destination, (built.packed.path,))


def _observe(
    command: tuple[str, ...], engine: EngineOptions, output: Path | str | None, tools: shared.ToolPaths
) -> tuple[Path, shared.ToolPaths, Path | str]:
    """Observe an engine; returns the manifest, the DeepGEMM that the engine called, and the artifact's file."""
    if tools.deep_gemm is not None:
        raise click.UsageError("--deep-gemm goes with a manifest; an engine brings its own DeepGEMM")
    _check_output(output)  # before the minutes that an observation takes
    with shared.show_progress() as progress:
        observation = observing.observe(
            command,
            observing.Host(find_gpu(engine.gpu or ""), os.environ, tools.nvcc),
            with_flashinfer=engine.with_flashinfer,
            progress=progress,
        )
    print_summary(observation)
    data = observation.manifest.encode()
    default = Path("dist") / f"{manifests.parse(data, 'observed').name}.tar.zst"
    file = default if output is None or remote.is_remote(output) else Path(output)
    manifest = file.with_name(f"{file.name}.manifest.yaml")
    make_folders(manifest.parent)
    write_atomically(manifest, data, ManifestError)
    shared.say(f"manifest  {manifest}")
    return manifest, shared.ToolPaths(tools.nvcc, observation.installation.path, tools.flashinfer), output or file


def _check_output(output: Path | str | None) -> None:
    """Raise an error if the artifact could not be written to ``output``, or pushed there."""
    if output is not None and remote.is_remote(output):
        remote.ready()
    file = Path("dist", "artifact") if output is None or remote.is_remote(output) else Path(output)
    existing = next(folder for folder in file.absolute().parents if folder.exists())
    if not existing.is_dir():
        raise ManifestError(f"{file}: cannot be written: {existing} is no folder")
    check_writable(existing / file.name)


def _print_summary(built: Built) -> None:
    plan, compiled, packed = built.plan, built.compiled, built.packed
    sm_counts = ", ".join(map(str, plan.sm_counts))
    target = f"{plan.gpu.name}, {plan.arch}, {sm_counts} SMs"
    shared.say(f"plan      {len(plan.kernels)} kernels from {plan.calls} calls: {target}")
    if plan.flashinfer:
        modules, gemm_kernels = (
            several(len(plan.flashinfer.modules), "module"),
            several(len(plan.flashinfer.kernels), "kernel"),
        )
        shared.say(
            f"flashinfer {modules}, {gemm_kernels} from {plan.flashinfer.calls} calls, {built.flashinfer_seconds:.1f} s"
        )
    new_kernels = several(len(compiled.compiled), "kernel")
    shared.say(f"compiled  {new_kernels}, {compiled.reused} from the store, {compiled.checked} checked")
    shared.say(
        f"time      plan {built.plan_seconds:.1f} s, compile {compiled.wall_seconds:.1f} s "
        f"({compiled.cpu_seconds:.1f} s of CPU), pack {built.pack_seconds:.1f} s"
    )
    if built.device == "cuda":
        shared.say(f"on GPU    needs the same kernels; all {plan.calls} calls were served from the artifact")
    shared.say(f"artifact  {packed.path}, {size(packed.size)} ({size(packed.unpacked_size)} unpacked)")
    shared.say(f"sha256    {packed.sha256}")
    shared.say(f"next      cachebuilder inspect {packed.path}")
