"""``cachebuilder fleet``."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

import cachebuilder
from cachebuilder.artifact import provenance, signature
from cachebuilder.cli import console, shared, signing, table, words
from cachebuilder.cli.push import run_push
from cachebuilder.fleet import build as building
from cachebuilder.fleet import schema, shards
from cachebuilder.fleet.build import Site
from cachebuilder.fleet.cells import Cell, expand
from cachebuilder.fleet.environments import python_of
from cachebuilder.fleet.executors import Executor, Local
from cachebuilder.fleet.on_ray import OnRay
from cachebuilder.fleet.schema import Fleet
from cachebuilder.fleet.shards import Shard
from cachebuilder.fleet.status import Status, status, write_page


class _ShardType(click.ParamType[Shard]):
    """A shard such as ``3/16`` or ``auto/16``."""

    name = "shard"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Shard:
        try:
            return value if isinstance(value, Shard) else shards.parse(str(value), os.environ)
        except ValueError as error:
            self.fail(str(error), param, ctx)


@dataclass(frozen=True)
class _Where:
    """Where a fleet's jobs run."""

    engine: str | None
    on: str | None
    address: str | None
    shard: Shard
    patience: float


_where_options = shared.option_group(
    "where",
    _Where,
    click.option("--engine", metavar="NAME", help="Only this engine's cells; this Python is its environment."),
    click.option("--on", type=click.Choice(["ray"]), help="Run the jobs on Ray; default: on this machine."),
    click.option(
        "--address", metavar="ADDRESS", help="With --on ray: a running cluster; default: start one on this machine."
    ),
    click.option(
        "--shard",
        type=_ShardType(),
        metavar="I/N",
        default="1/1",
        help="One of N builders that share only the store: I is 1 to N, or auto in Kubernetes, Slurm and GitLab.",
    ),
    click.option(
        "--patience",
        type=click.FloatRange(min=0),
        metavar="SECONDS",
        default=120.0,
        show_default=True,
        help="A shard takes over the others' work once nothing new has come into the store for so long.",
    ),
)
_fleet_argument = click.argument("fleet_file", metavar="FLEET", type=click.Path(path_type=Path, dir_okay=False))
_read_only_option = click.option("--read-only", is_flag=True, help="Write nothing to the store.")
_price_option = click.option("--price", type=click.FloatRange(min=0), metavar="P", help="An hour of one core costs P.")


@click.group()
def fleet() -> None:
    """Build the artifacts of many models, GPUs, engines and servings, whose kernels overlap.

    FLEET is a YAML file that names them and a store. All builders share the store, which is the whole state: any
    command can be stopped and run again.
    """


@fleet.command()
@_fleet_argument
@_where_options
@_read_only_option
@_price_option
@shared.json_option
@shared.progress_options
def plan(fleet_file: Path, where: _Where, read_only: bool, price: float | None, as_json: bool) -> None:
    """Plan every cell; print which cells are equal, what they share, and what is left to compile."""
    with _open(fleet_file, where, read_only) as (site, cells):
        found = site.survey(cells)
        built = building.plan_all(site, found)
        _print(status(found, site.fleet.name, site.store.location, price), as_json)
        built.require_no_failure()


@fleet.command()
@_fleet_argument
@_where_options
@click.option(
    "--again",
    type=click.IntRange(min=0),
    default=0,
    metavar="N",
    help="Also compile N of the store's kernels again, and compare the results.",
)
@shared.progress_options
def build(fleet_file: Path, where: _Where, again: int) -> None:
    """Plan every cell, and compile every kernel that the store lacks, once."""
    with _open(fleet_file, where, read_only=False) as (site, cells):
        found = site.survey(cells)
        built = building.build(site, found, again)
        console.echo(f"planned   {words.several(built.planned, 'cell')}")
        console.echo(f"compiled  {words.several(built.compiled, 'kernel')}")
        built.require_no_failure()
        console.echo(f"store     {site.store.location}: {len(found.stored)} of {len(found.kernels)} kernels")
        shared.remark(f"next      cachebuilder fleet pack {fleet_file}")


