"""``cachebuilder report``."""

from __future__ import annotations

from pathlib import Path

import click

from cachebuilder.cli import remote, words
from cachebuilder.common.files import write_atomically
from cachebuilder.errors import ArtifactError, InstallationError

_FILE = click.Path(path_type=Path, dir_okay=False)
_NAMED = remote.LocationType(path_type=Path, dir_okay=False)


@click.command()
@click.argument("target", type=_NAMED, metavar="ARTIFACT|PLAN")
@click.option("-o", "--output", type=_FILE, default=Path("report.html"), show_default=True, help="The page to write.")
@click.option("--against", type=_NAMED, metavar="OLD", help="Also tell what changed since this artifact or plan.")
@click.option(
    "--verified", type=_FILE, metavar="FILE", help="What verify --report wrote; default: what lies beside ARTIFACT."
)
def report(target: Path, output: Path, against: Path | None, verified: Path | None) -> None:
    """Write one page, with no network in it, on an artifact or a plan (plan --json).

    Which kernel serves which M, sizes, the build's timeline, what a GPU showed, the fingerprint.
    """
    try:
        from cachebuilder.inspecting.report import facts, page
    except ModuleNotFoundError as error:
        raise InstallationError(
            f"a report wants {error.name}, which is not installed", hint="pip install 'cachebuilder[report]'"
        ) from None
    found = facts.gather(target, verified)
    changes = facts.compare(facts.gather(against), found) if against else None
    data = page.render(found, changes).encode()
    write_atomically(output, data, ArtifactError)
    click.echo(f"report    {output}, {words.size(len(data))}: {len(found.kernels)} kernels of {found.name}")
