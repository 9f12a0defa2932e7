"""``cachebuilder verify``."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from pathlib import Path

import click

from cachebuilder.cli import console, remote, shared, table, words
from cachebuilder.cuda.device import DeviceChoice
from cachebuilder.deepgemm import installation as installations
from cachebuilder.verifying import verify as verifying
from cachebuilder.verifying.report import FlashInferReplay, GpuReport, Replay, Report

#: How many missing kernels and damaged files are listed one by one; the JSON has all.
_SHOWN = 20


@dataclass(frozen=True)
class ServingPackages:
    """The packages that will serve, where the user names them."""

    deep_gemm: Path | None
    flashinfer: Path | None


@click.command()
@click.argument("target", type=remote.LocationType(path_type=Path, exists=True), metavar="ARTIFACT|DIR")
@click.option(
    "--manifest",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Replay these shapes instead of those it was built for.",
)
@shared.option_group("serving", ServingPackages, shared.deep_gemm_option, shared.flashinfer_option)
@shared.device_option
@click.option(
    "--report",
    "report_file",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Where to write what the GPU showed; default: beside ARTIFACT.",
)
@shared.json_option
@shared.progress_options
def verify(
    target: Path,
    manifest: Path | None,
    serving: ServingPackages,
    device: DeviceChoice,
    report_file: Path | None,
    as_json: bool,
) -> None:
    """Prove that DeepGEMM finds every kernel in ARTIFACT or restored DIR.

    Every call of the manifest is replayed on a virtual GPU with the frozen compiler, which refuses to compile. With
    --device cuda, the calls are also made on the real GPU, and every kernel's results are compared with a reference.
    """
    with shared.show_progress() as progress:
        report = verifying.verify(
            target,
            deep_gemm=serving.deep_gemm,
            flashinfer=serving.flashinfer,
            manifest=manifest,
            device=device,
            progress=progress,
        )
    report.write_gpu_report(report_file)
    if as_json:
        console.echo_json(report.to_json())
    else:
        _print(report)
    report.require_right()


def _print(report: Report) -> None:
    table.line("using", str(installations.find(Path(report.deep_gemm.path))))
    for item in report.damage[:_SHOWN]:
        table.line("damaged", f"{item}", table.BAD)
    _print_more(len(report.damage))
    if not report.damage:
        console.echo(f"files     those of {report.entries} entries are whole")
    for replay in report.replays:
        _print_replay(replay)
    for sentence in report.uncovered:
        table.line("note", sentence)
    if report.on_gpu:
        _print_on_gpu(report.on_gpu)


def _print_replay(replay: Replay) -> None:
    counts = f"{words.several(len(replay.hits), 'kernel')} found, {len(replay.missing)} missing"
    colour = table.BAD if replay.missing else table.GOOD
    table.line("replay", f"{replay.manifest}: {replay.calls} calls, {counts}", colour)
    if replay.unlisted:
        console.echo(f"          {len(replay.unlisted)} of those found are in no artifact's index")
    for kernel in replay.missing[:_SHOWN]:
        table.line("damaged" if kernel.damaged else "missing", kernel.entry, table.BAD)
        for selection in kernel.selected_by:
            op = replay.ops[selection.op]
            head = f"ops[{selection.op}] {op.op} {op.shape()}, {selection.sm_count} SMs: {op.variable} "
            _print_indented(head + words.ranges(selection.ranges))
    _print_more(len(replay.missing))
    if replay.flashinfer:
        _print_flashinfer(replay.flashinfer)
    for refusal in replay.refusals:
        op = replay.ops[refusal.op]
        table.line("refused", f"ops[{refusal.op}] {op.op} {op.shape()}, {refusal.sm_count} SMs", table.BAD)
        text = " ".join(refusal.text.split())
        _print_indented(f"at {op.variable} {refusal.value}: {text if len(text) <= 300 else text[:299] + '…'}")
    for difference in replay.differences:
        for line in difference.lines():
            if line.startswith(difference.field):
                table.line("differs", line, table.UNSURE)
            else:
                console.echo(line)


def _print_flashinfer(replay: FlashInferReplay) -> None:
    loaded = f"{words.several(len(replay.modules), 'module')} loaded"
    counts = f"{words.several(len(replay.hits), 'kernel')} found, {len(replay.missing)} missing"
    colour = table.BAD if replay.missing or replay.problems else table.GOOD
    table.line("replay", f"FlashInfer: {loaded}; its GEMM: {replay.calls} calls, {counts}", colour)
    for name in replay.missing[:_SHOWN]:
        table.line("missing", name, table.BAD)
    _print_more(len(replay.missing))
    for problem in replay.problems:
        table.line("problem", problem, table.BAD)


def _print_on_gpu(report: GpuReport) -> None:
    for replay in report.replays:
        counts = f"{replay.calls} calls, {len(replay.missed)} kernels missed"
        table.line("on GPU", f"{report.device.name}: {counts}", table.BAD if replay.missed else table.GOOD)
        if not replay.trials:
            continue
        kernels = {entry for trial in replay.trials for entry in trial.kernels}
        numbers = f"{len(kernels)} kernels at {len(replay.trials)} points, {len(replay.wrong)} wrong"
        table.line("numbers", numbers, table.BAD if replay.wrong else table.GOOD)
        if launched_only := sum(trial.relative_error is None for trial in replay.trials):
            console.echo(f"          {launched_only} points of ops without a reference were launched only")
        if worst := replay.worst:
            _print_indented(f"worst error {worst.relative_error:.2e}: {worst.place}")


def _print_indented(text: str) -> None:
    console.echo(textwrap.fill(text, table.WIDTH, initial_indent=" " * 10, subsequent_indent=" " * 12))


def _print_more(count: int) -> None:
    if count > _SHOWN:
        console.echo(f"          … {count - _SHOWN} more: --json lists all")
