"""The whole build, in order: manifest → plan → compile → pack; on a GPU that is the target, each step confirmed."""

from __future__ import annotations

import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from cachebuilder.artifact.pack import Packed, fingerprint, pack, publish
from cachebuilder.common.cache import scratch_folder
from cachebuilder.common.progress import Progress, no_progress
from cachebuilder.common.version import __version__
from cachebuilder.compiling import kernels as compiling
from cachebuilder.compiling import record as build_record
from cachebuilder.compiling.front_end import FrontEnds
from cachebuilder.compiling.store import CubinStore, NoStore
from cachebuilder.errors import PlanError
from cachebuilder.manifest.inputs import Inputs
from cachebuilder.planning import make as planning
from cachebuilder.sweep import run as sweep
from cachebuilder.verifying import real as on_gpu
from cachebuilder.verifying import virtual as verify


@dataclass(frozen=True)
class Built:
    """A finished build: the artifact and where the time went, in seconds."""

    inputs: Inputs
    plan: planning.Plan
    compiled: compiling.Report
    packed: Packed
    plan_seconds: float
    pack_seconds: float
    launch_seconds: float


def build(
    inputs: Inputs,
    output: Path,
    jobs: int | None = None,
    use_store: bool = True,
    grouped: bool = True,
    check_code: int = 1,
    device: sweep.DeviceName = "virtual",
    progress: Progress = no_progress,
) -> Built:
    """Build ``output`` from ``inputs``, with the record of the build beside it (`build_record`).

    Args:
        jobs: compilers at once; all cores when left out.
        grouped: let kernels share the compiler's front end; the bytes are the same either way.
        check_code: of the kernels compiled now, compare this many random ones with what nvcc makes of them alone.
        device: ``cuda`` to see each step confirmed by the GPU of this machine: it must ask for exactly the planned
            kernels, and every call is then launched from the finished artifact. The bytes are the same either way.
        use_store: keep plans and compiled kernels in the user's cache folder, and take them from there.

    Raises:
        CacheBuilderError: of the kind that says which step failed; no artifact is written then.
    """
    started = time.monotonic()
    store = CubinStore() if use_store else NoStore()
    jobs = jobs or compiling.available_cores()
    key_of = compiling.StoreKeys(inputs.toolchain, inputs.installation)
    with FrontEnds(inputs.toolchain, inputs.installation, jobs) as front_ends:

        def expect(source: str, flags: tuple[str, ...]) -> None:
            if grouped and store.get(key_of(source, flags)) is None:
                front_ends.expect(source, flags)

        plan = planning.make(
            inputs.manifest,
            inputs.installation,
            inputs.toolchain,
            lambda done, total: progress("plan", done, total),
            reuse=use_store,
            found=expect,
        )
        if device == "cuda":
            _confirm_plan(inputs, plan, progress)
        planned = time.monotonic()
        cubins, report = compiling.compile_all(
            plan.kernels,
            inputs.toolchain,
            inputs.installation,
            store,
            jobs,
            lambda done, total, share: progress("compile", done, total, share),
            grouped,
            check_code,
            front_ends,
        )
    compiled = time.monotonic()
    with scratch_folder() as scratch:
        # On the GPU, what is launched is the finished artifact; it gets its name only afterwards.
        unproven = scratch / "artifact.tar.zst"
        packed = pack(
            unproven if device == "cuda" else output,
            inputs.manifest.name,
            inputs.manifest_bytes,
            plan,
            cubins,
            fingerprint(inputs, plan),
        )
        done = time.monotonic()
        if device == "cuda":
            _launch(inputs, unproven, scratch, progress)
            packed = publish(packed, output)
    _record(report, packed, planned - started, done - compiled)
    return Built(inputs, plan, report, packed, planned - started, done - compiled, time.monotonic() - done)


def _record(report: compiling.Report, packed: Packed, plan_seconds: float, pack_seconds: float) -> None:
    """Write down beside the artifact how it was built."""
    record = build_record.BuildRecord(
        artifact=packed.sha256,
        cachebuilder=__version__,
        finished=datetime.now(UTC).isoformat(timespec="seconds"),
        jobs=report.jobs,
        compiled=len(report.compiled),
        reused=report.reused,
        plan_seconds=round(plan_seconds, 3),
        compile_seconds=round(report.wall_seconds, 3),
        pack_seconds=round(pack_seconds, 3),
        cpu_seconds=round(report.cpu_seconds, 3),
        runs=tuple(map(build_record.run_of, report.tasks)),
    )
    build_record.write(packed.path, record)


def _confirm_plan(inputs: Inputs, plan: planning.Plan, progress: Progress) -> None:
    """Raises `PlanError` where the real GPU asks for other kernels than the virtual one."""
    asked = sweep.entries_on_gpu(
        inputs.manifest,
        inputs.installation,
        inputs.toolchain,
        lambda done, total: progress("plan on the GPU", done, total),
    )
    wanted = {kernel.entry for kernel in plan.kernels if kernel.selected_by}
    if asked != wanted:
        raise PlanError(
            "the GPU does not ask for the kernels that the virtual one does: "
            f"{len(asked - wanted)} more ({', '.join(sorted(asked - wanted)[:3])}), "
            f"{len(wanted - asked)} fewer ({', '.join(sorted(wanted - asked)[:3])})",
            hint="a property of this card is not what cachebuilder knows of it: report it with cachebuilder doctor",
        )


def _launch(inputs: Inputs, artifact: Path, scratch: Path, progress: Progress) -> None:
    """Raises `DeviceError` where a call is not served from the artifact on the real GPU."""
    with verify.opened(artifact, inputs.installation) as folder:
        replay = on_gpu.serve(
            folder,
            inputs.manifest,
            inputs.installation,
            scratch,
            lambda name, done, total: progress("launch", done, total),
        )
    on_gpu.require_right(inputs.manifest.name, [replay])
