"""Compare on the target GPU: DeepGEMM's own cold warm-up, a build, a restore, and the warm-up on the restored cache.

    PYTHONPATH=. python benchmarks/gpu/warmup.py MANIFEST... [--deep-gemm FOLDER]... [--separate] [--commit HASH]
                                    >> benchmarks/results/gpu/warmup.jsonl

For each copy of DeepGEMM and each manifest:

- ``build`` without the store; with ``--separate`` also one kernel at a time. The time that the plan takes to import torch and
  DeepGEMM is given separately, since an engine also needs it before its warm-up.
- ``restore`` of that artifact, as a command.
- ``cached``: the warm-up of an engine, in a process of its own, from the restored cache, with the compiler that refuses and no
  other compiler in reach.
- ``cold``: the same with an empty cache and the real nvcc. Its kernels must be among the planned ones.

The warm-up is vLLM's relaxed list of M (0.33.0, model_executor/warmup/deep_gemm_warmup.py) for dense layers, every
aligned M for grouped ones. Its time is that of the calls alone. Prints one JSON object for each figure.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click

from benchmarks.relaxed_list import relaxed
from cachebuilder import building
from cachebuilder.compiling.compiler import CompileOptions
from cachebuilder.cuda import nvml
from cachebuilder.manifest.inputs import Inputs, load_manifest
from cachebuilder.ops.catalog import OPS
from cachebuilder.ops.device import Device
from cachebuilder.restoring.frozen import LOG_VARIABLE
from cachebuilder.sweep import run as sweep
from cachebuilder.sweep.loading import import_package
from cachebuilder.sweep.process import Setting
from cachebuilder.sweep.protocol import SweepJob
from cachebuilder.sweep.recorder import recording_compiler


def say(what: str, **figures: object) -> None:
    print(json.dumps({"what": what} | figures), flush=True)


def child(job: dict[str, Any]) -> None:
    """The warm-up, inside the process whose environment stands for the serving one."""
    import torch

    device = Device(torch, import_package("deep_gemm", job["deep_gemm"]))
    torch.zeros(1, device="cuda")
    ops = [OPS[fields["op"]].model_validate(fields) for fields in job["ops"]]
    device.deep_gemm.set_num_sms(job["sm_count"])
    started, calls = time.monotonic(), 0
    for op in ops:
        call = op.prepare(device)
        dense = op.op == "fp8_gemm_nt"
        for value in relaxed(op.largest_m, op.n, job["sm_count"]) if dense else op.points(device):
            call(value)
            calls += 1
    torch.cuda.synchronize()
    print(json.dumps({"calls": calls, "seconds": round(time.monotonic() - started, 2)}))


def warm_up(job: dict[str, Any], environment: dict[str, str]) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, __file__, "--child", json.dumps(job)],
        env=os.environ | environment,
        text=True,
        capture_output=True,
    )
    if done.returncode:
        return {"exit": done.returncode, "errors": done.stderr[-800:]}
    return json.loads(done.stdout.splitlines()[-1])


def importing(inputs: Inputs, folder: Path) -> float:
    """Seconds of a sweep of nothing, which every plan pays first: the second one, when all files are in memory."""
    (scratch := folder / "importing").mkdir()
    compiler = recording_compiler(scratch, inputs.toolchain.version_text)
    job = SweepJob.of(inputs.manifest, inputs.installation).model_copy(update={"ops": ()})
    seconds = 0.0
    for _ in range(2):
        started = time.monotonic()
        sweep.call(job, Setting("import", compiler, [scratch / "root"], scratch))
        seconds = time.monotonic() - started
    return round(seconds, 2)


def compare(manifest: Path, deep_gemm: Path | None, separate: bool, commit: str) -> None:
    inputs = load_manifest(manifest, deep_gemm=deep_gemm)
    gpu = nvml.first_gpu()
    say(
        "run",
        command="python benchmarks/gpu/warmup.py",
        commit=commit,
        manifest=manifest.stem,
        deep_gemm=str(inputs.installation.version),
        generation=inputs.installation.generation,
        nvcc=inputs.toolchain.release,
        gpu=gpu.name if gpu else None,
        driver=gpu.driver if gpu else None,
        cores=len(os.sched_getaffinity(0)),
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        imported = importing(inputs, folder)
        artifact, seconds = folder / "artifact.tar.zst", {}
        for grouped in (False, True) if separate else (True,):
            started = time.monotonic()
            built = building.build(inputs, artifact, options=CompileOptions(use_store=False, grouped=grouped))
            seconds[grouped] = time.monotonic() - started
            say(
                "build",
                way="grouped" if grouped else "separate",
                kernels=len(built.plan.kernels),
                calls=built.plan.calls,
                importing_seconds=imported,
                plan_seconds=round(built.plan_seconds, 2),
                compile_seconds=round(built.compiled.wall_seconds, 2),
                compile_cpu_seconds=round(built.compiled.cpu_seconds, 1),
                checked=built.compiled.checked,
                pack_seconds=round(built.pack_seconds, 2),
                wall_seconds=round(seconds[grouped], 2),
                sha256=built.packed.sha256,
            )
        cache = folder / "cache"
        copy = ["--deep-gemm", str(inputs.installation.imported_as)]
        started = time.monotonic()
        command = [sys.executable, "-m", "cachebuilder", "restore", str(artifact), "--to", str(cache), *copy]
        subprocess.run(command, check=True, capture_output=True)
        restored = time.monotonic() - started
        say("restore", seconds=round(restored, 2))
        job = {
            "deep_gemm": str(inputs.installation.imported_as),
            "ops": list(built.plan.ops),
            "sm_count": built.plan.sm_counts[0],
        }
        (folder / "none").mkdir()
        (folder / "scratch").mkdir()
        roots = [cache] if inputs.installation.generation == "legacy" else [folder / "scratch", cache]
        log = folder / "misses.jsonl"
        cached = warm_up(
            job,
            {
                "DG_JIT_CACHE_DIR": ":".join(map(str, roots)),
                "DG_JIT_NVCC_COMPILER": str(cache / "cachebuilder" / "bin" / "nvcc"),
                "CUDA_HOME": str(folder / "none"),
                "PATH": "/usr/bin:/bin",
                LOG_VARIABLE: str(log),
            },
        )
        say("cached", **cached, misses=len(log.read_text().splitlines()) if log.exists() else 0)
        own = folder / "own"
        cold = warm_up(job, {"DG_JIT_CACHE_DIR": str(own), "DG_JIT_NVCC_COMPILER": str(inputs.toolchain.nvcc)})
        made = {entry.name for entry in (own / "cache").iterdir()}
        planned = {kernel.entry for kernel in built.plan.kernels}
        say("cold", **cold, kernels=len(made), not_planned=sorted(made - planned))
        if "seconds" in cold and "seconds" in cached:
            ours = built.plan_seconds + built.compiled.wall_seconds
            say(
                "ratios",
                cold_to_plan_and_compile=round(cold["seconds"] / ours, 1),
                cold_to_build=round(cold["seconds"] / seconds[True], 1),
                cold_to_cached=round(cold["seconds"] / cached["seconds"], 1),
                cold_to_restore=round(cold["seconds"] / restored, 1),
            )


@click.command()
@click.argument("manifests", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--deep-gemm", multiple=True, type=click.Path(path_type=Path))
@click.option("--separate", is_flag=True)
@click.option("--commit", default="")
def main(manifests: tuple[Path, ...], deep_gemm: tuple[Path, ...], separate: bool, commit: str) -> None:
    for copy in deep_gemm or (None,):
        for manifest in manifests:
            compare(manifest, copy, separate, commit)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(json.loads(sys.argv[2]))
    else:
        main()
