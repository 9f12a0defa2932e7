"""The sweep's child process, which imports torch and DeepGEMM.

``python -m cachebuilder.sweep.child FOLDER`` does the `SweepJob` in FOLDER: it calls DeepGEMM at every point of every
op and answers which kernels each call launched. (Only the virtual GPU shows launches; a real one does not.) The
parent has set the environment: GPU, compiler, cache roots.
"""

from __future__ import annotations

import ctypes
import importlib.util
import itertools
import os
import platform
import resource
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from cachebuilder.common.foreign import without_traces
from cachebuilder.common.records import Record
from cachebuilder.cuda.gpus import Gpu
from cachebuilder.ops.catalog import OpBase
from cachebuilder.ops.device import Device as DeviceInUse
from cachebuilder.sweep import protocol
from cachebuilder.sweep.protocol import (
    Answer,
    Device,
    Failure,
    FailureKind,
    Job,
    OpSweep,
    Position,
    Refusal,
    Span,
    SweepJob,
)

J = TypeVar("J", bound=Job)


class LaunchLog:
    """The virtual GPU's log: which cubins were launched since the last look. Empty on a real GPU, which keeps none."""

    def __init__(self, library: ctypes.CDLL | None) -> None:
        self._library = library
        if library is None:
            return
        self._count = ctypes.c_uint32.in_dll(library, "virtual_gpu_launch_count")
        self._numbers = (ctypes.c_uint32 * 4096).in_dll(library, "virtual_gpu_launches")
        self._path = library.virtual_gpu_library_path
        self._path.restype = ctypes.c_char_p
        self._unanswered = (ctypes.c_char * 4096).in_dll(library, "virtual_gpu_unanswered")

    def take(self) -> tuple[int, ...]:
        """Numbers of the cubins launched since the last call, in order. Raises RuntimeError if some were not noted."""
        if self._library is None:
            return ()
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
        return self._unanswered.value.decode().split() if self._library else []


class JobError(Exception):
    """The job failed; the parent makes an error of the `Failure`."""

    def __init__(self, kind: FailureKind, reason: str) -> None:
        super().__init__(reason)
        self.failure = Failure(kind=kind, reason=reason)


def import_deep_gemm(path: str) -> Any:
    """Import the copy of DeepGEMM in the folder ``path``, as ``deep_gemm``."""
    spec = importlib.util.spec_from_file_location("deep_gemm", f"{path}/__init__.py", submodule_search_locations=[path])
    assert spec is not None and spec.loader is not None
    # What the copy imports may lie beside it, or beside the link that leads to it.
    sys.path += dict.fromkeys([str(Path(path).parent), str(Path(path).resolve().parent)])
    module = importlib.util.module_from_spec(spec)
    sys.modules["deep_gemm"] = module
    spec.loader.exec_module(module)
    return module


def load(job: Job, position: Position) -> DeviceInUse:
    """Import torch and DeepGEMM, and check a real GPU. Raises `JobError`."""
    position.op = protocol.IMPORTING
    try:
        import torch
    except (ImportError, OSError) as error:  # the linker's errors are an OSError
        raise JobError("import", f"torch: {_text(error)}") from error
    if job.device == "cuda":
        _check_gpu(torch, job.gpu)
    try:
        deep_gemm = import_deep_gemm(job.deep_gemm)
    except Exception as error:
        raise JobError("import", f"DeepGEMM under torch {torch.__version__}: {_text(error)}") from error
    return DeviceInUse(torch, deep_gemm, virtual=job.device == "virtual")


def _check_gpu(torch: Any, target: Gpu) -> None:
    """The real GPU must be the one that the kernels are for."""
    try:
        torch.cuda.init()
        device = properties(torch)
        torch.zeros(1, device="cuda")
    except Exception as error:  # no driver, one that is too old, no GPU, or a GPU that another process holds
        raise JobError("device", f"wanted the GPU {target.name}, found no GPU to use: {_text(error)}") from error
    names = {"capability": "compute capability", "sm_count": "SMs", "l2_bytes": "bytes of L2"}
    differences = [
        f"{name}: wanted {getattr(target, field)}, found {getattr(device, field)}"
        for field, name in names.items()
        if getattr(target, field) != getattr(device, field)
    ]
    if differences:
        raise JobError("device", f"wanted the GPU {target.name}, found {device.name}: " + "; ".join(differences))


def properties(torch: Any) -> Device:
    """The GPU, as the CUDA runtime describes it."""
    device = torch.cuda.get_device_properties(0)
    return Device(
        name=device.name,
        capability=f"{device.major}.{device.minor}",
        sm_count=device.multi_processor_count,
        l2_bytes=device.L2_cache_size,
        shared_memory_bytes=device.shared_memory_per_block_optin,
        memory_bytes=device.total_memory,
    )


def classify(torch: Any, error: Exception) -> JobError:
    """A failed call: out of memory, or refused by DeepGEMM."""
    return JobError("memory" if isinstance(error, torch.OutOfMemoryError) else "refused", _text(error))


