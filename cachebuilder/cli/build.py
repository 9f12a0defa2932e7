"""``cachebuilder build``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import click

import cachebuilder
from cachebuilder.building import Built
from cachebuilder.cli import remote, shared, words
from cachebuilder.cli.push import run_push
from cachebuilder.compiling.compiler import CompileOptions
from cachebuilder.cuda.device import DeviceChoice


@dataclass(frozen=True)
class _Options:
    jobs: int | None
    use_store: bool
    separate: bool
    check_code: int


@click.command()
@shared.manifest_argument
@click.option(
    "-o",
    "--output",
    type=remote.NamedType(path_type=Path, dir_okay=False),
    help="The artifact's file; default: dist/<name>.tar.zst. oci://… or s3://…: write the default file and push it.",
)
@shared.tools_options
@shared.device_option
@shared.progress_options
@shared.option_group(
    "how",
    _Options,
    click.option("-j", "--jobs", type=click.IntRange(min=1), help="Compilers at once; default: one for each core."),
    shared.store_option,
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
    manifest: Path, output: Path | str | None, tools: shared.ToolPaths, device: DeviceChoice, how: _Options
) -> None:
    """Plan MANIFEST, compile every kernel, and pack them into one artifact.

    Also writes the record of the build, ARTIFACT.build.json, which `report` reads.
    """
    inputs = cachebuilder.load_manifest(manifest, nvcc=tools.nvcc, deep_gemm=tools.deep_gemm)
    shared.say(f"using     {inputs.installation}")
    shared.say(f"          {inputs.toolchain}")
    destination = str(output) if output and remote.is_remote(output) else None
    if destination is not None:
        remote.ready()
    if output is None or destination is not None:
        output = Path("dist") / f"{inputs.manifest.name}.tar.zst"
    options = CompileOptions(how.jobs, how.use_store, not how.separate, how.check_code)
    with shared.show_progress() as progress:
        built = cachebuilder.build(inputs, output, options=options, device=device, progress=progress)
    _print_summary(built)
    if destination is not None:
        run_push(destination, (built.packed.path,))


def _print_summary(built: Built) -> None:
    plan, compiled, packed = built.plan, built.compiled, built.packed
    sm_counts = ", ".join(map(str, plan.sm_counts))
    target = f"{plan.gpu.name}, {plan.arch}, {sm_counts} SMs"
    shared.say(f"plan      {len(plan.kernels)} kernels from {plan.calls} calls: {target}")
    new_kernels = words.several(len(compiled.compiled), "kernel")
    shared.say(f"compiled  {new_kernels}, {compiled.reused} from the store, {compiled.checked} checked")
    shared.say(
        f"time      plan {built.plan_seconds:.1f} s, compile {compiled.wall_seconds:.1f} s "
        f"({compiled.cpu_seconds:.1f} s of CPU), pack {built.pack_seconds:.1f} s"
    )
    if built.device == "cuda":
        shared.say(f"on GPU    needs the same kernels; all {plan.calls} calls were served from the artifact")
    shared.say(f"artifact  {packed.path}, {words.size(packed.size)} ({words.size(packed.unpacked_size)} unpacked)")
    shared.say(f"sha256    {packed.sha256}")
    shared.say(f"next      cachebuilder inspect {packed.path}")
