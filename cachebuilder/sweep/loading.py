"""What the children of this folder have in common: they import torch and DeepGEMM, do a job, and leave an answer."""

from __future__ import annotations

import gc
import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from cachebuilder.common.foreign import without_traces
from cachebuilder.common.records import Record
from cachebuilder.cuda.gpus import Gpu
from cachebuilder.ops.device import Device as DeviceInUse
from cachebuilder.sweep import protocol, torch_import
from cachebuilder.sweep.protocol import Device, Failure, FailureKind, Job, Position

J = TypeVar("J", bound=Job)


class JobError(Exception):
    """The job failed; the parent makes an error of the `Failure`."""

    def __init__(self, kind: FailureKind, reason: str) -> None:
        super().__init__(reason)
        self.failure = Failure(kind=kind, reason=reason)


def import_package(name: str, path: str) -> Any:
    """Import the copy of the package ``name`` in the folder ``path``."""
    spec = importlib.util.spec_from_file_location(name, f"{path}/__init__.py", submodule_search_locations=[path])
    assert spec is not None and spec.loader is not None
    # What the copy imports may lie beside it, or beside the link that leads to it.
    sys.path += dict.fromkeys([str(Path(path).parent), str(Path(path).resolve().parent)])
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def load(job: Job, position: Position) -> DeviceInUse:
    """Import torch and DeepGEMM, and check a real GPU. Raises `JobError`."""
    position.op = protocol.IMPORTING
    try:
        torch = torch_import.finish(whole=job.device == "cuda")
    except (ImportError, OSError) as error:  # the linker's errors are an OSError
        raise JobError("import", f"torch: {text(error)}") from error
    if job.device == "cuda":
        _check_gpu(torch, job.gpu)
    try:
        deep_gemm = _import_fast(job) if job.device == "virtual" else import_package("deep_gemm", job.deep_gemm)
    except Exception as error:
        raise JobError("import", f"DeepGEMM under torch {torch.__version__}: {text(error)}") from error
    gc.freeze()  # what was imported stays, so no collection need look at it
    gc.enable()
    return DeviceInUse(torch, deep_gemm, virtual=job.device == "virtual")


def _import_fast(job: Job) -> Any:
    """Import DeepGEMM without triton; with it if this copy insists."""
    try:
        with torch_import.without_triton():
            return import_package("deep_gemm", job.deep_gemm)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "triton":
            raise
        for name in [name for name in sys.modules if name.partition(".")[0] == "deep_gemm"]:
            del sys.modules[name]
        return import_package("deep_gemm", job.deep_gemm)


def _check_gpu(torch: Any, target: Gpu) -> None:
    """The real GPU must be the one that the kernels are for."""
    try:
        torch.cuda.init()
        device = properties(torch)
        torch.zeros(1, device="cuda")
    except Exception as error:  # no driver, one that is too old, no GPU, or a GPU that another process holds
        raise JobError("device", f"wanted the GPU {target.name}, found no GPU to use: {text(error)}") from error
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
    return JobError("memory" if isinstance(error, torch.OutOfMemoryError) else "refused", text(error))


def text(error: BaseException) -> str:
    """What ``error`` says, and the error that it comes from: torch's "Could not load" has the linker's words there."""
    own = without_traces(str(error)) or type(error).__name__
    return f"{own}: {text(error.__cause__)}" if error.__cause__ is not None else own


def main(kind: type[J], work: Callable[[J, Path], Record]) -> None:
    """Do the job in the folder that the command line names, a ``kind``, with ``work``."""
    folder = Path(sys.argv[1])
    job = kind.model_validate_json((folder / protocol.JOB).read_bytes())
    try:
        (folder / protocol.ANSWER).write_text(work(job, folder).model_dump_json())
    except JobError as error:
        (folder / protocol.FAILURE).write_text(error.failure.model_dump_json())
    except Exception as error:  # DeepGEMM's assertions arrive as RuntimeError: the parent names op and point
        (folder / protocol.FAILURE).write_text(Failure(kind="refused", reason=text(error)).model_dump_json())
    end()


def end() -> None:
    """End this process without DeepGEMM's and torch's destructors, which would tidy up a GPU that does not exist."""
    sys.stdout.flush()
    os._exit(0)
