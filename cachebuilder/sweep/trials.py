"""The child process that calls DeepGEMM on random inputs, on a real GPU, and compares with a reference.

``python -m cachebuilder.sweep.trials JOB``: JOB lists the points; the answer is in their order.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

from cachebuilder.ops.catalog import OPS, OpBase
from cachebuilder.ops.device import Device
from cachebuilder.sweep.child import classify, load, main, properties

#: Calls that are timed at each point, after as many that are not.
_CALLS = 5


def run(job: dict[str, Any], position: memoryview) -> dict[str, Any]:
    """Do the whole job; returns the result that the parent reads. Raises `Failure`."""
    device = load(job, position)
    ops = [OPS[fields["op"]].model_validate(fields) for fields in job["ops"]]
    results: list[dict[str, Any] | None] = [None] * len(job["points"])
    by_place: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for number, (op, sm_count, value) in enumerate(job["points"]):
        by_place.setdefault((op, sm_count), []).append((number, value))
    position[3] = len(results)
    for (index, sm_count), points in by_place.items():
        device.deep_gemm.set_num_sms(sm_count)
        position[0] = index
        op = ops[index]
        try:
            for number, value in points:
                position[1] = value
                results[number] = _try(op, device, value, number)
                position[2] += 1
            device.torch.cuda.empty_cache()
            call = op.prepare(device)
            for number, value in points:
                position[1] = value
                results[number]["microseconds"] = _microseconds(device, call, value)  # type: ignore[index]
            del call
            device.torch.cuda.empty_cache()
            if reference := op.reference(device):
                for number, value in points:
                    position[1] = value
                    results[number]["reference_microseconds"] = _microseconds(device, reference, value)  # type: ignore[index]
                del reference
                device.torch.cuda.empty_cache()
        except Exception as error:
            raise classify(device.torch, error) from error
    return {"results": results, "device": properties(device.torch), "torch": device.torch.__version__}


def _try(op: OpBase, device: Device, value: int, seed: int) -> dict[str, Any]:
    """One point's errors and problems; none of either for an op without a reference."""
    try:
        trial = op.trial(device, value, seed)
    except NotImplementedError:
        return {"relative_error": None, "worst_row_error": None, "problems": []}
    return {
        "relative_error": trial.relative_error(),
        "worst_row_error": max(output.worst_row_error() for output in trial.outputs),
        "problems": trial.problems(),
    }


def _microseconds(device: Device, call: Callable[[int], None], value: int) -> float:
    """The median time of one call on the GPU."""
    cuda = device.torch.cuda
    times: list[float] = []
    for timed in [False] * _CALLS + [True] * _CALLS:
        start, end = cuda.Event(enable_timing=True), cuda.Event(enable_timing=True)
        start.record()
        call(value)
        end.record()
        end.synchronize()
        if timed:
            times.append(start.elapsed_time(end) * 1000)
    return statistics.median(times)


if __name__ == "__main__":
    main(run)
