"""Run DeepGEMM itself over every point of every op and write down which kernels it asks for.

This is the parent's side: it prepares an environment in which nothing is compiled and no GPU is needed, starts the
child, watches its position, and turns what went wrong there into one sentence. `run` finds out what an empty cache
would be asked for; `call` is the same child with any compiler and any cache roots, which is what `verify` needs.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cachebuilder.deepgemm import Generation
from cachebuilder.deepgemm import entries as entry_files
from cachebuilder.deepgemm.installation import Installation
from cachebuilder.errors import DeviceError, InstallationError, PlanError
from cachebuilder.gpus import Gpu
from cachebuilder.ops import OpBase
from cachebuilder.paths import scratch_folder
from cachebuilder.sweep import virtual_gpu
from cachebuilder.sweep.child import CHECKING, IMPORTING, POSITION_FIELDS
from cachebuilder.toolchain import Toolchain, empty_kernel

_PACKAGE_ROOT = Path(__file__).parents[2]
_RECORDER = Path(__file__).parent / "recording_nvcc.sh"

#: Where DeepGEMM runs: on the virtual GPU or on this machine's own.
DeviceName = Literal["virtual", "cuda"]
#: Called now and then with (calls done, calls in all); all is 0 until it is known.
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Entry:
    """One kernel as DeepGEMM asked for it.

    Attributes:
        name: the entry's folder in the cache, which is the kernel's key.
        source: ``kernel.cu``.
        arguments: nvcc's command line after the compiler's own name, joined by spaces, as DeepGEMM wrote it.
        metadata: ``meta.json``, in the generation that has one.
    """

    name: str
    source: str
    arguments: str
    metadata: str | None


@dataclass(frozen=True)
class Run:
    """Consecutive points of a sweep that launched the same kernels, in the same order."""

    first: int
    last: int
    step: int
    entries: tuple[str, ...]


@dataclass(frozen=True)
class Sweep:
    """One op at one SM count: which kernels each value of its variable launches."""

    op: int
    sm_count: int
    runs: tuple[Run, ...]


@dataclass(frozen=True)
class Refusal:
    """DeepGEMM raised at this point: in a sweep that goes on after a refusal, the op ended there."""

    op: int
    sm_count: int
    value: int
    text: str


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
class Answer:
    """What the child saw; ``device`` is the real GPU's properties, None on a virtual one."""

    sweeps: tuple[Sweep, ...]
    refusals: tuple[Refusal, ...]
    calls: int
    torch: str
    python: str
    peak_bytes: int
    device: dict[str, Any] | None

    @property
    def launched(self) -> set[str]:
        """Names of all entries that were launched."""
        return {entry for swept in self.sweeps for run in swept.runs for entry in run.entries}


@dataclass(frozen=True)
class Point:
    """One call: the op's position, the SM count, the value of the op's variable."""

    op: int
    sm_count: int
    value: int


@dataclass(frozen=True)
class TrialResult:
    """One call on random inputs.

    Attributes:
        relative_error: ‖D − reference‖ / ‖reference‖, Frobenius; NaN where an element is; None where the op has no
            reference, and the kernel was only launched.
        worst_row_error: the largest of single rows.
        microseconds: of one call with inputs in place, the median of several.
        problems: what is wrong, a sentence each; none where all is right.
    """

    point: Point
    relative_error: float | None
    worst_row_error: float | None
    microseconds: float
    problems: tuple[str, ...]


@dataclass(frozen=True)
class Trials:
    """All calls on one GPU; ``device`` holds its name, driver and properties."""

    device: dict[str, Any]
    torch: str
    results: tuple[TrialResult, ...]


@dataclass(frozen=True)
class Result:
    """All that a sweep found."""

    generation: Generation
    entries: dict[str, Entry]
    sweeps: tuple[Sweep, ...]
    calls: int
    torch: str
    python: str
    peak_bytes: int
    cache_root: str


def run(
    ops: Sequence[OpBase],
    gpu: Gpu,
    sm_counts: Sequence[int],
    installation: Installation,
    toolchain: Toolchain,
    environment: dict[str, str] | None = None,
    progress: Progress = lambda done, total: None,
) -> Result:
    """Sweep ``ops`` on a virtual ``gpu`` from an empty cache.

    Args:
        environment: DeepGEMM's variables that the serving process will have.

    Raises: what `call` raises, and `PlanError` where a launched kernel has no entry.
    """
    with scratch_folder() as scratch:
        compiler = recording_compiler(scratch, toolchain.version_text)
        root = scratch / "root"
        root.mkdir()
        answer = call(ops, gpu, sm_counts, installation, compiler, [root], scratch, environment, progress)
        entries = read_entries(root, installation.generation)
        if lost := answer.launched - entries.keys():
            raise PlanError(f"DeepGEMM launched {sorted(lost)[0]}, of which the cache has no entry")
        return Result(
            generation=installation.generation,
            entries={name: entries[name] for name in sorted(answer.launched)},
            sweeps=answer.sweeps,
            calls=answer.calls,
            torch=answer.torch,
            python=answer.python,
            peak_bytes=answer.peak_bytes,
            cache_root=str(root),
        )


def entries_on_gpu(
    ops: Sequence[OpBase],
    gpu: Gpu,
    sm_counts: Sequence[int],
    installation: Installation,
    toolchain: Toolchain,
    environment: dict[str, str] | None = None,
    progress: Progress = lambda done, total: None,
) -> set[str]:
    """Names of all entries that DeepGEMM asks for on the real GPU, which must be a ``gpu``; each kernel is launched,
    empty.

    Raises: what `call` raises.
    """
    with scratch_folder() as scratch:
        compiler = recording_compiler(scratch, toolchain.version_text)
        placeholder = compiler.nvcc.with_name("placeholder.cubin")
        placeholder.write_bytes(empty_kernel(toolchain, f"sm_{gpu.major}{gpu.minor}", scratch))
        root = scratch / "root"
        root.mkdir()
        call(
            ops,
            gpu,
            sm_counts,
            installation,
            compiler,
            [root],
            scratch,
            environment,
            progress,
            self_check=False,  # it would ask for a kernel of its own
            device="cuda",
        )
        return set(read_entries(root, installation.generation))


