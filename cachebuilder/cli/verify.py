"""``cachebuilder verify``."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

import click

from cachebuilder.cli import remote, shared, table, words
from cachebuilder.deepgemm import installation as installations
from cachebuilder.errors import VerifyError
from cachebuilder.inspecting import documents
from cachebuilder.restoring.compatibility import Difference
from cachebuilder.verifying import real as on_gpu
from cachebuilder.verifying import report as verified
from cachebuilder.verifying import virtual as verifying
from cachebuilder.verifying.device import choose_device

#: Missing kernels that are listed one by one; all of them are in the JSON.
_SHOWN = 20


@click.command()
@click.argument("target", type=remote.LocationType(path_type=Path, exists=True), metavar="ARTIFACT|DIR")
@click.option(
    "--manifest",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Replay these shapes instead of those it was built for.",
)
@shared.deep_gemm_option
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
    deep_gemm: Path | None,
    device: str,
    report_file: Path | None,
    as_json: bool,
) -> None:
    """Prove that DeepGEMM finds every kernel in ARTIFACT or restored DIR.

    Every call of the manifest is replayed on a virtual GPU with the frozen compiler, which refuses to compile. With
    --device cuda the calls are made on the real GPU, too, and every kernel's results are compared with a reference.
    """
    installation = installations.find(deep_gemm)
    with verifying.opened(target, installation) as folder:
        gpu = verifying.manifests_for(folder, manifest)[0].target.gpu
        chosen = choose_device(device, gpu)  # type: ignore[arg-type]
        replays: Sequence[on_gpu.Replay] = ()
        with shared.show_progress() as progress:
            if chosen == "cuda":
                report, replays = on_gpu.check(folder, installation, manifest, progress)
            else:
                report = verifying.check(folder, installation, manifest, progress)
    document = _document(target, report, replays)
    if document.on_gpu is not None and (report_file or not target.is_dir()):
        on_gpu.write(report_file or verified.path_for(target), document.on_gpu)
    if as_json:
        click.echo(document.text())
    else:
        _print(report)
        for replay in replays:
            _print_replay(replay)
    if not report.complete:
        raise VerifyError(_problem(target, report), hint=_hint(report))
    on_gpu.require_right(target, replays)


def _print(report: verifying.Report) -> None:
    table.line("using", f"{report.installation}")
    for item in report.damage[:_SHOWN]:
        table.line("damaged", f"{item}", table.BAD)
    if len(report.damage) > _SHOWN:
        click.echo(f"          … {len(report.damage) - _SHOWN} more: --json lists all")
    if not report.damage:
        click.echo(f"files     those of {report.entries} entries are whole")
    for replay in report.replays:
        told = f"{replay.calls} calls, {words.several(len(replay.hits), 'kernel')} found, {len(replay.missing)} missing"
        table.line("replay", f"{replay.manifest}: {told}", table.BAD if replay.missing else table.GOOD)
        if replay.unlisted:
            click.echo(f"          {len(replay.unlisted)} of those found are in no artifact's index")
        for kernel in replay.missing[:_SHOWN]:
            state = "damaged" if kernel.damaged else "missing"
            table.line(state, kernel.entry, table.BAD)
            for selection in kernel.selected_by:
                op = replay.ops[selection.op]
                head = f"ops[{selection.op}] {op.op} {op.shape()}, {selection.sm_count} SMs: {op.variable} "
                text = head + words.ranges(selection.ranges)
                click.echo(textwrap.fill(text, 80, initial_indent=" " * 10, subsequent_indent=" " * 12))
        if len(replay.missing) > _SHOWN:
            click.echo(f"          … {len(replay.missing) - _SHOWN} more: --json lists all")
        for refusal in replay.refusals:
            op = replay.ops[refusal.op]
            table.line("refused", f"ops[{refusal.op}] {op.op} {op.shape()}, {refusal.sm_count} SMs", table.BAD)
            text = " ".join(refusal.text.split())
            text = f"at {op.variable} {refusal.value}: {text if len(text) <= 300 else text[:299] + '…'}"
            click.echo(textwrap.fill(text, 80, initial_indent=" " * 10, subsequent_indent=" " * 12))
        for difference in replay.differences:
            for line in difference.lines():
                if line.startswith(difference.field):
                    table.line("differs", line, table.UNSURE)
                else:
                    click.echo(line)


def _print_replay(replay: on_gpu.Replay) -> None:
    if replay.trials is None:
        return
    device, worst = replay.trials.device, replay.worst
    kernels = {entry for entries in replay.entries.values() for entry in entries}
    missed = f"{device['name']}: {replay.calls} calls, {len(replay.missed)} kernels missed"
    table.line("on GPU", missed, table.BAD if replay.missed else table.GOOD)
    numbers = f"{len(kernels)} kernels at {len(replay.trials.results)} points, {len(replay.wrong)} wrong"
    table.line("numbers", numbers, table.BAD if replay.wrong else table.GOOD)
    if untold := sum(result.relative_error is None for result in replay.trials.results):
        click.echo(f"          {untold} points of ops without a reference were launched only")
    if worst is not None:
        op = replay.ops[worst.point.op]
        where = f"{op.op} {op.shape()} at {op.variable} {worst.point.value}"
        text = f"worst error {worst.relative_error:.2e}: {where}"
        click.echo(textwrap.fill(text, 80, initial_indent=" " * 10, subsequent_indent=" " * 12))


def _problem(target: Path, report: verifying.Report) -> str:
    missing = sum(len(replay.missing) for replay in report.replays)
    refused = sum(len(replay.refusals) for replay in report.replays)
    parts = [
        f"{words.several(missing, 'kernel')} would be compiled while serving" if missing else "",
        f"refused: {words.several(refused, 'call')}" if refused else "",
        f"damaged: {words.several(len(report.damage), 'file')}" if report.damage else "",
    ]
    return f"{target}: " + ", ".join(filter(None, parts))


def _hint(report: verifying.Report) -> str:
    """What to do next, the most likely cause first."""
    if report.damage:
        return shared.RESTORE_AGAIN
    if missing := [replay for replay in report.replays if replay.missing]:
        causes: list[Difference] = [d for replay in missing for d in replay.differences if d.field != "deep_gemm"]
        if causes:
            return f"{causes[0].field} differs: {causes[0].remedy}"
        if not any(replay.hits for replay in missing):
            return "build an artifact from this manifest with the DeepGEMM that serves"
        return "the folder lost entries or never had these shapes: restore again, or build with this manifest"
    return "see the refused calls above; a manifest that builds with this DeepGEMM has none"


def _document(target: Path, report: verifying.Report, replays: Sequence[on_gpu.Replay]) -> documents.Verify:
    return documents.Verify(
        complete=report.complete,
        target=str(target),
        deep_gemm=documents.Copy(str(report.installation.path), report.installation.version),
        entries=report.entries,
        damage=report.damage,
        replays=tuple(map(_replayed, report.replays)),
        on_gpu=on_gpu.document(target, report, replays) if replays else None,
    )


def _replayed(replay: verifying.Replay) -> documents.Replayed:
    return documents.Replayed(
        manifest=replay.manifest,
        ops=tuple(op.model_dump(mode="json", exclude_none=True) for op in replay.ops),
        calls=replay.calls,
        hits=tuple(replay.hits),
        unlisted=tuple(replay.unlisted),
        missing=tuple(
            documents.MissingKernel(kernel.entry, kernel.name, kernel.damaged, kernel.selected_by)
            for kernel in replay.missing
        ),
        refusals=tuple(documents.RefusedCall(**vars(refusal)) for refusal in replay.refusals),
        differences=replay.differences,
    )