@fleet.command("status")
@_fleet_argument
@_where_options
@_price_option
@click.option("--html", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE", help="Also write a page.")
@shared.json_option
@shared.progress_options
def show_status(fleet_file: Path, where: _Where, price: float | None, html: Path | None, as_json: bool) -> None:
    """Print each cell's state as the store shows it; plan and build nothing."""
    with _open(fleet_file, where, read_only=True) as (site, cells):
        now = status(site.survey(cells), site.fleet.name, site.store.location, price)
    _print(now, as_json)
    if html is not None:
        write_page(now, html)


@fleet.command()
@_fleet_argument
@_where_options
@click.option(
    "-o", "--output", type=click.Path(path_type=Path, file_okay=False), default="dist", show_default=True,
    help="The artifacts' folder.",
)  # fmt: skip
@click.option("--key", "key_file", type=signing.key_type, metavar="KEY.pem", help="Sign each artifact with this key.")
@click.option("--push", "destination", metavar="oci://HOST/NAME", help="Push an index for each model and serving.")
@shared.progress_options
def pack(fleet_file: Path, where: _Where, output: Path, key_file: Path | None, destination: str | None) -> None:
    """Pack the artifacts from the store; sign them, and push those of one model as one index.

    NAME/MODEL:SERVING is the index; a machine that pulls it gets the artifact for its GPU and its DeepGEMM.
    """
    if destination is not None and not destination.startswith(("oci://", "oci+http://")):
        raise click.UsageError(f"--push: wanted oci://HOST/NAME, found {destination}")
    if where.on is not None:
        raise click.UsageError("--on ray: pack writes its artifacts on this machine; leave the option out")
    key = None
    if key_file is not None:
        encrypted = signature.is_encrypted(key_file)
        key = signature.load_key(key_file, signing.passphrase(key_file) if encrypted else None)
    indexes: dict[str, list[Path]] = {}
    with _open(fleet_file, where, read_only=True) as (site, cells):
        for group, artifact in building.pack(site, site.survey(cells), output):
            path = Path(artifact.path)
            if key is not None:
                provenance.sign_file(path, key)
            console.echo(f"artifact  {path}, {words.size(artifact.size)}")
            console.echo(f"sha256    {artifact.sha256}")
            for cell in group.cells[1:]:
                console.echo(f"          also for {cell.name}")
            indexes.setdefault(f"{group.first.model.lower()}:{group.first.serving or site.fleet.name}", []).append(path)
    if destination is not None:
        for name, artifacts in indexes.items():
            run_push(f"{destination.rstrip('/')}/{name}", tuple(artifacts))


@contextmanager
def _open(fleet_file: Path, where: _Where, read_only: bool) -> Iterator[tuple[Site, list[Cell]]]:
    """The site of a command, and the cells that it is about."""
    if where.on is None and where.address is not None:
        raise click.UsageError("--address goes with --on ray")
    if where.on is not None and where.shard.count > 1:
        raise click.UsageError("wanted --on ray or --shard, found both: Ray divides the work itself")
    wanted, folder = schema.load(fleet_file), fleet_file.absolute().parent
    if where.engine is not None and where.engine not in wanted.engines:
        raise click.UsageError(f"--engine: wanted one of {', '.join(wanted.engines)}, found {where.engine}")
    url = wanted.store if "://" in wanted.store else str(folder / wanted.store)
    store = cachebuilder.open_store(url, read_only=read_only, notice=shared.remark)
    if not read_only:
        store.check_writable()
    cells = [cell for cell in expand(wanted, folder) if where.engine in (None, cell.engine)]
    with _executor(wanted, folder, where) as executor:
        yield Site(wanted, folder, store, executor, where.shard, where.patience, shared.remark), cells


@contextmanager
def _executor(wanted: Fleet, folder: Path, where: _Where) -> Iterator[Executor]:
    names = [where.engine] if where.engine is not None else list(wanted.engines)
    images = frozenset(name for name in names if wanted.engines[name].image and where.on and where.engine is None)
    pythons = {
        name: python_of(
            name, wanted.engines[name], folder, is_here=name == where.engine or name in images, notice=shared.remark
        )
        for name in names
    }
    with shared.show_progress() as progress:
        if where.on is None:
            with Local(pythons, progress, shared.remark) as local:
                yield local
        else:
            with OnRay(where.address, pythons, images) as ray:
                yield ray


def _print(now: Status, as_json: bool) -> None:
    if as_json:
        console.echo_json(now.to_json())
        return
    table.title("cells")
    for cell in now.cells:
        kernels = "" if cell.kernels is None else f"{cell.stored} of {cell.kernels} kernels"
        more = f"as {cell.equal_to}" if cell.equal_to else cell.refusal or ""
        console.echo(f"  {cell.name:<48} {cell.state:<12} {kernels:<20} {more}".rstrip())
    merged = sum(cell.equal_to is not None for cell in now.cells)
    refused = sum(cell.refusal is not None for cell in now.cells)
    table.line("cells", f"{len(now.cells)}: {now.groups} artifacts, {merged} equal to another, {refused} refused")
    table.line("kernels", f"{now.kernels} in all, {now.distinct} distinct, {100 * now.share:.0f} % shared")
    table.line("store", f"{now.store}: {now.stored} of {now.distinct} kernels")
    left = now.left
    money = "" if left.money is None else f", {left.money:.2f} in money"
    hours = f"about {left.cpu_hours:.2f} CPU-hours ({left.basis})"
    table.line("left", f"{left.plans} plans, {left.kernels} kernels: {hours}{money}")
    if now.hit_rate is not None:
        table.line("hit rate", f"{100 * now.hit_rate:.0f} %: {now.compiled} kernels were compiled for these cells")
    if now.slowest is not None:
        slowest = f"{now.slowest.compiled} kernels in {now.slowest.seconds:.1f} s on {now.slowest.builder}"
        table.line("slowest", f"job {now.slowest.name}: {slowest}")
