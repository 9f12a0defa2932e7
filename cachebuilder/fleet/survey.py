"""What a fleet is made of: its cells, which are equal, their plans and kernels, and what the store has of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import ValidationError

from cachebuilder.common import records
from cachebuilder.common.records import RecordError
from cachebuilder.compiling import units
from cachebuilder.compiling.compiler import kernel_key
from cachebuilder.compiling.store import shared_name
from cachebuilder.errors import CacheBuilderError
from cachebuilder.fleet.cells import Cell
from cachebuilder.fleet.executors import Executor, Task
from cachebuilder.fleet.protocol import JobRecord, Probed, ProbeJob, Tools
from cachebuilder.fleet.schema import Engine, Fleet
from cachebuilder.planning import kept
from cachebuilder.planning.plan import Kernel, Plan
from cachebuilder.ship.shared import SharedStore

#: Kernels of one unit at most: about 20 s on one core, which is what a lost node costs.
_UNIT_KERNELS = 24
#: Plans that are fetched with one request.
_PLANS_AT_ONCE = 16


@dataclass(frozen=True)
class Group:
    """Cells whose kernels must be equal: one plan and one artifact, named after the first cell.

    Attributes:
        key: of the plan.
    """

    cells: tuple[Cell, ...]
    key: str

    @property
    def first(self) -> Cell:
        """The cell whose manifest is planned and packed."""
        return self.cells[0]


@dataclass(frozen=True)
class Wanted:
    """A kernel, and the first group that wants it."""

    kernel: Kernel
    group: Group


@dataclass
class Survey:
    """A fleet, as far as its plans are known.

    Attributes:
        refused: cells that cannot be built.
        installations: each engine's DeepGEMM and compiler, in words.
        plans: by their keys; those that are not in the store are missing here.
        kernels: each distinct kernel of these plans by its key in the store.
        stored: which of them the store has.
        records: the finished jobs.
    """

    groups: list[Group]
    refused: list[Cell]
    installations: dict[str, str]
    key_parts: dict[str, tuple[str, ...]]
    plans: dict[str, Plan] = field(default_factory=dict)
    kernels: dict[str, Wanted] = field(default_factory=dict)
    stored: set[str] = field(default_factory=set)
    records: list[JobRecord] = field(default_factory=list)

    @property
    def unplanned(self) -> list[Group]:
        """The groups without a plan; of groups with the same plan, the first."""
        first_with = {group.key: group for group in reversed(self.groups) if group.key not in self.plans}
        return [group for group in self.groups if first_with.get(group.key) is group]

    @property
    def missing(self) -> list[str]:
        """The keys of the kernels that the store lacks."""
        return [key for key in self.kernels if key not in self.stored]

    def keys_of(self, group: Group) -> list[str]:
        """The keys of a group's kernels; empty without a plan."""
        plan, parts = self.plans.get(group.key), self.key_parts[group.first.engine]
        return [kernel_key(parts, kernel.source, kernel.flags) for kernel in plan.kernels] if plan else []


def survey(fleet: Fleet, folder: Path, cells: Sequence[Cell], executor: Executor) -> Survey:
    """Ask each engine's environment what it makes of the cells' manifests, and join the cells that are equal.

    Args:
        folder: what relative paths of the fleet begin at.

    Raises:
        CacheBuilderError: an environment does not work.
    """
    refused = [cell for cell in cells if cell.manifest is None]
    engines = {name: [c for c in cells if c.engine == name and c.manifest] for name in fleet.engines}
    jobs = {
        name: ProbeJob(tools=tools_of(fleet.engines[name], folder), manifests=tuple(cell.text for cell in of_engine))
        for name, of_engine in engines.items()
        if of_engine
    }
    probed: dict[str, Probed] = {}
    for task, answer in executor.run([Task(name, job) for name, job in jobs.items()]):
        if isinstance(answer, CacheBuilderError):
            raise answer
        assert isinstance(answer, Probed)
        probed[task.engine] = answer
    keys: dict[str, str] = {}
    for name, facts in probed.items():
        for cell, key, refusal in zip(engines[name], facts.plans, facts.refusals, strict=True):
            if key is None:
                refused.append(Cell(cell.model, cell.gpu, cell.engine, cell.serving, refusal=refusal))
            else:
                keys[cell.name] = key
    return Survey(
        groups=_merge([cell for cell in cells if cell.name in keys], keys),
        refused=refused,
        installations={name: facts.installation for name, facts in probed.items()},
        key_parts={name: facts.key_parts for name, facts in probed.items()},
    )