def _text(error: BaseException) -> str:
    """What ``error`` says, and the error that it comes from: torch's "Could not load" has the linker's words there."""
    own = without_traces(str(error)) or type(error).__name__
    return f"{own}: {_text(error.__cause__)}" if error.__cause__ is not None else own


def _check_tensors_are_read_right(device: DeviceInUse) -> None:
    """Have DeepGEMM bring scales of a known shape into TMA layout: the result must have that shape.

    A DeepGEMM built against another torch misreads tensors: it asserts (``dim == 2 or dim == 3``: sgl-deep-gemm 0.1.7
    under torch 2.11) or, worse, plans for another shape.
    """
    from deep_gemm.utils.layout import get_mn_major_tma_aligned_tensor

    rows, columns, aligned_rows = 70, 3, 72  # rows are padded to 16 bytes of float32
    try:
        scales = get_mn_major_tma_aligned_tensor(device.empty(rows, columns, dtype="float32"))
    except Exception as error:
        raise JobError("refused", _text(error)) from error
    if tuple(scales.shape) != (rows, columns) or tuple(scales.stride()) != (1, aligned_rows):
        raise JobError("misreads", f"scales [{rows}, {columns}] came back as {tuple(scales.shape)}, {scales.stride()}")


def _spans(op: OpBase, index: int, device: DeviceInUse, log: LaunchLog, position: Position) -> Iterator[Span]:
    """Call DeepGEMM at every point of ``op``; yields each span of points that launched the same kernels."""
    points = op.points(device)
    position.op, position.value = index, points.start  # a refusal while preparing counts as the op's own
    call = op.prepare(device)
    log.take()  # preparing launches torch's kernels, not the op's

    def launched_at(value: int) -> tuple[int, ...]:
        position.value = value
        call(value)
        position.done += 1
        return log.take()

    for launched, group in itertools.groupby(points, launched_at):
        values = list(group)
        yield Span(first=values[0], last=values[-1], step=points.step, entries=tuple(map(log.entry, launched)))
    if not device.virtual:
        device.torch.cuda.synchronize()  # an error of the last launches belongs to this op


def run(job: SweepJob, position: Position) -> Answer:
    """Do the whole job. Raises `JobError`."""
    device = load(job, position)
    torch, deep_gemm = device.torch, device.deep_gemm
    log = LaunchLog(ctypes.CDLL(os.environ["VIRTUAL_GPU_LIBRARY"]) if device.virtual else None)
    position.op = protocol.CHECKING
    if job.self_check:
        log.take()
        _check_tensors_are_read_right(device)
    checked = tuple(map(log.entry, log.take()))

    sm_counts = [op.sm_counts or job.sm_counts for op in job.ops]
    for index, op in enumerate(job.ops):
        position.op = index
        try:
            op.function(deep_gemm)
        except LookupError as error:
            raise JobError("missing", str(error)) from None
        position.total += len(sm_counts[index]) * len(op.points(device))

    sweeps, refusals = [], []
    try:
        for sm_count in sorted({count for counts in sm_counts for count in counts}):
            deep_gemm.set_num_sms(sm_count)
            for index, op in enumerate(job.ops):
                if sm_count not in sm_counts[index]:
                    continue
                spans: list[Span] = []
                try:
                    spans.extend(_spans(op, index, device, log, position))
                except Exception as error:
                    job_error = classify(torch, error)
                    if not job.go_on or job_error.failure.kind == "memory":
                        raise job_error from error
                    refusals.append(Refusal(op=index, sm_count=sm_count, value=position.value, text=str(job_error)))
                sweeps.append(OpSweep(op=index, sm_count=sm_count, spans=tuple(spans)))
    finally:
        if names := log.unanswered():  # an error that followed from this one says less
            raise JobError("unanswered", ", ".join(names))
    return Answer(
        sweeps=tuple(sweeps),
        refusals=tuple(refusals),
        checked=checked,
        calls=position.done,
        device=None if device.virtual else properties(torch),
        torch=torch.__version__,
        python=platform.python_version(),
        peak_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    )


def main(kind: type[J], work: Callable[[J, Position], Record]) -> None:
    """Do the job in the folder that the command line names, a ``kind``, with ``work``."""
    folder = Path(sys.argv[1])
    job = kind.model_validate_json((folder / protocol.JOB).read_bytes())
    try:
        answer = work(job, Position.shared(folder / protocol.POSITION))
        (folder / protocol.ANSWER).write_text(answer.model_dump_json())
    except JobError as error:
        (folder / protocol.FAILURE).write_text(error.failure.model_dump_json())
    except Exception as error:  # DeepGEMM's assertions arrive as RuntimeError: the parent names op and point
        (folder / protocol.FAILURE).write_text(Failure(kind="refused", reason=_text(error)).model_dump_json())
    sys.stdout.flush()
    os._exit(0)  # DeepGEMM's and torch's destructors would tidy up a GPU that does not exist


if __name__ == "__main__":
    main(SweepJob, run)
