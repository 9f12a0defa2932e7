"""Does an engine's own warm-up find every kernel in a cache that was built from our manifest? On a virtual GPU.

    PYTHONPATH=. ENGINE_ENV/bin/python benchmarks/engines/check.py CONFIG.json --engine vllm --gpu H200 --tp 8 \
        --max-num-batched-tokens 8192 --results benchmarks/results/FILE.json

Runs in the engine's own environment (its torch, its DeepGEMM), with cachebuilder importable and nvcc at hand. In order:
the manifest from the config, the build, the restore, then the engine's warm-up in a process that sees the virtual GPU,
the restored cache and the frozen nvcc, which refuses every request to compile: one miss ends it. A second pass, only
then, counts all misses with the recording compiler. Exit code 1 for a miss.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from cachebuilder import building
from cachebuilder.authoring.derive.config import Config
from cachebuilder.authoring.derive.derive import derive
from cachebuilder.authoring.derive.engines import ENGINES
from cachebuilder.authoring.derive.text import manifest_text
from cachebuilder.cuda import gpus
from cachebuilder.deepgemm import installation as installations
from cachebuilder.manifest.inputs import find_inputs
from cachebuilder.manifest.schema import Manifest
from cachebuilder.restoring import environment
from cachebuilder.restoring.folder import open_folder
from cachebuilder.restoring.machine import Machine
from cachebuilder.restoring.restore import restore
from cachebuilder.sweep import run as sweep
from cachebuilder.virtual_gpu import library as virtual_gpu

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def shapes(manifest: Manifest) -> dict[str, Any]:
    """What the engine's functions are given: weights' shapes, from the manifest."""
    dense = [(op.n, op.k) for op in manifest.ops if op.op == "fp8_gemm_nt"]
    grouped = [op for op in manifest.ops if op.op == "m_grouped_fp8_gemm_nt_contiguous"]
    pairs = ((w13, w2) for w13 in grouped for w2 in grouped)  # several layouts of the rows are one shape here
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
    """The engine's side; its result, or None and the end of what it printed."""
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
    given = parser.parse_args()

    config = Config.read(given.config)
    rules = ENGINES[given.engine]
    serving = rules(
        gpu=gpus.find(given.gpu),
        version=rules.release(metadata.version(given.engine)),
        tp=given.tp,
        ep=given.ep,
        dp=given.dp,
        max_tokens=given.max_num_batched_tokens,
        max_seqs=16,
        max_model_len=given.max_model_len,
        moe_deep_gemm=given.moe_backend == "deep_gemm",
    )
    text = manifest_text(config, serving, derive(config, serving))
    failed = False
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        (work / "m.yaml").write_text(text)
        deep_gemm = installations.find(None)
        inputs = find_inputs(work / "m.yaml", None, deep_gemm.path)
        started = time.monotonic()
        built = building.build(inputs, work / "a.tar.zst")
        restored = work / "restored"
        restore([work / "a.tar.zst"], restored, machine=Machine(deep_gemm))
        result: dict[str, Any] = {
            "command": ["benchmarks/engines/check.py", given.config.parent.name, *map(without_folder, sys.argv[2:])],
            "commit": commit(),
            "manifest": text.splitlines(),
            "deep_gemm": str(deep_gemm).replace(str(deep_gemm.path), deep_gemm.path.name),
            "nvcc": inputs.toolchain.release,
            "kernels": len(built.plan.kernels),
            "calls_planned": built.plan.calls,
            "build_seconds": round(time.monotonic() - started, 1),
            "modes": {},
        }
        for mode in given.modes:
            job = shapes(inputs.manifest) | {
                "deep_gemm": str(deep_gemm.path),
                "dp": given.dp,
                "max_tokens": given.max_num_batched_tokens,
                "mode": mode,
                "requantize": not given.no_requantize,
            }
            found = check(given.engine, mode, job, restored, serving.gpu, deep_gemm, work)
            failed = failed or bool(found["misses"]) or "error" in found
            result["modes"][mode] = found
            print(json.dumps({mode: found}), flush=True)
    if given.results:
        given.results.parent.mkdir(exist_ok=True)
        given.results.write_text(json.dumps(result, indent=1) + "\n")
    sys.exit(failed)


def check(
    engine: str,
    mode: str,
    job: dict[str, Any],
    restored: Path,
    gpu: gpus.Gpu,
    deep_gemm: installations.Installation,
    work: Path,
) -> dict[str, Any]:
    """The warm-up with the frozen nvcc; if that was asked anything, again with the recording one."""
    for folder in (here := work / mode, here / "scratch", here / "again"):
        folder.mkdir()
    log = here / "misses.jsonl"
    variables = base_variables(gpu)
    serving = environment.variables(restored, open_folder(restored).indexes, engine, here / "scratch", variables)
    variables |= {variable.name: variable.value for variable in serving}
    variables |= {"CACHEBUILDER_MISS_LOG": str(log), "VIRTUAL_GPU_CHECK_CUBINS": "1"}
    variables |= {"VLLM_DEEP_GEMM_WARMUP": mode} if engine == "vllm" else {"SGLANG_JIT_DEEPGEMM_PRECOMPILE": "1"}
    script = f"{engine}_warmup.py"
    started = time.monotonic()
    answer, text = run_child(script, job, variables, here)
    seconds = round(time.monotonic() - started, 1)
    if answer is not None and not log.exists():
        return {"misses": [], "seconds": seconds, **answer}
    # The recording compiler answers with placeholders; it writes only into a root of its own.
    recorder = sweep.recording_compiler(here / "again", (restored / "cachebuilder/bin/version.txt").read_text())
    root = here / "again" / "root"
    root.mkdir()
    roots = f"{root}:{restored}"
    variables |= {
        "DG_JIT_CACHE_DIR": roots,
        "SGLANG_DG_CACHE_DIR": roots,
        "DG_JIT_NVCC_COMPILER": str(recorder.nvcc),
        "CUDA_HOME": str(recorder.home),
        "VIRTUAL_GPU_CHECK_CUBINS": "0",
    }
    again, more = run_child(script, job, variables, here)
    missed = sorted(sweep.read_entries(root, deep_gemm.generation))
    if again is None:
        return {"misses": missed, "seconds": seconds, "error": (text or more).splitlines()}
    return {"misses": missed, "seconds": seconds, **again}


def base_variables(gpu: gpus.Gpu) -> dict[str, str]:
    """This process's environment without what steers DeepGEMM or CUDA, and with the virtual GPU."""
    drop = ("DG_", "DJ_", "CUDA_", "NVIDIA_", "VIRTUAL_GPU_", "CACHEBUILDER_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(drop)}
    return (
        kept
        | virtual_gpu.environment(gpu)
        | {"PYTHONPATH": str(ROOT), "VLLM_LOGGING_LEVEL": "WARNING", "TORCHDYNAMO_DISABLE": "1"}
    )


def without_folder(argument: str) -> str:
    """An argument as it is recorded: of a path, the file alone."""
    return Path(argument).name if "/" in argument else argument


def commit() -> str:
    found = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return found.stdout.strip()


if __name__ == "__main__":
    main()
