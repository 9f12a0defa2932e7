"""The sweep's child process, which imports torch and DeepGEMM.

``python -m cachebuilder.sweep.child JOB`` reads JOB (JSON), calls DeepGEMM at every point of every op, and writes which
kernels each call launched (on the virtual GPU; a real one does not tell). The parent sets the environment (GPU,
compiler, cache root) and reads where we are from a shared mapping, so it can say which call an abort was in.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import mmap
import os
import platform
import resource
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from cachebuilder.ops.catalog import OPS, OpBase
from cachebuilder.ops.device import Device

#: Values in the shared mapping, as 64-bit integers: index of the op, value of its variable, calls done, calls in all.
POSITION_FIELDS = 4
#: What the op's index reads before the first op.
CHECKING, IMPORTING = -1, -2


class LaunchLog:
    """Which cubins were launched since the last look, as the virtual GPU wrote it down."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._count = ctypes.c_uint32.in_dll(library, "virtual_gpu_launch_count")
        self._numbers = (ctypes.c_uint32 * 4096).in_dll(library, "virtual_gpu_launches")
        self._path = library.virtual_gpu_library_path
        self._path.restype = ctypes.c_char_p
        self._unanswered = (ctypes.c_char * 4096).in_dll(library, "virtual_gpu_unanswered")

    def take(self) -> tuple[int, ...]:
        """Numbers of the cubins launched since the last call, in order. Raises RuntimeError if some are unknown."""
        count = self._count.value
        self._count.value = 0
        if count > len(self._numbers):
            raise RuntimeError(f"{count} launches in one call: the virtual GPU notes {len(self._numbers)}")
        return tuple(self._numbers[:count])

    def entry(self, number: int) -> str:
        """The cache entry that holds cubin ``number``."""
        return Path(os.fsdecode(self._path(number))).parent.name

    def unanswered(self) -> list[str]:
        """Names of CUDA calls that the virtual GPU did not answer."""
        return self._unanswered.value.decode().split()


class NoLog:
    """Stands for the log on a real GPU: nobody writes launches down there."""

    def take(self) -> tuple[int, ...]:
        """No launches."""
        return ()

    def entry(self, number: int) -> str:
        """Not asked for."""
        raise LookupError(number)

    def unanswered(self) -> list[str]:
        """A real GPU answers all."""
        return []


class Failure(Exception):
    """What the parent turns into an error: a sentence, and where."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(text)
        self.kind = kind


def _import_deep_gemm(path: str) -> Any:
    spec = importlib.util.spec_from_file_location("deep_gemm", f"{path}/__init__.py", submodule_search_locations=[path])
    assert spec is not None and spec.loader is not None
    # What the copy itself imports may lie beside it, or beside the link that leads to it.
    sys.path += dict.fromkeys([str(Path(path).parent), str(Path(path).resolve().parent)])
    module = importlib.util.module_from_spec(spec)
    sys.modules["deep_gemm"] = module
    spec.loader.exec_module(module)
    return module


def _check_tensors_are_read_right(device: Device) -> None:
    """Have DeepGEMM bring scales of a known shape into TMA layout: the result must have that shape.

    A DeepGEMM built against another torch misreads tensors: it asserts (``dim == 2 or dim == 3``: sgl-deep-gemm 0.1.7
    under torch 2.11) or, worse, would plan for another shape.
    """
    from deep_gemm.utils.layout import get_mn_major_tma_aligned_tensor

    rows, columns, aligned = 70, 3, 72  # rows are padded to 16 bytes of float32
    try:
        read = get_mn_major_tma_aligned_tensor(device.empty(rows, columns, dtype="float32"))
    except Exception as error:
        raise Failure("misreads", str(error)) from error
    if tuple(read.shape) != (rows, columns) or tuple(read.stride()) != (1, aligned):
        raise Failure("misreads", f"scales [{rows}, {columns}] came back as {tuple(read.shape)}, {read.stride()}")


def load(job: dict[str, Any], position: memoryview) -> Device:
    """Import torch and DeepGEMM, and look at the GPU. Raises `Failure`."""
    position[0] = IMPORTING
    try:
        import torch
    except ImportError as error:
        raise Failure("import", f"torch: {error}") from error
    if job["device"] == "cuda":
        _check_gpu(torch, job["gpu"])
    try:
        deep_gemm = _import_deep_gemm(job["deep_gemm"])
    except Exception as error:
        raise Failure("import", f"DeepGEMM under torch {torch.__version__}: {error}") from error
    return Device(torch, deep_gemm, virtual=job["device"] == "virtual")


def _check_gpu(torch: Any, wanted: dict[str, Any]) -> None:
    """The real GPU must be the one that the kernels are for."""
    try:
        torch.cuda.init()
        found = properties(torch)
        torch.zeros(1, device="cuda")
    except Exception as error:  # no driver, too old a one, no device, one that another process holds
        raise Failure("device", f"wanted a {wanted['name']}, found no GPU to use: {error}") from error
    names = {"capability": "compute capability", "sm_count": "SMs", "l2_bytes": "bytes of L2"}
    different = [
        f"{text}: wanted {wanted[field]}, found {found[field]}"
        for field, text in names.items()
        if wanted[field] != found[field]
    ]
    if different:
        raise Failure("device", f"wanted a {wanted['name']}, found {found['name']}: " + "; ".join(different))


def properties(torch: Any) -> dict[str, Any]:
    """What the CUDA runtime says of the GPU, in `gpus.Gpu`'s names."""
    found = torch.cuda.get_device_properties(0)
    return {
        "name": found.name,
        "capability": f"{found.major}.{found.minor}",
        "sm_count": found.multi_processor_count,
        "l2_bytes": found.L2_cache_size,
        "shared_memory_bytes": found.shared_memory_per_block_optin,
        "memory_bytes": found.total_memory,
    }


