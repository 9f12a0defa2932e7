"""Build a fleet: plan every group, compile every distinct kernel once, pack the artifacts. The state is the store."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cachebuilder.compiling.compiler import kernel_key
from cachebuilder.errors import CacheBuilderError, ManifestError, PlanError
from cachebuilder.fleet import survey as surveys
from cachebuilder.fleet.cells import Cell
from cachebuilder.fleet.executors import Executor, Task
from cachebuilder.fleet.protocol import Answer, Artifact, CompileJob, Done, PackJob, PlanJob, Shared, Tools
from cachebuilder.fleet.schema import Fleet
from cachebuilder.fleet.shards import ALONE, Shard
from cachebuilder.fleet.survey import Group, Survey
from cachebuilder.planning.plan import Kernel
from cachebuilder.ship.shared import SharedStore

#: Seconds between two looks at what other shards have put into the store.
_LOOK_SECONDS = 3.0


@dataclass(frozen=True)
class Site:
    """Where a fleet is built.

    Attributes:
        folder: what relative paths of the fleet begin at.
        patience: seconds for which nothing new must have come into the store before a shard takes over others' work.
        notice: called with a line for each thing that a user should know and that is no error.
    """

    fleet: Fleet
    folder: Path
    store: SharedStore
    executor: Executor
    shard: Shard = ALONE
    patience: float = 120.0
    notice: Callable[[str], object] = lambda text: None

    @property
    def shared(self) -> Shared:
        """The store as jobs name it."""
        return Shared(url=self.store.url, read_only=self.store.read_only, fleet=self.fleet.name)

    def tools(self, engine: str) -> Tools:
        """The paths that the fleet names for an engine."""
        return surveys.tools_of(self.fleet.engines[engine], self.folder)

    def of(self, group: Group) -> dict[str, Any]:
        """What each job for a group says: the engine's paths, the store and the manifest."""
        return {"tools": self.tools(group.first.engine), "shared": self.shared, "manifest": group.first.text}

    def survey(self, cells: Sequence[Cell]) -> Survey:
        """The fleet as the store has it."""
        found = surveys.survey(self.fleet, self.folder, cells, self.executor)
        surveys.look(found, self.store, self.fleet.name)
        return found


@dataclass
class Built:
    """What one builder did.

    Attributes:
        planned: how many plans it made.
        compiled: how many kernels it compiled.
        failures: jobs that failed, each with its error; all others were done.
    """

    planned: int = 0
    compiled: int = 0
    failures: list[CacheBuilderError] = field(default_factory=list)

    def require_no_failure(self) -> None:
        """Raise one error for all failures, of the first one's kind."""
        if self.failures:
            first = self.failures[0]
            lines = [f"{len(self.failures)} jobs failed; the others are done", *map(str, self.failures)]
            raise type(first)("\n".join(lines), hint=first.hint)


def plan_all(site: Site, found: Survey) -> Built:
    """Make every plan that the store lacks. Failures are in the result."""
    built = Built()
    names = {group.first.name: group for group in found.unplanned}
    tasks = [Task(group.first.engine, PlanJob(**site.of(group), name=name)) for name, group in names.items()]
    own, others = _divided(site, tasks, lambda task: names[_name(task)].key)
    for _, _ in _run(site, own, built):
        built.planned += 1
    for task in _left_by_others(site, found, others, lambda task: names[_name(task)].key in found.plans):
        for _, _ in _run(site, [task], built):
            built.planned += 1
    surveys.look(found, site.store, site.fleet.name)
    return built


def build(site: Site, found: Survey, again: int = 0) -> Built:
    """Plan, then compile every kernel that the store lacks.

    Args:
        again: also compile this many of the store's kernels again, chosen by their keys, and compare the results.

    Raises:
        ManifestError: a cell cannot be built, and the fleet does not exclude it.
        StoreError: two builders made different results of the same inputs.
    """
    require_no_refusal(found)
    built = plan_all(site, found)
    if built.failures:
        return built
    own, others = _divided(site, _compile_tasks(site, found), _name)
    for _, answer in _run(site, own if site.executor.is_parallel else _joined(own), built):
        built.compiled += answer.compiled if isinstance(answer, Done) else 0
    for task in _left_by_others(site, found, others, lambda task: _is_stored(found, task)):
        for _, answer in _run(site, [task], built):
            built.compiled += answer.compiled if isinstance(answer, Done) else 0
    if again and not built.failures:
        for _, _ in _run(site, _joined(_tasks_again(site, found, again)), built):
            pass
    surveys.look(found, site.store, site.fleet.name)
    return built


def pack(site: Site, found: Survey, output: Path) -> Iterator[tuple[Group, Artifact]]:
    """Pack each group's artifact into ``output``, from what the store has.

    Raises:
        PlanError: the store lacks plans or kernels.
        ManifestError: a cell cannot be built, and the fleet does not exclude it.
    """
    require_no_refusal(found)
    if found.unplanned or found.missing:
        raise PlanError(
            f"wanted the whole fleet in {site.store.location}, found {len(found.unplanned)} of {len(found.groups)} "
            f"plans missing and {len(found.missing)} of {len(found.kernels)} kernels",
            hint="cachebuilder fleet build makes them",
        )
    groups = {group.first.name: group for group in found.groups}
    tasks = []
    for name, group in groups.items():
        file = output.absolute() / group.first.model / f"{name}.tar.zst"
        tasks.append(Task(group.first.engine, PackJob(**site.of(group), name=name, output=str(file))))
    for task, answer in site.executor.run(tasks):
        if isinstance(answer, CacheBuilderError):
            raise answer
        assert isinstance(answer, Artifact)
        yield groups[_name(task)], answer


