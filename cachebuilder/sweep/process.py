"""The sweep's child process: the environment it lives in, the watch over it, and one sentence for what went wrong."""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cachebuilder.cuda.gpus import Gpu
from cachebuilder.deepgemm.installation import Installation
from cachebuilder.errors import DeviceError, InstallationError, PlanError
from cachebuilder.ops.catalog import OpBase
from cachebuilder.sweep.child import CHECKING, IMPORTING, POSITION_FIELDS
from cachebuilder.virtual_gpu import library as virtual_gpu

_PACKAGE_ROOT = Path(__file__).parents[2]

#: Where DeepGEMM runs: on the virtual GPU or on this machine's own.
DeviceName = Literal["virtual", "cuda"]
#: Called now and then with (calls done, calls in all); all is 0 until it is known.
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Compiler:
    """What a sweep's DeepGEMM takes for nvcc.

    Attributes:
        nvcc: the executable.
        home: ``CUDA_HOME``.
        environment: further variables, the compiler's own or the virtual GPU's.
    """

    nvcc: Path
    home: Path
    environment: dict[str, str]


@dataclass(frozen=True)
class Setting:
    """What a child process runs in; the fields are `call`'s arguments."""

    gpu: Gpu
    installation: Installation
    compiler: Compiler
    roots: Sequence[Path]
    scratch: Path
    given: dict[str, str]
    device: DeviceName

    def environment(self) -> dict[str, str]:
        """This process's environment without what would change DeepGEMM's or torch's behaviour, and with what is set
        here.
        """
        drop = ("DG_", "DJ_", "CUDA_", "PYTORCH_", "TORCH_", "NVIDIA_", "VIRTUAL_GPU_")
        kept = {
            name: value for name, value in os.environ.items() if not name.startswith(drop) or name in self._of_real_gpu
        }
        paths = [str(_PACKAGE_ROOT), *filter(None, [kept.get("PYTHONPATH")])]
        virtual = virtual_gpu.environment(self.gpu) if self.device == "virtual" else {}
        return (
            kept
            | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONWARNINGS": "ignore"}
            | self.given
            | virtual
            | self.compiler.environment
            | {
                "DG_JIT_CACHE_DIR": ":".join(map(str, self.roots)),
                "DG_JIT_NVCC_COMPILER": str(self.compiler.nvcc),
                "CUDA_HOME": str(self.compiler.home),
            }
        )

    @property
    def _of_real_gpu(self) -> tuple[str, ...]:
        """Variables that say which GPU this process may use."""
        return ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER") if self.device == "cuda" else ()


def run_child(
    module: str, job: dict[str, Any], ops: Sequence[OpBase], setting: Setting, progress: Progress
) -> dict[str, Any]:
    """Run ``cachebuilder.sweep.<module>`` with ``job`` in ``setting``; returns its answer.

    The child's position is read from a shared mapping, so that even of an abort the op and the point are known.

    Raises: as `sweep.call` does.
    """
    scratch = setting.scratch
    job |= {
        "device": setting.device,
        "gpu": setting.gpu.model_dump(),
        "deep_gemm": str(setting.installation.imported_as),
        "ops": [op.model_dump() for op in ops],
        "position": str(scratch / "position"),
        "result": str(scratch / "result.json"),
    }
    Path(job["position"]).write_bytes(bytes(POSITION_FIELDS * 8))
    Path(job["result"]).unlink(missing_ok=True)  # of an earlier call in the same folder
    (scratch / "job.json").write_text(json.dumps(job))
    log = scratch / "log.txt"
    with open(scratch / "position", "r+b") as file, log.open("wb") as output:
        position = memoryview(mmap.mmap(file.fileno(), POSITION_FIELDS * 8)).cast("q")
        child = subprocess.Popen(
            [sys.executable, "-m", f"cachebuilder.sweep.{module}", str(scratch / "job.json")],
            env=setting.environment(),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,  # Ctrl-C comes to the parent, which ends the child
        )
        try:
            while True:
                try:
                    child.wait(timeout=0.05)
                    break
                except subprocess.TimeoutExpired:
                    progress(position[2], position[3])
        except BaseException:
            with contextlib.suppress(ProcessLookupError):  # it may have ended, and been waited for, in the meantime
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
            raise
        progress(position[2], position[3])
        index, value = position[0], position[1]

    result = scratch / "result.json"
    if child.returncode == 0 and result.exists():
        answer: dict[str, Any] = json.loads(result.read_text())
        if "failure" not in answer:
            return answer
        raise _explain(answer["failure"]["kind"], answer["failure"]["text"], ops, index, value)
    ended = f"signal {-child.returncode}" if child.returncode < 0 else f"exit code {child.returncode}"
    tail = "\n".join(log.read_text(errors="replace").strip().splitlines()[-8:])
    raise _explain("died", f"the sweep's process ended with {ended}\n{tail}".strip(), ops, index, value)


def _explain(kind: str, text: str, ops: Sequence[OpBase], index: int, value: int) -> Exception:
    """One error for what happened in the child."""
    if kind == "import" or (kind == "died" and index == IMPORTING):
        return InstallationError(
            f"cannot load {text}",
            hint="DeepGEMM must be built for the installed torch; the README lists pairs that work",
        )
    if kind == "misreads" or (kind == "died" and index == CHECKING):
        return PlanError(
            f"this DeepGEMM misreads tensors under this torch, a plan would be wrong: {text}",
            hint="install the torch it was built for; the README lists pairs that work",
        )
    if kind == "missing":
        return PlanError(f"the installed DeepGEMM has no {text}", hint="drop the op, or install a DeepGEMM that has it")
    if kind == "unanswered":
        return PlanError(
            f"the virtual GPU does not answer {text}",
            hint="this torch or DeepGEMM is newer than cachebuilder: report it",
        )
    if kind == "device":
        return DeviceError(text, hint="name the GPU's own target in the manifest, or take --device virtual")
    text = text.partition("\nC++ trace")[0]  # DeepJIT appends its stack: for its authors, not for a manifest's
    op = ops[index]
    where = f"ops[{index}] {op.op} {op.shape()} at {op.variable} {value}"
    if kind == "memory":
        return DeviceError(
            f"{where}: does not fit into the GPU's memory: {text}",
            hint="end what else runs on the GPU, lower the op's maximum, or take --device virtual",
        )
    return PlanError(
        f"{where}: DeepGEMM {'refused' if kind == 'refused' else 'died'}: {text}",
        hint="copies of DeepGEMM differ in what they take (docs/entry-points.md): plan with the copy that serves",
    )
