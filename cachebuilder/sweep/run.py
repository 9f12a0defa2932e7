"""Run DeepGEMM itself over every point of every op and write down which kernels it asks for.

This is the parent's side: it prepares an environment in which nothing is compiled and no GPU is needed, and starts the
child (`process`). `run` finds out what an empty cache would be asked for; `call` is the same child with any compiler
and any cache roots, which is what `verify` needs; `try_on_gpu` compares results on a real GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cachebuilder.common.cache import scratch_folder
from cachebuilder.cuda.gpus import Gpu
from cachebuilder.cuda.toolchain import Toolchain, empty_kernel
from cachebuilder.deepgemm.installation import Installation
from cachebuilder.errors import PlanError
from cachebuilder.ops.catalog import OpBase
from cachebuilder.sweep.process import Compiler, DeviceName, Progress, Setting, run_child
from cachebuilder.sweep.recorder import Newcomers, read_entries, recording_compiler
from cachebuilder.sweep.results import Answer, Entry, Point, Refusal, Result, Run, Sweep, TrialResult, Trials

if TYPE_CHECKING:  # the child imports this package, and reads no YAML
    from cachebuilder.manifest.schema import Manifest

__all__ = [
    "Answer",
    "Compiler",
    "DeviceName",
    "Entry",
    "Point",
    "Progress",
    "Refusal",
    "Result",
    "Run",
    "Sweep",
    "TrialResult",
    "Trials",
    "call",
    "entries_on_gpu",
    "read_entries",
    "recording_compiler",
    "run",
    "try_on_gpu",
]


def run(
    manifest: Manifest,
    installation: Installation,
    toolchain: Toolchain,
    progress: Progress = lambda done, total: None,
    found: Callable[[Entry], None] = lambda entry: None,
) -> Result:
    """Sweep the manifest's ops on a virtual GPU from an empty cache.

    Args:
        found: called with each entry soon after DeepGEMM has asked for it, before the sweep's end.

    Raises: what `call` raises, and `PlanError` where a launched kernel has no entry.
    """
    with scratch_folder() as scratch:
        compiler = recording_compiler(scratch, toolchain.version_text)
        root = scratch / "root"
        root.mkdir()
        newcomers = Newcomers(root)

        def look(done: int, total: int) -> None:
            progress(done, total)
            for entry in newcomers.take():
                found(entry)

        target = manifest.target
        answer = call(
            manifest.ops,
            target.gpu,
            target.all_sm_counts,
            installation,
            compiler,
            [root],
            scratch,
            manifest.environment,
            look,
        )
        entries = read_entries(root, installation.generation)
        if lost := answer.launched - entries.keys():
            raise PlanError(f"DeepGEMM launched {sorted(lost)[0]}, of which the cache has no entry")
        return Result(
            generation=installation.generation,
            entries={name: entries[name] for name in sorted(answer.launched)},
            checked={name: entries[name] for name in answer.checked},
            sweeps=answer.sweeps,
            calls=answer.calls,
            torch=answer.torch,
            python=answer.python,
            peak_bytes=answer.peak_bytes,
            cache_root=str(root),
        )


def entries_on_gpu(
    manifest: Manifest,
    installation: Installation,
    toolchain: Toolchain,
    progress: Progress = lambda done, total: None,
) -> set[str]:
    """Names of all entries that DeepGEMM asks for on the real GPU, which must be the manifest's; each kernel is
    launched, empty.

    Raises: what `call` raises.
    """
    with scratch_folder() as scratch:
        compiler = recording_compiler(scratch, toolchain.version_text)
        gpu = manifest.target.gpu
        placeholder = compiler.nvcc.with_name("placeholder.cubin")
        placeholder.write_bytes(empty_kernel(toolchain, f"sm_{gpu.major}{gpu.minor}", scratch))
        root = scratch / "root"
        root.mkdir()
        # No self-check: it would ask for a kernel of its own.
        call(
            manifest.ops,
            gpu,
            manifest.target.all_sm_counts,
            installation,
            compiler,
            [root],
            scratch,
            manifest.environment,
            progress,
            self_check=False,
            device="cuda",
        )
        return set(read_entries(root, installation.generation))


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
        sm_counts: where an op has none of its own.
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
    setting = Setting(gpu, installation, compiler, roots, scratch, environment or {}, device)
    answer = run_child("child", job, ops, setting, progress)
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
        checked=tuple(answer["checked"]),
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
    setting = Setting(gpu, installation, compiler, roots, scratch, environment or {}, "cuda")
    answer = run_child("trials", job, ops, setting, progress)
    results = tuple(
        TrialResult(
            point,
            r["relative_error"],
            r["worst_row_error"],
            r["microseconds"],
            r.get("reference_microseconds"),
            tuple(r["problems"]),
        )
        for point, r in zip(points, answer["results"], strict=True)
    )
    return Trials(answer["device"], answer["torch"], results)
