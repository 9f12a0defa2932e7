"""Checks on a virtual GPU that an engine's own warm-up finds every kernel in a cache that was built from our manifest.

    PYTHONPATH=. ENGINE_ENV/bin/python benchmarks/engines/check.py CONFIG.json --engine vllm --gpu H200 --tp 8 \
        --max-num-batched-tokens 8192 --results benchmarks/results/FILE.json

Runs in the engine's own environment (its torch, its DeepGEMM), where cachebuilder can be imported and nvcc found. It
writes the manifest from the config, builds, restores, and then runs the engine's warm-up in a process that sees the
virtual GPU, the restored cache and the frozen nvcc. That refuses every request to compile, so the first miss ends the
warm-up; a second run with the recording compiler then counts all misses. The exit code is 1 for a miss.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from cachebuilder import building
from cachebuilder.authoring.derive.engines import ENGINES
from cachebuilder.authoring.derive.manifest import Deployment, derive_manifest
from cachebuilder.cuda.gpus import Gpu
from cachebuilder.deepgemm import installation as installations
from cachebuilder.manifest.inputs import load_manifest
from cachebuilder.manifest.schema import Manifest
from cachebuilder.restoring import environment, place
from cachebuilder.restoring.folder import open_folder
from cachebuilder.restoring.machine import Machine
from cachebuilder.restoring.restore import restore
from cachebuilder.sweep.recorder import read_entries, recording_compiler
from cachebuilder.virtual_gpu import library as virtual_gpu

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def shapes(manifest: Manifest) -> dict[str, Any]:
    """The shapes of weights in the manifest, for which the engine's functions are called."""
    dense = [(op.n, op.k) for op in manifest.ops if op.op == "fp8_gemm_nt"]
    grouped = [op for op in manifest.ops if op.op == "m_grouped_fp8_gemm_nt_contiguous"]
    pairs = ((w13, w2) for w13 in grouped for w2 in grouped)  # layouts of the rows do not matter here
    experts = dict.fromkeys(
        (w13.experts, w13.topk, w13.k, w2.k)
        for w13, w2 in pairs
        if (w13.experts, w13.n, w13.k) == (w2.experts, 2 * w2.k, w2.n)
    )
    masked = [(op.experts, op.n, op.k) for op in manifest.ops if op.op == "m_grouped_fp8_gemm_nt_masked"]
    return {"dense": dense, "experts": list(experts), "masked": masked}


def run_child(
    script: str, job: dict[str, Any], variables: dict[str, str], work: Path
) -> tuple[dict[str, Any] | None, str]:
    """Run the engine's side; returns its result, or None and the end of what it printed."""
    (work / "job.json").write_text(json.dumps(job))
    result, log = work / "result.json", work / "log.txt"
    result.unlink(missing_ok=True)
    with log.open("wb") as output:
        subprocess.run(
            [sys.executable, str(HERE / script), str(work / "job.json"), str(result)],
            env=variables,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            check=False,
        )
    if result.exists():
        return json.loads(result.read_text()), ""
    return None, "\n".join(log.read_text(errors="replace").splitlines()[-25:])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("config", type=Path)
    parser.add_argument("--engine", choices=list(ENGINES), required=True)
    parser.add_argument("--gpu", required=True)
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--ep", type=int, default=1)
    parser.add_argument("--dp", type=int, default=1)
    parser.add_argument("--max-num-batched-tokens", type=int, default=8192)
    parser.add_argument("--max-model-len", type=int, default=1024)
    parser.add_argument("--moe-backend", choices=["deep_gemm", "other"], default="deep_gemm")
    parser.add_argument("--no-requantize", action="store_true", help="skip vLLM's Triton kernel that rounds scales")
    parser.add_argument("--modes", nargs="+", default=["full", "relax"])
    parser.add_argument("--results", type=Path)
    options = parser.parse_args()

    deployment = Deployment(
        engine=options.engine,
        engine_version=metadata.version(options.engine),
        gpu=options.gpu,
        tp=options.tp,
        ep=options.ep,
        dp=options.dp,
        max_tokens=options.max_num_batched_tokens,
        max_seqs=16,
        max_model_len=options.max_model_len,
        moe_backend=options.moe_backend,
    )
    derived = derive_manifest(options.config, deployment)
    failed = False
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        (work / "m.yaml").write_text(derived.text)
        inputs = load_manifest(work / "m.yaml", deep_gemm=installations.find(None).path)
        deep_gemm = inputs.installation
        started = time.monotonic()
        built = building.build(inputs, work / "a.tar.zst")
        restored = work / "restored"
        restore([work / "a.tar.zst"], restored, machine=Machine(deep_gemm))
        result: dict[str, Any] = {
            "command": ["benchmarks/engines/check.py", options.config.parent.name, *map(without_folder, sys.argv[2:])],
            "commit": commit(),
            "manifest": derived.text.splitlines(),
            "deep_gemm": str(deep_gemm).replace(str(deep_gemm.path), deep_gemm.path.name),
            "nvcc": inputs.toolchain.release,
            "kernels": len(built.plan.kernels),
            "calls_planned": built.plan.calls,
            "build_seconds": round(time.monotonic() - started, 1),
            "modes": {},
        }
        cache = Cache(options.engine, derived.serving.gpu, deep_gemm, restored)
        for mode in options.modes:
            job = shapes(inputs.manifest) | {
                "deep_gemm": str(deep_gemm.path),
                "dp": options.dp,
                "max_tokens": options.max_num_batched_tokens,
                "mode": mode,
                "requantize": not options.no_requantize,
            }
            checked = check(cache, mode, job, work)
            failed = failed or bool(checked["misses"]) or "error" in checked
            result["modes"][mode] = checked
            print(json.dumps({mode: checked}), flush=True)
    if options.results:
        options.results.parent.mkdir(exist_ok=True)
        options.results.write_text(json.dumps(result, indent=1) + "\n")
    sys.exit(failed)


