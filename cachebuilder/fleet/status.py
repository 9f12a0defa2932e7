"""How far a fleet is, as the store shows it: each cell's state, what is shared, what is left and what that costs."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from cachebuilder.common.files import write_atomically
from cachebuilder.common.records import Record
from cachebuilder.common.version import __version__
from cachebuilder.compiling import units
from cachebuilder.errors import InstallationError
from cachebuilder.fleet import survey as surveys
from cachebuilder.fleet.cells import Cell
from cachebuilder.fleet.protocol import JobRecord
from cachebuilder.fleet.survey import Group, Survey

State = Literal["refused", "not planned", "in part", "built"]


class CellStatus(Record):
    """One cell.

    Attributes:
        kernels, stored: how many kernels it has, and how many of them the store has; None without a plan.
        equal_to: the cell whose artifact serves this one as well; None for a cell with an artifact of its own.
        refusal: why it cannot be built.
    """

    name: str
    model: str
    gpu: str
    engine: str
    serving: str | None
    state: State
    kernels: int | None = None
    stored: int | None = None
    equal_to: str | None = None
    refusal: str | None = None


class Left(Record):
    """What is left to do, estimated.

    Attributes:
        plans, kernels: how many the store lacks.
        cpu_hours: for compiling these kernels.
        basis: ``measured``: the mean of this fleet's finished jobs; ``model``: the cost model of `compiling.units`.
        price: of an hour of one core; None if it was not given.
    """

    plans: int
    kernels: int
    cpu_hours: float
    basis: Literal["measured", "model"]
    price: float | None

    @property
    def money(self) -> float | None:
        """What it costs, in the price's currency."""
        return None if self.price is None else self.cpu_hours * self.price


class Status(Record):
    """A whole fleet.

    Attributes:
        kernels: of all cells together, each cell counted by itself.
        distinct: how many different ones these are.
        stored: how many of these the store has.
        compiled: kernels that this fleet's jobs compiled.
        hit_rate: the share of the cells' kernels that nobody had to compile, 0 to 1; None before the first job.
        slowest: the finished compile job that took longest.
    """

    fleet: str
    store: str
    cells: tuple[CellStatus, ...]
    engines: dict[str, str]
    kernels: int
    distinct: int
    stored: int
    compiled: int
    hit_rate: float | None
    slowest: JobRecord | None
    left: Left

    @property
    def share(self) -> float:
        """The share of the cells' kernels that another cell has as well, 0 to 1."""
        return 1 - self.distinct / self.kernels if self.kernels else 0.0

    @property
    def groups(self) -> int:
        """How many artifacts the fleet has."""
        return sum(cell.equal_to is None and cell.refusal is None for cell in self.cells)


def status(found: Survey, fleet: str, store: str, price: float | None = None) -> Status:
    """The status of a fleet.

    Args:
        price: of an hour of one core, in any currency.
    """
    cells = [_of_cell(found, group, cell) for group in found.groups for cell in group.cells]
    cells += [_of_refused(cell) for cell in found.refused]
    compiles = [record for record in found.records if record.kind == "compile"]
    kernels = sum(cell.kernels or 0 for cell in cells)
    compiled = sum(record.compiled for record in compiles)
    return Status(
        fleet=fleet,
        store=store,
        cells=tuple(cells),
        engines=found.installations,
        kernels=kernels,
        distinct=len(found.kernels),
        stored=len(found.stored),
        compiled=compiled,
        hit_rate=max(0.0, 1 - compiled / kernels) if kernels and compiles else None,
        slowest=max(compiles, key=lambda record: record.seconds, default=None),
        left=_left(found, compiles, price),
    )


def write_page(status: Status, path: Path) -> None:
    """Write the status as one HTML page, which loads nothing.

    Raises:
        InstallationError: jinja2 is not installed, or the file cannot be written.
    """
    try:
        import jinja2
    except ModuleNotFoundError:
        raise InstallationError(
            "wanted jinja2 for the page, found no such package", hint="pip install 'cachebuilder[report]'"
        ) from None
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(
        loader=loader, undefined=jinja2.StrictUndefined, autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    page = environment.get_template("page.html").render(status=status, version=__version__)
    write_atomically(path, page.encode(), InstallationError)


def _of_cell(found: Survey, group: Group, cell: Cell) -> CellStatus:
    equal_to = None if cell is group.first else group.first.name
    if group.key not in found.plans:
        return CellStatus(**_names(cell), state="not planned", equal_to=equal_to)
    keys = found.keys_of(group)
    stored = sum(key in found.stored for key in keys)
    state: State = "built" if stored == len(keys) else "in part"
    return CellStatus(**_names(cell), state=state, kernels=len(keys), stored=stored, equal_to=equal_to)


def _of_refused(cell: Cell) -> CellStatus:
    return CellStatus(**_names(cell), state="refused", refusal=cell.refusal)


def _names(cell: Cell) -> dict[str, Any]:
    return {name: getattr(cell, name) for name in ("name", "model", "gpu", "engine", "serving")}


def _left(found: Survey, compiles: list[JobRecord], price: float | None) -> Left:
    missing = len(found.missing)
    compiled = sum(record.compiled for record in compiles)
    if compiled:
        seconds = missing * sum(record.cpu_seconds for record in compiles) / compiled
    else:  # the front end of each unit, and about as much for ptxas as for a kernel's share of the front end
        count = sum(any(key not in found.stored for key in keys) for keys in surveys.units_of(found))
        seconds = count * units.UNIT_SECONDS + missing * 2 * units.KERNEL_SECONDS
    return Left(
        plans=len(found.unplanned),
        kernels=missing,
        cpu_hours=round(seconds / 3600, 4),
        basis="measured" if compiled else "model",
        price=price,
    )