def classify(torch: Any, error: Exception) -> Failure:
    """A failed call, as the parent tells them apart."""
    text = str(error) or type(error).__name__
    return Failure("memory" if isinstance(error, torch.OutOfMemoryError) else "refused", text)


def _sweep(
    op: OpBase, index: int, device: Device, log: LaunchLog | NoLog, position: memoryview
) -> Iterator[dict[str, Any]]:
    """Call DeepGEMM at every point; yields each run of points that launched the same kernels."""
    points = op.points(device)
    position[0], position[1] = index, points.start  # a refusal while preparing is this op's too
    call = op.prepare(device)
    log.take()  # what preparing launched is torch's, not the op's
    first = last = points.start
    before: tuple[int, ...] | None = None
    for value in points:
        position[1] = value
        call(value)
        position[2] += 1
        launched = log.take()
        if launched != before:
            if before is not None:
                yield _run(first, last, points.step, before, log)
            first, before = value, launched
        last = value
    if before is not None:
        yield _run(first, last, points.step, before, log)
    if not device.virtual:
        device.torch.cuda.synchronize()  # an error of the last launches belongs to this op


def _run(first: int, last: int, step: int, launched: tuple[int, ...], log: LaunchLog | NoLog) -> dict[str, Any]:
    return {"first": first, "last": last, "step": step, "entries": [log.entry(number) for number in launched]}


def run(job: dict[str, Any], position: memoryview) -> dict[str, Any]:
    """Do the whole job; returns the result that the parent reads. Raises `Failure`."""
    device = load(job, position)
    torch, deep_gemm = device.torch, device.deep_gemm
    log = LaunchLog(ctypes.CDLL(os.environ["VIRTUAL_GPU_LIBRARY"])) if device.virtual else NoLog()
    position[0] = CHECKING
    if job["self_check"]:
        log.take()
        _check_tensors_are_read_right(device)
    checked = [log.entry(number) for number in log.take()]

    ops = [OPS[fields["op"]].model_validate(fields) for fields in job["ops"]]
    for op in ops:
        try:
            op.function(deep_gemm)
        except LookupError as error:
            raise Failure("missing", str(error)) from None
    counts = [op.sm_counts or job["sm_counts"] for op in ops]
    position[3] = sum(len(its) * len(op.points(device)) for op, its in zip(ops, counts, strict=True))

    try:
        sweeps, refusals = [], []
        for sm_count in sorted({count for its in counts for count in its}):
            deep_gemm.set_num_sms(sm_count)
            for index, op in enumerate(ops):
                if sm_count not in counts[index]:
                    continue
                runs: list[dict[str, Any]] = []
                try:
                    runs.extend(_sweep(op, index, device, log, position))
                except Exception as error:
                    failure = classify(torch, error)
                    if not job["go_on"] or failure.kind == "memory":
                        raise failure from error
                    refusals.append({"op": index, "sm_count": sm_count, "value": position[1], "text": str(failure)})
                sweeps.append({"op": index, "sm_count": sm_count, "runs": runs})
    finally:
        if names := log.unanswered():  # an error that followed from this one says less
            raise Failure("unanswered", ", ".join(names))
    return {
        "sweeps": sweeps,
        "refusals": refusals,
        "checked": checked,
        "calls": position[2],
        "device": None if device.virtual else properties(torch),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def main(work: Callable[[dict[str, Any], memoryview], dict[str, Any]]) -> None:
    """Do the job whose file the command line names with ``work``; the job names the position's and the result's."""
    job = json.loads(Path(sys.argv[1]).read_text())
    with open(job["position"], "r+b") as file:
        position = memoryview(mmap.mmap(file.fileno(), POSITION_FIELDS * 8)).cast("q")
    try:
        result = work(job, position)
    except Failure as failure:
        result = {"failure": {"kind": failure.kind, "text": str(failure)}}
    except Exception as error:  # DeepGEMM's assertions arrive as RuntimeError: the parent names op and point
        result = {"failure": {"kind": "refused", "text": str(error) or type(error).__name__}}
    Path(job["result"]).write_text(json.dumps(result))
    sys.stdout.flush()
    os._exit(0)  # DeepGEMM's and torch's destructors have nothing to tidy on a GPU that is not there


if __name__ == "__main__":
    main(run)