def recording_compiler(scratch: Path, version_text: str) -> Compiler:
    """A compiler, made in ``scratch``, that writes down what it is asked for and answers with ``version_text``."""
    home = scratch / "cuda"
    (home / "bin").mkdir(parents=True)
    nvcc = home / "bin" / "nvcc"
    shutil.copyfile(_RECORDER, nvcc)
    nvcc.chmod(0o755)
    (home / "bin" / "version.txt").write_text(version_text)
    return Compiler(nvcc, home, {})


def call(
    ops: Sequence[OpBase],
    gpu: Gpu,
    sm_counts: Sequence[int],
    installation: Installation,
    compiler: Compiler,
    roots: Sequence[Path],
    scratch: Path,
    environment: dict[str, str] | None = None,
    progress: Progress = lambda done, total: None,
    go_on: bool = False,
    self_check: bool = True,
    device: DeviceName = "virtual",
) -> Answer:
    """Call DeepGEMM at every point of every op on a virtual or a real ``gpu``, in a child process.

    Args:
        roots: DeepGEMM's cache roots, the writable one first; the legacy generation knows one only.
        scratch: a folder for the child's job and its answer.
        environment: DeepGEMM's variables that the serving process will have.
        go_on: note a refused call and take the next op, instead of raising.
        self_check: first see that DeepGEMM reads tensors right; that asks for a kernel of its own.
        device: ``cuda`` for the real GPU, whose properties must be those of ``gpu``. Which kernels each call launches
            is not seen there: the answer's runs name none.

    Raises:
        DeviceError: the real GPU is not there, not a ``gpu``, or out of memory (op and point are named).
        PlanError: DeepGEMM refused a shape or died (the op and the point are named), misreads tensors under this
            torch, lacks an op, or made a CUDA call that the virtual GPU does not answer (named).
        InstallationError: torch or DeepGEMM does not load.
    """
    job = {"sm_counts": list(sm_counts), "go_on": go_on, "self_check": self_check}
    setting = _Setting(gpu, installation, compiler, roots, scratch, environment or {}, device)
    answer = _run_child("child", job, ops, setting, progress)
    return Answer(
        sweeps=tuple(
            Sweep(
                item["op"],
                item["sm_count"],
                tuple(Run(r["first"], r["last"], r["step"], tuple(r["entries"])) for r in item["runs"]),
            )
            for item in answer["sweeps"]
        ),
        # DeepJIT's exceptions end with a trace of C++ frames (deep_jit/utils/exception.hpp).
        refusals=tuple(
            Refusal(item["op"], item["sm_count"], item["value"], item["text"].partition("\n\nC++ trace")[0])
            for item in answer["refusals"]
        ),
        calls=answer["calls"],
        torch=answer["torch"],
        python=answer["python"],
        peak_bytes=answer["peak_bytes"],
        device=answer["device"],
    )


def try_on_gpu(
    points: Sequence[Point],
    ops: Sequence[OpBase],
    gpu: Gpu,
    installation: Installation,
    compiler: Compiler,
    roots: Sequence[Path],
    scratch: Path,
    environment: dict[str, str] | None = None,
    progress: Progress = lambda done, total: None,
) -> Trials:
    """Call DeepGEMM at ``points`` on the real GPU, on random inputs, and compare with a reference in float32.

    Raises: as `call` does on the real GPU.
    """
    job = {"points": [[point.op, point.sm_count, point.value] for point in points]}
    setting = _Setting(gpu, installation, compiler, roots, scratch, environment or {}, "cuda")
    answer = _run_child("trials", job, ops, setting, progress)
    results = tuple(
        TrialResult(point, r["relative_error"], r["worst_row_error"], r["microseconds"], tuple(r["problems"]))
        for point, r in zip(points, answer["results"], strict=True)
    )
    return Trials(answer["device"], answer["torch"], results)


@dataclass(frozen=True)
class _Setting:
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


def _run_child(
    module: str, job: dict[str, Any], ops: Sequence[OpBase], setting: _Setting, progress: Progress
) -> dict[str, Any]:
    scratch = setting.scratch
    job |= {
        "device": setting.device,
        "gpu": setting.gpu.model_dump(),
        "deep_gemm": str(setting.installation.path),
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
    return PlanError(f"{where}: DeepGEMM {'refused' if kind == 'refused' else 'died'}: {text}")


def read_entries(root: Path, generation: Generation) -> dict[str, Entry]:
    """The entries that the recording compiler was asked for under ``root``; links to other caches' are not its own.

    Raises:
        PlanError: a folder whose name is not one of ``generation``.
    """
    found = {}
    folders = sorted((root / "cache").iterdir()) if (root / "cache").is_dir() else []
    for folder in folders:
        if folder.is_symlink():
            continue
        if entry_files.kernel_name(generation, folder.name) is None:
            raise PlanError(f"wanted entries of the {generation} generation, found {folder.name}")
        metadata = folder / entry_files.METADATA
        found[folder.name] = Entry(
            name=folder.name,
            source=(folder / entry_files.SOURCE).read_text(),
            arguments=(folder / "command.txt").read_text().rstrip("\n"),
            metadata=metadata.read_text() if metadata.exists() else None,
        )
    return found
