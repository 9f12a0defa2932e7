"""``cachebuilder misses``."""

from __future__ import annotations

import dataclasses
import os
import re
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cachebuilder.cli import console, shared, table
from cachebuilder.common.files import write_atomically
from cachebuilder.errors import InstallationError, VerifyError
from cachebuilder.restoring import miss_log

# `--probe` must be quick, so the imports that bring pydantic are made where they are needed.
if TYPE_CHECKING:
    from cachebuilder.restoring import misses as reading

_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def _seconds(context: click.Context, option: click.Parameter, duration: str | None) -> int | None:
    """The seconds in a duration of one number and one unit."""
    if duration is None:
        return None
    match = re.fullmatch(r"([0-9]{1,9})([smhd])", duration)
    if match is None:
        raise click.BadParameter(f"wanted a duration as 90s, 10m, 2h or 1d, found {duration!r}", context, option)
    return int(match[1]) * _SECONDS[match[2]]


def _labels(context: click.Context, option: click.Parameter, labels: Sequence[str]) -> dict[str, str]:
    """The names and values of labels; Prometheus keeps names that begin with two underscores for itself."""
    pairs = [label.partition("=") for label in labels]
    for name, sign, _ in pairs:
        if not sign or not re.fullmatch(r"(?!__)[A-Za-z_][A-Za-z0-9_]*", name) or name in miss_log.LABELS:
            wanted = f"a label as pod=NAME, none of {', '.join(miss_log.LABELS)}"
            raise click.BadParameter(f"wanted {wanted}, found {name + sign!r}", context, option)
    return {name: value for name, _, value in pairs}


@dataclasses.dataclass(frozen=True)
class _Output:
    """What is printed and where: the options of that name."""

    format: str
    as_json: bool
    file: Path | None
    labels: dict[str, str]


@dataclasses.dataclass(frozen=True)
class _Probe:
    """Whether this is a probe, and the age in seconds of the oldest request that it sees."""

    probe: bool
    since: int | None


@click.command()
@click.argument("log", type=click.Path(path_type=Path))
@click.option(
    "--add-to",
    "manifest",
    metavar="MANIFEST",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write the missed kernels' sources into MANIFEST: the next build contains them.",
)
@click.option(
    "--dir",
    metavar="DIR",
    type=click.Path(path_type=Path, file_okay=False),
    help="The restored folder that was served from; default: the one that LOG is in, or that its lines name.",
)
@shared.option_group(
    "output",
    _Output,
    click.option(
        "--format",
        type=click.Choice(["text", "json", "prometheus"]),
        default="text",
        show_default=True,
        help="prometheus: metrics for node_exporter's textfile collector.",
    ),
    shared.json_option,
    click.option(
        "-o",
        "--output",
        "file",
        metavar="FILE",
        type=click.Path(path_type=Path, dir_okay=False),
        help="Replace FILE in one step with what json or prometheus prints.",
    ),
    click.option(
        "--label",
        "labels",
        metavar="NAME=VALUE",
        multiple=True,
        callback=_labels,
        help="Add a label to each metric; again for more. Two files of one collector need different ones.",
    ),
)
@shared.option_group(
    "probe",
    _Probe,
    click.option("--probe", is_flag=True, help="Print nothing; exit with 11 if the log has a request."),
    click.option(
        "--since",
        metavar="DURATION",
        callback=_seconds,
        help="With --probe: only requests of the last 90s, 10m, 2h or 1d.",
    ),
)
def misses(log: Path, manifest: Path | None, dir: Path | None, output: _Output, probe: _Probe) -> None:
    """Group the kernels in the frozen nvcc's LOG, and say what to add to the manifest or why each was missed.

    LOG is the file, or the folder that restore wrote: it stands for all logs that the frozen nvcc in it writes when
    this user runs it, with this CACHEBUILDER_MISS_LOG. --probe and --format prometheus take a log that does not exist
    yet as one without requests.
    """
    output_format = _check(manifest, output, probe)
    if probe.probe:
        _probe(log, probe.since)
    elif output_format == "prometheus":
        _write(_metrics(log, output.labels), output.file)
    else:
        _show(log, dir, manifest, output_format, output.file)


def _check(manifest: Path | None, output: _Output, probe: _Probe) -> str:
    """The format, of options that go together."""
    if output.as_json and output.format == "prometheus":
        raise click.UsageError("--json and --format prometheus: wanted one format, found two")
    output_format = "json" if output.as_json else output.format
    if probe.probe and (manifest or output.file or output_format != "text"):
        raise click.UsageError("--probe prints and writes nothing: wanted no --add-to, --format, --json or --output")
    if probe.since is not None and not probe.probe:
        raise click.UsageError("--since: wanted --probe with it")
    if output_format == "text" and output.file:
        raise click.UsageError("--output: wanted --format json or prometheus with it")
    if output.labels and output_format != "prometheus":
        raise click.UsageError("--label: wanted --format prometheus with it")
    if output_format == "prometheus" and manifest:
        raise click.UsageError("--add-to: wanted --format text or json with it, found prometheus")
    return output_format


