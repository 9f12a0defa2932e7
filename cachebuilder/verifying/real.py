"""The check on the target GPU: a restored cache is served from, and every kernel's results are compared.

The virtual GPU proves that nothing is missing. Here the same calls are made on the real GPU, with the same compiler
that refuses, and then every kernel runs on random inputs at points that select it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from cachebuilder.artifact.read import read_index
from cachebuilder.common.cache import scratch_folder
from cachebuilder.common.progress import Progress
from cachebuilder.common.version import __version__
from cachebuilder.cuda import nvml
from cachebuilder.errors import PlanError
from cachebuilder.manifest.inputs import Inputs
from cachebuilder.planning.plan import Plan
from cachebuilder.planning.selection import Selection
from cachebuilder.restoring import misses
from cachebuilder.restoring.frozen import LOG_VARIABLE
from cachebuilder.sweep import run as sweep
from cachebuilder.sweep.process import run_child
from cachebuilder.sweep.protocol import Answer, Point, TrialsAnswer, TrialsJob
from cachebuilder.sweep.run import Sweep
from cachebuilder.verifying import flashinfer
from cachebuilder.verifying.report import GpuReplay, GpuReport, Identity, Trial
from cachebuilder.verifying.virtual import Launches, Serving, open_target


def check(target: Path, servings: Sequence[tuple[Serving, Launches, Launches]], progress: Progress) -> GpuReport:
    """Serve each manifest on the real GPU and try its kernels, at points out of what the virtual GPU launched.

    Args:
        servings: each with what DeepGEMM launched and what FlashInfer's GEMM launched.

    Raises:
        DeviceError: the GPU is missing, not the target, or too small.
    """
    replays = []
    for serving, launches, of_gemms in servings:
        replay, answer = _serve(serving, f"{serving.manifest.name} on the GPU", progress)
        if replay.right:
            trials = _try_kernels(serving, launches, progress) + flashinfer.try_kernels(serving, of_gemms)
            replay = replay.model_copy(update={"trials": trials})
        replays.append(replay)
    assert answer.device is not None
    gpu = nvml.first_gpu()
    return GpuReport(
        schema_version=1,
        artifact=_identity(target),
        right=all(replay.right for replay in replays),
        device=answer.device.model_copy(update={"driver": gpu.driver if gpu else None}),
        torch=answer.torch,
        deep_gemm=serving.installation.version,
        cachebuilder=__version__,
        replays=tuple(replays),
    )


class Confirmation:
    """Confirms a build, step by step, on the GPU of this machine, which must be the manifest's target."""

    def __init__(self, inputs: Inputs, progress: Progress) -> None:
        self._inputs = inputs
        self._progress = progress

    def require_same_plan(self, plan: Plan) -> None:
        """Raise `PlanError` where the GPU asks for other kernels than the virtual one.

        Raises: also as `sweep.run.call` does on the real GPU.
        """
        requested = Sweep(self._inputs, self._progress).entries_on_gpu()
        planned = {kernel.entry for kernel in plan.kernels if kernel.selected_by}
        if requested != planned:
            more, fewer = sorted(requested - planned), sorted(planned - requested)
            raise PlanError(
                "the GPU does not ask for the kernels that the virtual one does: "
                f"{len(more)} more ({', '.join(more[:3])}), {len(fewer)} fewer ({', '.join(fewer[:3])})",
                hint="a property of this card is not what cachebuilder knows of it: report it with cachebuilder doctor",
            )

    def require_served(self, artifact: Path) -> None:
        """Make every call of the manifest on the GPU from ``artifact``.

        Raises:
            DeviceError: a call was not served, or the GPU is missing, not the target, or too small.
        """
        inputs = self._inputs
        with scratch_folder() as scratch:
            folder = open_target(artifact, inputs.installation, scratch)
            serving = Serving(folder, inputs.installation, inputs.manifest, inputs.toolchain.version_text, scratch)
            replay, _ = _serve(serving, "launch", self._progress)
        replay.require_right(inputs.manifest.name, inputs.manifest.ops)


def _serve(serving: Serving, step: str, progress: Progress) -> tuple[GpuReplay, Answer]:
    """Make every call on the real GPU from the folder; no trials yet. Refused calls are in the replay."""
    setting = serving.setting("serve", step)
    answer = sweep.call(serving.job("cuda"), setting, progress)
    log = Path(setting.compiler.environment[LOG_VARIABLE])
    replay = GpuReplay(
        manifest=serving.manifest.name,
        calls=answer.calls,
        missed=tuple(miss.kernel for miss in misses.read(log).misses) if log.exists() else (),
        refusals=answer.refusals,
        trials=(),
    )
    return replay, answer


def _try_kernels(serving: Serving, launches: Launches, progress: Progress) -> tuple[Trial, ...]:
    kernels_at = points(launches)
    sweep_job = serving.job("cuda")
    job = TrialsJob(
        device="cuda",
        gpu=sweep_job.gpu,
        deep_gemm=sweep_job.deep_gemm,
        ops=sweep_job.ops,
        points=tuple(kernels_at),
    )
    setting = serving.setting("trials", f"{serving.manifest.name} against float32")
    answer = run_child("trials", job, setting, TrialsAnswer, progress)
    trials = []
    for point, result in zip(job.points, answer.results, strict=True):
        op = job.ops[point.op]
        fields = dict(result) | {
            "microseconds": round(result.microseconds, 1),
            "reference_microseconds": result.reference_microseconds and round(result.reference_microseconds, 1),
        }
        trials.append(
            Trial(
                op=op.op,
                shape=op.shape(),
                sm_count=point.sm_count,
                variable=op.variable,
                value=point.value,
                kernels=kernels_at[point],
                **fields,
            )
        )
    return tuple(trials)


def points(launches: Mapping[str, Sequence[Selection]]) -> dict[Point, tuple[str, ...]]:
    """Where to try the kernels: for each one, the ends of its first and last ranges, in every op that selects it.

    A range of M ends where DeepGEMM's heuristic turns to another kernel: at the edges of tiles and waves.
    """
    kernels_at: dict[Point, list[str]] = {}
    for entry, selections in launches.items():
        for selection in selections:
            first, last = selection.ranges[0], selection.ranges[-1]
            for value in {first.first, first.last, last.first, last.last}:
                point = Point(op=selection.op, sm_count=selection.sm_count, value=value)
                kernels = kernels_at.setdefault(point, [])
                if entry not in kernels:
                    kernels.append(entry)
    ordered = sorted(kernels_at, key=lambda point: (point.op, point.sm_count, point.value))
    return {point: tuple(kernels_at[point]) for point in ordered}


def _identity(target: Path) -> Identity:
    if not target.is_file():
        return Identity(folder=target.name)
    index = read_index(target)
    with target.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return Identity(name=index.name, sha256=sha256, fingerprint_digest=index.fingerprint_digest)
