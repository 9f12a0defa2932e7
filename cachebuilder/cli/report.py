"""``cachebuilder report``."""

from __future__ import annotations

from pathlib import Path

import click

from cachebuilder.cli import console, remote, words
from cachebuilder.errors import InstallationError

_FILE = click.Path(path_type=Path, dir_okay=False)
_NAMED = remote.LocationType(path_type=Path, dir_okay=False)


@click.command()
@click.argument("target", type=_NAMED, metavar="ARTIFACT|PLAN")
@click.option("-o", "--output", type=_FILE, default=Path("report.html"), show_default=True, help="The page to write.")
@click.option("--against", type=_NAMED, metavar="OLD", help="Also show what changed since this artifact or plan.")
@click.option(
    "--verified", type=_FILE, metavar="FILE", help="What verify --report wrote; default: the report beside ARTIFACT."
)
def report(target: Path, output: Path, against: Path | None, verified: Path | None) -> None:
    """Write one HTML page on an artifact or on a plan (plan --json). The page loads nothing from a network.

    It shows which kernel serves which M, sizes, the build's timeline, a GPU's results, the fingerprint.
    """
    try:
        from cachebuilder.inspecting.report import page
    except ModuleNotFoundError as error:
        raise InstallationError(
            f"a report needs {error.name}, which is not installed", hint="pip install 'cachebuilder[report]'"
        ) from None
    facts, size = page.write(output, target, against=against, verify_report=verified)
    console.echo(
        f"report    {output}, {words.size(size)}: {words.several(len(facts.kernels), 'kernel')} of {facts.name}"
    )
