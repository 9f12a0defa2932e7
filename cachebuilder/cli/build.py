"""``cachebuilder build``."""

from __future__ import annotations

from pathlib import Path

import click

from cachebuilder import building
from cachebuilder.cli import remote, shared, words
from cachebuilder.cli.push import run_push
from cachebuilder.manifest.inputs import find_inputs


@click.command()
@shared.manifest_argument
@click.option(
    "-o",
    "--output",
    type=remote.NamedType(path_type=Path, dir_okay=False),
    help="Default: dist/<name>.tar.zst; to oci://… or s3://… it is pushed from there.",
)
@click.option("-j", "--jobs", type=click.IntRange(min=1), help="Compilers at once; default: all cores.")
@shared.nvcc_option
@shared.deep_gemm_option
@shared.store_option
@shared.device_option
@shared.progress_options
@click.option("--separate", is_flag=True, help="Compile each kernel by itself: slower, the same bytes.")
@click.option(
    "--check-code",
    type=click.IntRange(min=0),
    default=1,
    show_default=True,
    metavar="N",
    help="Compare the code of N random kernels with what nvcc makes of each alone.",
)
def build(
    manifest: Path,
    output: Path | str | None,
    jobs: int | None,
    nvcc: Path | None,
    deep_gemm: Path | None,
    use_store: bool,
    device: str,
    separate: bool,
    check_code: int,
) -> None:
    """Plan MANIFEST, compile every kernel, and pack them into one artifact.

    Beside it lies ARTIFACT.build.json, the record of the build, for `report`.
    """
    inputs = find_inputs(manifest, nvcc=nvcc, deep_gemm=deep_gemm)
    if not shared.quiet():
        click.echo(f"using     {inputs.installation}")
        click.echo(f"          {inputs.toolchain}")
    destination = str(output) if output and remote.is_remote(output) else None
    if destination is not None:
        remote.ready()
    if output is None or destination is not None:
        output = Path("dist") / f"{inputs.manifest.name}.tar.zst"
    chosen = shared.choose_device(device, inputs.manifest.target.gpu)
    with shared.show_progress() as progress:
        built = building.build(inputs, Path(output), jobs, use_store, not separate, check_code, chosen, progress)
    if not shared.quiet():
        _say(built, chosen)
    if destination is not None:
        run_push(destination, (built.packed.path,))


def _say(built: building.Built, chosen: str) -> None:
    plan, compiled, packed = built.plan, built.compiled, built.packed
    sms = ", ".join(map(str, plan.sm_counts))
    click.echo(
        f"plan      {len(plan.kernels)} kernels from {plan.calls} calls: {plan.gpu.name}, {plan.arch}, {sms} SMs"
    )
    made = words.several(len(compiled.compiled), "kernel")
    click.echo(f"compiled  {made}, {compiled.reused} from the store, {compiled.checked} checked")
    click.echo(
        f"time      plan {built.plan_seconds:.1f} s, compile {compiled.wall_seconds:.1f} s "
        f"({compiled.cpu_seconds:.1f} s of CPU), pack {built.pack_seconds:.1f} s"
    )
    if chosen == "cuda":
        click.echo(f"on GPU    asked for the same kernels; {plan.calls} calls served from the artifact")
    click.echo(f"artifact  {packed.path}, {words.size(packed.size)} ({words.size(packed.unpacked_size)} unpacked)")
    click.echo(f"sha256    {packed.sha256}")
    click.echo(f"next      cachebuilder inspect {packed.path}")