@dataclass(frozen=True)
class Cache:
    """A restored cache, and the engine, GPU and DeepGEMM that it is for."""

    engine: str
    gpu: Gpu
    deep_gemm: installations.Installation
    restored: Path


def check(cache: Cache, mode: str, job: dict[str, Any], work: Path) -> dict[str, Any]:
    """Run the warm-up with the frozen nvcc; if it asked for a compilation, run it again with the recording one."""
    for folder in (here := work / mode, here / "scratch", here / "again"):
        folder.mkdir()
    log = here / "misses.jsonl"
    variables = base_variables(cache.gpu)
    indexes = open_folder(cache.restored).indexes
    serving = environment.variables(
        place.usual(cache.restored, indexes, here / "scratch"), indexes, cache.engine, variables
    )
    variables |= {variable.name: variable.value for variable in serving}
    variables |= {"CACHEBUILDER_MISS_LOG": str(log), "VIRTUAL_GPU_CHECK_CUBINS": "1"}
    variables |= {"VLLM_DEEP_GEMM_WARMUP": mode} if cache.engine == "vllm" else {"SGLANG_JIT_DEEPGEMM_PRECOMPILE": "1"}
    script = f"{cache.engine}_warmup.py"
    started = time.monotonic()
    answer, output = run_child(script, job, variables, here)
    seconds = round(time.monotonic() - started, 1)
    if answer is not None and not log.exists():
        return {"misses": [], "seconds": seconds, **answer}
    # The recording compiler answers with placeholders; it writes only into a root of its own.
    version_text = (cache.restored / "cachebuilder/bin/version.txt").read_text()
    recorder = recording_compiler(here / "again", version_text)
    root = here / "again" / "root"
    root.mkdir()
    roots = f"{root}:{cache.restored}"
    variables |= {
        "DG_JIT_CACHE_DIR": roots,
        "SGLANG_DG_CACHE_DIR": roots,
        "DG_JIT_NVCC_COMPILER": str(recorder.nvcc),
        "CUDA_HOME": str(recorder.home),
        "VIRTUAL_GPU_CHECK_CUBINS": "0",
    }
    answer, second_output = run_child(script, job, variables, here)
    missed = sorted(read_entries(root, cache.deep_gemm.generation))
    if answer is None:
        return {"misses": missed, "seconds": seconds, "error": (output or second_output).splitlines()}
    return {"misses": missed, "seconds": seconds, **answer}


def base_variables(gpu: Gpu) -> dict[str, str]:
    """This process's environment without what steers DeepGEMM or CUDA, and with the virtual GPU."""
    drop = ("DG_", "DJ_", "CUDA_", "NVIDIA_", "VIRTUAL_GPU_", "CACHEBUILDER_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(drop)}
    return (
        kept
        | virtual_gpu.environment(gpu)
        | {"PYTHONPATH": str(ROOT), "VLLM_LOGGING_LEVEL": "WARNING", "TORCHDYNAMO_DISABLE": "1"}
    )


def without_folder(argument: str) -> str:
    """An argument as it is recorded: a path without its folder."""
    return Path(argument).name if "/" in argument else argument


def commit() -> str:
    command = ["git", "describe", "--always", "--dirty"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()


if __name__ == "__main__":
    main()
