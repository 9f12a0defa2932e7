"""Make a plan: sweep the manifest's ops with DeepGEMM itself, or reuse the plan of an earlier sweep."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from cachebuilder.common.progress import Progress, no_progress
from cachebuilder.errors import PlanError
from cachebuilder.manifest.inputs import Inputs
from cachebuilder.planning import flashinfer as flashinfer_planning
from cachebuilder.planning.kept import KeptPlans, plan_key
from cachebuilder.planning.plan import Plan
from cachebuilder.planning.requests import Requests, flags_of
from cachebuilder.planning.sources import Sources
from cachebuilder.sweep.run import Result, Sweep


def make(
    inputs: Inputs,
    *,
    plans: KeptPlans = KeptPlans(),
    progress: Progress = no_progress,
    on_sweep: Callable[[], None] = lambda: None,
    on_kernel: Callable[[str, tuple[str, ...]], None] = lambda source, flags: None,
    modules: Callable[[], Mapping[str, bytes]] = dict,
) -> Plan:
    """Plan a manifest: call DeepGEMM at every point of every op, and join the kernels that it asks for.

    Args:
        plans: take the plan from there if nothing that it depends on has changed; otherwise keep the new plan there.
        progress: the step is "plan", the units are calls of DeepGEMM.
        on_sweep: called before the sweep, if there is one.
        on_kernel: called with the source and the flags of each kernel as soon as the sweep has found it.
        modules: gives the FlashInfer modules of the manifest, by name; called only if the plan must be made.

    Raises:
        PlanError: DeepGEMM refuses a shape, or the sweep shows something that no cache may be built from.
        InstallationError: torch or DeepGEMM does not load, or the user's cache folder cannot be written.
        TransferError, StoreError: as of `KeptPlans.put`.
    """
    key = plan_key(inputs)
    if kept_plan := plans.get(key):
        return kept_plan
    on_sweep()
    include = str(inputs.installation.include)
    swept = Sweep(inputs, progress).run(lambda entry: on_kernel(entry.source, flags_of(entry, include)))
    plan = _join(inputs, swept)
    if inputs.flashinfer:
        plan = plan.model_copy(update={"flashinfer": flashinfer_planning.make(inputs, modules())})
    plans.put(key, plan)
    return plan


def _join(inputs: Inputs, swept: Result) -> Plan:
    """Make the plan from the result of a sweep."""
    manifest, generation = inputs.manifest, inputs.installation.generation
    if not swept.entries and not manifest.sources:
        raise PlanError("no op of this manifest needs a kernel of DeepGEMM's own, so there is nothing to build")
    requests = Requests(inputs, swept)
    sources = Sources(inputs, requests)
    if generation == "legacy":  # a restore to another install path recomputes every entry's name
        sources.check_formula(requests.kernels)
    first = requests.kernels[0]
    if first.arch is None:
        raise PlanError(f"wanted --gpu-architecture among DeepGEMM's flags, found {' '.join(first.flags)}")
    kernels = [*requests.planned, *sources.kernels()]
    return Plan(
        generation=generation,
        gpu=manifest.target.gpu,
        sm_counts=tuple(manifest.all_sm_counts),
        arch=first.arch,
        include=str(inputs.installation.include) if generation == "legacy" else None,
        legacy_flags=requests.legacy_flags,
        ops=tuple(op.model_dump(mode="json") for op in manifest.ops),
        kernels=tuple(sorted(kernels, key=lambda kernel: kernel.entry)),
        calls=swept.answer.calls,
        torch=swept.answer.torch,
        python=swept.answer.python,
        peak_bytes=swept.answer.peak_bytes,
    )