def require_no_refusal(found: Survey) -> None:
    """Raise `ManifestError` if a cell cannot be built: nothing is missing silently."""
    if found.refused:
        lines = [f"  {cell.name}: {cell.refusal}" for cell in found.refused]
        example = found.refused[0]
        raise ManifestError(
            "\n".join([f"{len(found.refused)} cells cannot be built:", *lines]),
            hint=f"correct them, or add each to exclude: {{model: {example.model}, gpu: {example.gpu}, "
            f"engine: {example.engine}}}",
        )


def _compile_tasks(site: Site, found: Survey) -> list[Task]:
    """A task for each unit with kernels that the store lacks, the longest first; then one for FlashInfer's parts."""
    tasks = []
    for keys in surveys.units_of(found):
        missing = [key for key in keys if key not in found.stored]
        if missing:
            name = hashlib.sha256(" ".join(keys).encode()).hexdigest()[:16]
            tasks.append(_compile_task(site, found, missing, name))
    tasks.sort(key=lambda task: -len(task.job.kernels) if isinstance(task.job, CompileJob) else 0)
    for group in {group.key: group for group in found.groups}.values():
        if found.plans[group.key].flashinfer:
            tasks.append(_task(site, group, f"{group.first.name}, FlashInfer {group.key[:8]}", flashinfer=True))
    return tasks


def _tasks_again(site: Site, found: Survey, count: int) -> list[Task]:
    """Tasks that compile some of the store's kernels again."""
    keys = sorted(found.stored)[:count]
    return [_compile_task(site, found, [key], f"again {key[:16]}", again=True) for key in keys]


def _compile_task(site: Site, found: Survey, keys: Sequence[str], name: str, again: bool = False) -> Task:
    wanted = [found.kernels[key] for key in keys]
    kernels = tuple(one.kernel.model_copy(update={"selected_by": ()}) for one in wanted)
    return _task(site, wanted[0].group, name, kernels, again=again)


def _task(
    site: Site, group: Group, name: str, kernels: tuple[Kernel, ...] = (), again: bool = False, flashinfer: bool = False
) -> Task:
    job = CompileJob(
        **site.of(group),
        name=name,
        kernels=kernels,
        jobs=1 if site.executor.is_parallel else None,
        again=again,
        flashinfer=flashinfer,
    )
    return Task(group.first.engine, job)


def _divided(site: Site, tasks: Sequence[Task], name: Callable[[Task], str]) -> tuple[list[Task], list[Task]]:
    """This shard's own tasks, and those of the other shards, in the order in which this one would take them over."""
    places = [(site.shard.place(name(task)), task) for task in tasks]
    others = sorted((pair for pair in places if pair[0]), key=lambda pair: pair[0])
    return [task for place, task in places if place == 0], [task for _, task in others]


def _left_by_others(
    site: Site, found: Survey, tasks: Sequence[Task], is_done: Callable[[Task], bool]
) -> Iterator[Task]:
    """Tasks of other shards that these seem not to do, each once, until none is left.

    As long as something new comes into the store, others are at work, and this shard waits. No clock is compared and no
    claim is kept, which a lost shard would leave behind. If two shards take over the same task, they get equal results.
    """
    quiet_since, known = time.monotonic(), -1
    taken_over: set[str] = set()
    while True:
        surveys.look(found, site.store, site.fleet.name)
        left = [task for task in tasks if not is_done(task) and _name(task) not in taken_over]
        if not left:
            return
        if (count := _stored_count(found)) != known:
            quiet_since, known = time.monotonic(), count
        if time.monotonic() - quiet_since < site.patience:
            time.sleep(min(_LOOK_SECONDS, site.patience))
            continue
        site.notice(f"shard {site.shard}: takes over {_name(left[0])}, since nothing new comes into the store")
        taken_over.add(_name(left[0]))
        yield left[0]
        surveys.look(found, site.store, site.fleet.name)
        known = _stored_count(found)  # what this shard has put there is no sign of others


def _stored_count(found: Survey) -> int:
    return len(found.plans) + len(found.stored) + len(found.records)


def _is_stored(found: Survey, task: Task) -> bool:
    """Whether the store has what a compile task makes; of FlashInfer's parts, whether their job has left its record."""
    job = task.job
    assert isinstance(job, CompileJob)
    if job.flashinfer:
        return any(record.name == job.name for record in found.records)
    parts = found.key_parts[task.engine]
    return all(kernel_key(parts, kernel.source, kernel.flags) in found.stored for kernel in job.kernels)


def _joined(tasks: Sequence[Task]) -> list[Task]:
    """One task for each engine, so that one process with all cores schedules their compilers."""
    joined: dict[tuple[str, bool], Task] = {}
    others = []
    for task in tasks:
        job = task.job
        if not isinstance(job, CompileJob) or job.flashinfer:
            others.append(task)
            continue
        before = joined.get((task.engine, job.again))
        if before is not None and isinstance(before.job, CompileJob):
            job = before.job.model_copy(update={"kernels": before.job.kernels + job.kernels})
        joined[task.engine, job.again] = Task(task.engine, job)
    return [*joined.values(), *others]


def _run(site: Site, tasks: Sequence[Task], built: Built) -> Iterator[tuple[Task, Answer]]:
    """Run tasks; keep the failures, and go on with the others."""
    for task, answer in site.executor.run(tasks):
        if isinstance(answer, CacheBuilderError):
            built.failures.append(type(answer)(f"{_name(task)}: {answer}", hint=answer.hint))
        else:
            yield task, answer


def _name(task: Task) -> str:
    assert isinstance(task.job, PlanJob | CompileJob | PackJob)
    return task.job.name