def _probe(log: Path, since: int | None) -> None:
    """Raise `VerifyError` if the log has a request, or a line that may have been one."""
    oldest = None if since is None else int(time.time()) - since
    tally = miss_log.tally(miss_log.logs(log, os.environ), oldest)
    hint = f"cachebuilder misses {log}"
    if kernels := tally.kernels():
        more = f" and {len(kernels) - 3} more" if kernels[3:] else ""
        raise VerifyError(
            f"{log}: wanted no miss, found {tally.requests.total()}: {', '.join(kernels[:3])}{more}",
            hint=f"{hint} shows what to add to the manifest",
        )
    if tally.unreadable_lines:
        raise VerifyError(
            f"{log}: wanted no line, found {tally.unreadable_lines} that the frozen nvcc did not write or not finish",
            hint="look at the log; a full disk cuts a line short",
        )


def _metrics(log: Path, labels: dict[str, str]) -> str:
    try:
        from cachebuilder.restoring.metrics import exposition
    except ModuleNotFoundError as error:
        raise InstallationError(
            f"--format prometheus needs {error.name}, which is not installed",
            hint="pip install 'cachebuilder[metrics]'; the images of vLLM and SGLang have it",
        ) from error
    return exposition(miss_log.tally(miss_log.logs(log, os.environ)), labels)


def _write(text: str, file: Path | None) -> None:
    """Print a whole text, or replace ``file`` with it: a collector never reads half of it."""
    if file is None:
        console.echo(text, newline=False)
    else:
        write_atomically(file, text.encode(), InstallationError)


def _show(log: Path, dir: Path | None, manifest: Path | None, output_format: str, file: Path | None) -> None:
    from cachebuilder.restoring import misses as reading

    missed = reading.read(*(miss_log.logs(log, os.environ) if log.is_dir() else [log]), dir=dir)
    if manifest is not None:
        _add(missed, manifest)
    if output_format == "json":
        if file is None:
            console.echo_json(missed.model_dump_json(indent=1))
        else:
            _write(missed.model_dump_json(indent=1) + "\n", file)
        return
    _print(missed.misses)
    console.echo(f"kernels missed: {len(missed.misses)}, requests: {missed.requests()}")
    if missed.unreadable_lines:
        console.echo(f"note: {missed.unreadable_lines} lines of the log are not the frozen nvcc's")
    if any(miss.source and not miss.folder for miss in missed.misses):
        console.echo("note: the restored folder was not found, so nobody looked whether it has these")
        console.echo("      kernels under other keys: name it with --dir")
    if any(miss.can_be_added for miss in missed.misses):
        console.echo("next: add the ops to the manifest (fill in each ?), or the kernels as they are")
        console.echo("      with --add-to MANIFEST; build, and check the artifact with")
        console.echo("      cachebuilder verify ARTIFACT --manifest MANIFEST")


def _add(missed: reading.Log, manifest: Path) -> None:
    from cachebuilder.authoring import sources

    addition = sources.add_missed(manifest, missed)
    console.echo(f"{manifest}: {addition.new} sources added, {addition.known} were in it already", err=True)
    for reason in addition.refused:
        console.echo(f"note: {reason}", err=True)
    if addition.without_source:
        console.echo(f"note: {addition.without_source} kernels have no kept source: add their ops by hand", err=True)


def _print(missed: Sequence[reading.Miss]) -> None:
    for miss in missed:
        table.title(f"{miss.kernel}: {miss.occurrences()}")
        if miss.artifacts:
            _print_wrapped(f"{'not found' if miss.entry else 'not'} in {', '.join(miss.artifacts)}")
        if miss.shape and miss.shape.op and not miss.entry:  # to be copied as one line
            console.echo(f"  {miss.advice}")
        else:
            _print_wrapped(miss.advice)
        for difference in miss.differences:
            for line in difference.lines():
                console.echo(f"  {line}")
        if miss.shape and not miss.entry:
            note = f"under target.sm_counts, or the op's own: {miss.shape.sm_count}"
            if miss.shape.op and miss.shape.n is None:
                note += "; n and k are not compiled in, so this kernel serves many shapes"
            _print_wrapped(note, indent="    ")


def _print_wrapped(text: str, indent: str = "  ") -> None:
    lines = textwrap.wrap(
        text, table.WIDTH, initial_indent="  ", subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )
    console.echo("\n".join(lines))
