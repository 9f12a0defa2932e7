"""``cachebuilder record``."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import click

from cachebuilder.authoring import record as recording
from cachebuilder.cli import console, shared, table


@dataclass(frozen=True)
class _Destination:
    """The options that say which manifest the recording goes into."""

    output: Path | None
    known: Path | None
    gpu: str | None
    name: str

    def manifest(self, deep_gemm: Path | None) -> recording.NewManifest | recording.KnownManifest:
        if self.output is not None and self.known is None:
            return recording.new_manifest(self.output, self.name, self.gpu)
        if self.known is None or self.output is not None:
            raise click.UsageError("wanted -o FILE for a new manifest, or --add-to MANIFEST, and not both")
        if self.gpu is not None:
            raise click.UsageError("--gpu goes with -o; the manifest of --add-to has its target")
        return recording.known_manifest(self.known, deep_gemm)


@click.command()
@click.argument("command", metavar="-- CMD...", nargs=-1, required=True, type=click.UNPROCESSED)
@shared.option_group(
    "destination",
    _Destination,
    click.option("-o", "--output", type=click.Path(path_type=Path, dir_okay=False), help="A new manifest to write."),
    click.option(
        "--add-to",
        "known",
        metavar="MANIFEST",
        type=click.Path(path_type=Path, dir_okay=False, exists=True),
        help="A manifest that gets the kernels that its ops do not ask for.",
    ),
    click.option("--gpu", metavar="NAME", help="With -o: the GPU that CMD runs on; default: the one of this machine."),
    click.option("--name", default="recorded", show_default=True, help="With -o: the manifest's name."),
)
@shared.nvcc_option
@shared.deep_gemm_option
@shared.progress_options
def record(command: tuple[str, ...], destination: _Destination, nvcc: Path | None, deep_gemm: Path | None) -> None:
    """Run CMD with an empty cache, and write every kernel that its DeepGEMM asks for into a manifest.

    Each kernel is compiled as always, so CMD takes as long as at its first start. The manifest is also written when
    Ctrl-C or SIGTERM ends CMD. The exit code is then 0, otherwise CMD's.
    """
    manifest = destination.manifest(deep_gemm)
    with recording.open_recorder(manifest, nvcc) as recorder:
        try:
            recorded = recorder.run(command)
            with shared.show_progress() as progress:
                written = recorder.write(recorded, progress)
        except KeyboardInterrupt:
            console.echo(f"what was recorded is kept in {recorder.folder}", err=True)
            raise
    for remark in written.remarks:
        shared.remark(remark)
    if written.covered:
        table.line("covered", f"{written.covered} kernels by what the manifest has")
    table.line("recorded", f"{len(recorded.kernels)} kernels of {recorded.program}, {recorded.requests} compilations")
    for miss in recorded.failed:
        table.line("", f"{miss.kernel}: left out, because its compilation failed or was interrupted")
    verb = "written" if destination.output else "added"
    table.line("manifest", f"{manifest.path}: {written.sources} sources {verb}")
    if written.ops:
        console.echo("ops that ask for such kernels, each for every M (fill in each ?):")
        for op in written.ops:
            console.echo(f"  {op}")
    table.line("next", f"cachebuilder build {manifest.path}")
    sys.exit(0 if recorded.stopped else recorded.exit_code)