def look(survey: Survey, store: SharedStore, fleet: str) -> None:
    """Bring a survey up to date with the store. Raises what `SharedStore` raises."""
    wanted = [key for key in dict.fromkeys(group.key for group in survey.groups) if key not in survey.plans]
    for start in range(0, len(wanted), _PLANS_AT_ONCE):
        names = {kept.shared_name(key): key for key in wanted[start : start + _PLANS_AT_ONCE]}
        for name, data in store.get(list(names)).items():
            with suppress(ValidationError):  # a plan of that key is made again, and compared
                survey.plans[names[name]] = Plan.model_validate_json(data)
    if store.read_only:  # plans that were made here stay here
        for key in [key for key in wanted if key not in survey.plans]:
            if plan := kept.KeptPlans().get(key):
                survey.plans[key] = plan
    for group in survey.groups:
        plan = survey.plans.get(group.key)
        for key, kernel in zip(survey.keys_of(group), plan.kernels if plan else (), strict=True):
            survey.kernels.setdefault(key, Wanted(kernel, group))
    names_there = store.names("kernels")
    survey.stored = {key for key in survey.kernels if shared_name(key) in names_there}
    survey.records = _read_records(store, fleet)


def _merge(cells: Iterable[Cell], keys: dict[str, str]) -> list[Group]:
    """Join the cells whose kernels must be equal: of the same engine, whose manifests differ only in the GPU's name.

    The GPUs must have the same architecture, SM count and shared memory. DeepGEMM also reads the size of the L2 and the
    clock; neither changes a plan.
    """
    alike: dict[str, list[Cell]] = {}
    for cell in cells:
        assert cell.manifest is not None
        gpu = cell.manifest.target.gpu
        facts = (cell.engine, gpu.capability, gpu.sm_count, gpu.shared_memory_bytes)
        rest = cell.manifest.model_dump_json(exclude={"name": True, "target": {"gpu"}})
        alike.setdefault(f"{facts} {rest}", []).append(cell)
    return [Group(tuple(group), keys[group[0].name]) for group in alike.values()]


def units_of(survey: Survey) -> list[list[str]]:
    """All kernels in units to compile, as lists of their keys. The units do not depend on what is in the store.

    Kernels share a unit if one compiler call can serve them, so a unit costs one pass of the compiler's front end.
    """
    by_engine: dict[str, dict[str, str]] = {}  # engine → kernel's source and flags → key
    kernels: dict[str, list[Kernel]] = {}
    for key, wanted in sorted(survey.kernels.items()):
        engine = wanted.group.first.engine
        by_engine.setdefault(engine, {})[_identity(wanted.kernel)] = key
        kernels.setdefault(engine, []).append(wanted.kernel)
    result = []
    for engine, of_engine in kernels.items():
        for unit in units.group(of_engine, math.ceil(len(of_engine) / _UNIT_KERNELS)):
            result.append([by_engine[engine][_identity(kernel)] for kernel in unit.kernels])
    return result


def _identity(kernel: Kernel) -> str:
    return "\0".join((*kernel.flags, kernel.source))


def tools_of(engine: Engine, folder: Path) -> Tools:
    """The paths that a fleet names for an engine; relative ones begin at ``folder``."""
    paths = {name: getattr(engine, name) for name in ("nvcc", "deep_gemm", "flashinfer")}
    return Tools(**{name: path and str(folder / path) for name, path in paths.items()})


def _read_records(store: SharedStore, fleet: str) -> list[JobRecord]:
    """The records of a fleet's finished jobs, without those that another release wrote in another form."""
    read = []
    for data in store.get(sorted(store.names(f"records/{fleet}"))).values():
        with suppress(RecordError):
            read.append(records.read(JobRecord, data))
    return read
