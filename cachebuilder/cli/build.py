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
    help="Default: dist/<name>.tar.zst; to oci://… or s3://… it is pushed from there.",
)
@shared.tools_options
@shared.device_option
@shared.progress_options
@shared.option_group(
    "how",
    _Options,
    click.option("-j", "--jobs", type=click.IntRange(min=1), help="Compilers at once; default: all cores."),
    shared.store_option,
    click.option("--separate", is_flag=True, help="Compile each kernel by itself: slower, the same bytes."),
    click.option(
        "--check-code",
        type=click.IntRange(min=0),
        default=1,
        show_default=True,
        metavar="N",
        help="Compare the code of N random kernels with what nvcc makes of each alone.",
    ),
)
def build(
    manifest: Path, output: Path | str | None, tools: shared.ToolPaths, device: DeviceChoice, how: _Options
) -> None:
    """Plan MANIFEST, compile every kernel, and pack them into one artifact.

    Beside it lies ARTIFACT.build.json, the record of the build, for `report`.
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
    _say(built)
    if destination is not None:
        run_push(destination, (built.packed.path,))


def _say(built: Built) -> None:
    plan, compiled, packed = built.plan, built.compiled, built.packed
    sms = ", ".join(map(str, plan.sm_counts))
    target = f"{plan.gpu.name}, {plan.arch}, {sms} SMs"
    shared.say(f"plan      {len(plan.kernels)} kernels from {plan.calls} calls: {target}")
    made = words.several(len(compiled.compiled), "kernel")
    shared.say(f"compiled  {made}, {compiled.reused} from the store, {compiled.checked} checked")
    shared.say(
        f"time      plan {built.plan_seconds:.1f} s, compile {compiled.wall_seconds:.1f} s "
        f"({compiled.cpu_seconds:.1f} s of CPU), pack {built.pack_seconds:.1f} s"
    )
    if built.device == "cuda":
        shared.say(f"on GPU    asked for the same kernels; {plan.calls} calls served from the artifact")
    shared.say(f"artifact  {packed.path}, {words.size(packed.size)} ({words.size(packed.unpacked_size)} unpacked)")
    shared.say(f"sha256    {packed.sha256}")
    shared.say(f"next      cachebuilder inspect {packed.path}")
