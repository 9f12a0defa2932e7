"""The child process that calls DeepGEMM on random inputs, on a real GPU, and compares with a reference.

It does the `TrialsJob` in a folder.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cachebuilder.ops.catalog import OpBase
from cachebuilder.ops.device import Device as DeviceInUse
from cachebuilder.sweep import protocol
from cachebuilder.sweep.loading import classify, load, main, properties
from cachebuilder.sweep.protocol import Position, TrialResult, TrialsAnswer, TrialsJob

#: How many calls are timed at each point, after as many that are not.
_CALLS = 5


def run(job: TrialsJob, folder: Path) -> TrialsAnswer:
    """Do the whole job. Raises `JobError`."""
    [position] = Position.shared(folder / protocol.POSITION, job.positions)
    device = load(job, position)
    position.total = len(job.points)
    groups: dict[tuple[int, int], dict[int, int]] = {}
    for number, point in enumerate(job.points):
        groups.setdefault((point.op, point.sm_count), {})[number] = point.value
    results: dict[int, TrialResult] = {}
    for (index, sm_count), values in groups.items():
        device.deep_gemm.set_num_sms(sm_count)
        position.op = index
        try:
            results |= zip(values, _try(job.ops[index], device, values, position), strict=True)
        except Exception as error:
            raise classify(device.torch, error) from error
    return TrialsAnswer(
        results=tuple(results[number] for number in range(len(job.points))),
        device=properties(device.torch),
        torch=device.torch.__version__,
    )


def _try(op: OpBase, device: DeviceInUse, values: dict[int, int], position: Position) -> list[TrialResult]:
    """Compare and time one op at each of ``values``, whose keys are the seeds of the random inputs."""
    errors = []
    for seed, value in values.items():
        position.value = value
        errors.append(_errors(op, device, value, seed))
        position.done += 1
    device.torch.cuda.empty_cache()
    microseconds = _times(device, op.prepare(device), list(values.values()), position)
    device.torch.cuda.empty_cache()
    reference_microseconds: Sequence[float | None] = [None] * len(values)
    if reference := op.reference(device):
        reference_microseconds = _times(device, reference, list(values.values()), position)
        del reference
        device.torch.cuda.empty_cache()
    return [
        TrialResult(microseconds=own, reference_microseconds=torchs, **fields)
        for fields, own, torchs in zip(errors, microseconds, reference_microseconds, strict=True)
    ]


def _errors(op: OpBase, device: DeviceInUse, value: int, seed: int) -> dict[str, Any]:
    """The errors and problems at one point, as fields of a `TrialResult`; none for an op without a reference."""
    try:
        trial = op.trial(device, value, seed)
    except NotImplementedError:
        return {"relative_error": None, "worst_row_error": None, "problems": ()}
    return {
        "relative_error": trial.relative_error(),
        "worst_row_error": max(output.worst_row_error() for output in trial.outputs),
        "problems": tuple(trial.problems()),
    }


def _times(device: DeviceInUse, call: Callable[[int], None], values: Sequence[int], position: Position) -> list[float]:
    """The median time of one call on the GPU, in microseconds, for each of ``values``."""
    medians = []
    for value in values:
        position.value = value
        medians.append(median_microseconds(device.torch, functools.partial(call, value)))
    return medians


def median_microseconds(torch: Any, call: Callable[[], object]) -> float:
    """The median time of several calls on the GPU, in microseconds."""
    milliseconds: list[float] = []
    for timed in [False] * _CALLS + [True] * _CALLS:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        if timed:
            milliseconds.append(start.elapsed_time(end))
    return statistics.median(milliseconds) * 1000


def start() -> None:
    """Do the job in the folder that the command line names."""
    main(TrialsJob, run)
