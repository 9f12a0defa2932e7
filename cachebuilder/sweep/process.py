"""The parent of a sweep's child process: it prepares the child's environment, watches it, and explains a failure."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from cachebuilder.common.foreign import without_traces
from cachebuilder.common.progress import Progress
from cachebuilder.common.records import Record
from cachebuilder.errors import CacheBuilderError, DeviceError, InstallationError, PlanError
from cachebuilder.sweep import causes, warm
from cachebuilder.sweep.protocol import (
    ANSWER,
    CHECKING,
    FAILURE,
    IMPORTING,
    JOB,
    NONE_FAILED,
    POSITION,
    Failure,
    Job,
    Position,
)
from cachebuilder.virtual_gpu import library as virtual_gpu

_CRASH = "a crash here is often a DeepGEMM that was built for another torch; the README lists pairs that work"

#: How often to look at a running child, in seconds.
_POLL_SECONDS = 0.02

A = TypeVar("A", bound=Record)

_PACKAGE_ROOT = Path(__file__).parents[2]
#: Variables with these beginnings change what torch, CUDA or DeepGEMM do: a child does not inherit them.
_DROPPED = ("DG_", "DJ_", "CUDA_", "PYTORCH_", "TORCH_", "NVIDIA_", "VIRTUAL_GPU_")
#: These two say which real GPU the process may use: a child that uses it does inherit them.
_REAL_GPU = ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER")


@dataclass(frozen=True)
class Compiler:
    """What a sweep's DeepGEMM takes for nvcc.

    Attributes:
        home: ``CUDA_HOME``.
        environment: further variables, for the compiler or the virtual GPU.
    """

    nvcc: Path
    home: Path
    environment: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Setting:
    """What a child process works with.

    Attributes:
        step: the name of the step that its progress is reported under.
        roots: DeepGEMM's cache roots, the writable one first; the legacy generation reads one root only.
        scratch: a folder for the job and the answer.
        environment: DeepGEMM's variables that the serving process will have.
    """

    step: str
    compiler: Compiler
    roots: Sequence[Path]
    scratch: Path
    environment: dict[str, str] = field(default_factory=dict)


def run_child(module: str, job: Job, setting: Setting, answer: type[A], progress: Progress) -> A:
    """Run ``cachebuilder.sweep.<module>`` with ``job`` in ``setting``; returns its answer.

    Raises: as `sweep.run.call` does.
    """
    folder = setting.scratch
    (folder / JOB).write_text(job.model_dump_json())
    (folder / POSITION).write_bytes(bytes(Position(op=IMPORTING, first_failed=NONE_FAILED)) * job.positions)
    for reply in (ANSWER, FAILURE):
        (folder / reply).unlink(missing_ok=True)  # from an earlier call in the same folder
    positions = Position.shared(folder / POSITION, job.positions)
    position = positions[0]
    log = folder / "log.txt"
    child = warm.start(module, folder, _environment(job, setting), log)
    try:
        while (exit_code := child.wait(_POLL_SECONDS)) is None:
            progress(setting.step, sum(each.done for each in positions), position.total)
        progress(setting.step, sum(each.done for each in positions), position.total)
    except BaseException:
        child.kill()
        raise
    if exit_code == 0 and (folder / ANSWER).exists():
        return answer.model_validate_json((folder / ANSWER).read_bytes())
    if exit_code == 0 and (folder / FAILURE).exists():
        raise _explain(Failure.model_validate_json((folder / FAILURE).read_bytes()), job, position)
    end = f"signal {-exit_code}" if exit_code < 0 else f"exit code {exit_code}"
    last_lines = "\n".join(without_traces(log.read_text(errors="replace")).strip().splitlines()[-8:])
    reason = f"the sweep's process ended with {end}\n{last_lines}".strip()
    raise _explain(Failure(kind="died", reason=reason), job, position)


def _environment(job: Job, setting: Setting) -> dict[str, str]:
    """This process's environment, cleared of what steers torch, CUDA and DeepGEMM, and with what the job needs."""
    inherited = _REAL_GPU if job.device == "cuda" else ()
    kept = {name: value for name, value in os.environ.items() if not name.startswith(_DROPPED) or name in inherited}
    paths = [str(_PACKAGE_ROOT), *filter(None, [kept.get("PYTHONPATH")])]
    return (
        kept
        | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONWARNINGS": "ignore"}
        | setting.environment
        | (virtual_gpu.environment(job.gpu) | {"VIRTUAL_GPU_NO_FSYNC": "1"} if job.device == "virtual" else {})
        | setting.compiler.environment
        | {
            "DG_JIT_CACHE_DIR": ":".join(map(str, setting.roots)),
            "DG_JIT_NVCC_COMPILER": str(setting.compiler.nvcc),
            "CUDA_HOME": str(setting.compiler.home),
        }
    )


def _explain(failure: Failure, job: Job, position: Position) -> CacheBuilderError:
    """The error for what happened in the child."""
    kind, reason = failure.kind, failure.reason
    if kind == "device":
        return DeviceError(reason, hint="name this GPU as the manifest's target, or use --device virtual")
    if kind == "missing":
        return PlanError(
            f"the installed DeepGEMM has no {reason}", hint="drop the op, or install a DeepGEMM that has it"
        )
    if kind == "unanswered":
        return PlanError(
            f"the virtual GPU does not answer {reason}",
            hint="this torch or DeepGEMM is newer than cachebuilder: report it",
        )
    if kind == "misreads":
        return PlanError(
            f"this DeepGEMM misreads tensors under this torch, so a plan would be wrong: {reason}",
            hint=causes.OTHER_TORCH,
        )
    if position.op == IMPORTING:
        loading = kind == "import"
        where = "cannot load " + (reason.partition(": ")[0] if loading else "torch and DeepGEMM")
        unknown = "cachebuilder doctor prints what is installed here; does python -c 'import deep_gemm' work?"
        return causes.find(reason, where) or InstallationError(
            f"cannot load {reason}" if loading else f"{where}: {reason}", hint=_CRASH if kind == "died" else unknown
        )
    if position.op == CHECKING:
        where = f"DeepGEMM {'died' if kind == 'died' else 'failed'} at its first call, before all ops"
        unknown = "no known cause: report it, with what cachebuilder doctor prints"
        return causes.find(reason, where) or PlanError(f"{where}: {reason}", hint=_CRASH if kind == "died" else unknown)
    op = job.ops[position.op]
    place = f"ops[{position.op}] {op.op} {op.shape()} at {op.variable} {position.value}"
    if kind == "memory":
        return DeviceError(
            f"{place}: does not fit into the GPU's memory: {reason}",
            hint="stop what else runs on the GPU, lower the op's maximum, or use --device virtual",
        )
    if known := causes.find(reason, place, of_call=True):
        return known
    return PlanError(
        f"{place}: DeepGEMM {'died' if kind == 'died' else 'refused'}: {reason}",
        hint="copies of DeepGEMM differ in what they accept (docs/entry-points.md): plan with the copy that serves",
    )
