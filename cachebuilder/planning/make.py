"""Make a plan: sweep the manifest's ops with DeepGEMM itself, or reuse the plan of an earlier sweep."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from importlib import metadata

from pydantic import ValidationError

from cachebuilder.common.cache import open_own, own_folder
from cachebuilder.common.code import code_digest
from cachebuilder.common.kept import touch
from cachebuilder.common.progress import Progress, no_progress
from cachebuilder.errors import InstallationError, PlanError
from cachebuilder.manifest.inputs import Inputs
from cachebuilder.planning import flashinfer as flashinfer_planning
from cachebuilder.planning.plan import Plan
from cachebuilder.planning.requests import Requests, flags_of
from cachebuilder.planning.sources import Sources
from cachebuilder.sweep.run import Result, Sweep

#: The folders whose code decides what a plan holds: a plan that other code made is not reused.
CODE = ("common", "cuda", "deepgemm", "flashinfer", "manifest", "ops", "planning", "sweep", "virtual_gpu")
#: 20,000 kernels with their sources make about 100 MB.
_MAX_PLAN_BYTES = 1 << 30


def make(
    inputs: Inputs,
    *,
    reuse: bool = True,
    progress: Progress = no_progress,
    on_sweep: Callable[[], None] = lambda: None,
    on_kernel: Callable[[str, tuple[str, ...]], None] = lambda source, flags: None,
    modules: Callable[[], Mapping[str, bytes]] = dict,
) -> Plan:
    """Plan a manifest: call DeepGEMM at every point of every op, and join the kernels that it asks for.

    Args:
        reuse: take the plan from the user's cache folder if nothing that it depends on has changed; otherwise keep the
            new plan there.
        progress: the step is "plan", the units are calls of DeepGEMM.
        on_sweep: called before the sweep, if there is one.
        on_kernel: called with the source and the flags of each kernel as soon as the sweep has found it.
        modules: gives the FlashInfer modules of the manifest, by name; called only if the plan must be made.

    Raises:
        PlanError: DeepGEMM refuses a shape, or the sweep shows something that no cache may be built from.
        InstallationError: torch or DeepGEMM does not load, or the user's cache folder cannot be written.
    """
    plan_file = f"{_digest(inputs)}.json"
    if reuse and (plan := _read(plan_file)):
        return plan
    on_sweep()
    include = str(inputs.installation.include)
    swept = Sweep(inputs, progress).run(lambda entry: on_kernel(entry.source, flags_of(entry, include)))
    plan = _join(inputs, swept)
    if inputs.flashinfer:
        plan = plan.model_copy(update={"flashinfer": flashinfer_planning.make(inputs, modules())})
    if reuse:
        plan.write(own_folder("plans") / plan_file, InstallationError)
    return plan


def _read(name: str) -> Plan | None:
    """The plan in a file of the cache folder; None if there is none, or another user could have changed it."""
    with open_own("plans") as folder:
        data = folder.read_safe(name, _MAX_PLAN_BYTES)
        try:
            plan = Plan.model_validate_json(data) if data is not None else None
        except ValidationError:
            return None
        touch(folder.path / name)
    return plan


def _digest(inputs: Inputs) -> str:
    """sha256 over everything that a plan depends on, including this program's own code."""
    manifest, installation = inputs.manifest, inputs.installation
    facts = {
        "code": code_digest(CODE),
        "manifest": manifest.model_dump(mode="json", exclude={"name", "toolchain"}),
        "deep_gemm": [str(installation.imported_as), installation.code_digest, installation.headers_digest],
        "compiler": inputs.toolchain.version_text,
        "torch": _torch_version(),
        "flashinfer": inputs.flashinfer and inputs.flashinfer.code_digest,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _torch_version() -> str | None:
    try:
        return metadata.version("torch")
    except metadata.PackageNotFoundError:
        return None


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
