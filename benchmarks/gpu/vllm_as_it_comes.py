"""Serve with an unmodified vLLM on an SM90 GPU: as it comes with cold caches, and from a restored artifact.

    python benchmarks/gpu/vllm_as_it_comes.py MODEL ARTIFACT [--runs LIST] [--graphs] [--baked ARTIFACT] [--served ARTIFACT]
        [--deep-gemm FOLDER] [--max-len N] [--steps LIST]

MODEL is a folder with a config.json; weights are dummies. Each run is a process of its own with empty caches of its own:

- ``restored``: the artifact restored, the variables that ``cachebuilder env --engine vllm`` prints, in a mount namespace in
  which the CUDA toolkit is hidden. Beside them each run has those of ``own_caches``: folders of its own for what the
  artifact does not hold, no usage statistics, no network, and the engine in the process that times its steps.
- ``switched-off``: the same with VLLM_BLOCKSCALE_FP8_GEMM_FLASHINFER=0, for the cost of that switch.
- ``second-start``: ``restored`` once more, on the caches that it left: a second start on the card's own warm caches.
- ``baked``: an artifact that also has the caches of the other compilers, which ``cachebuilder bake`` filled, restored where
  they were baked (``--baked ARTIFACT``). With graphs, vLLM's JIT monitor is in ``error`` mode:
  a compilation after the start ends the engine.
- ``served``: the same with ``cachebuilder run DIR -- vllm serve``, asked over HTTP (``--served ARTIFACT``).
- ``cold``: no artifact, the toolkit there.

Prints one JSON object a run: seconds until the engine is up, of which how many imported vLLM, until the first token, the
longest step of each batch, decoded tokens a second, a digest of all tokens, what the engine's log says of its phases, and
how many compilations there were: calls of compilers, which wrappers count, and lines in the log of the frozen nvcc. Then
a table. Each run leaves its log and the parts of its cache keys in the folder of ``--logs``. Run it as root, for the
mount namespace.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import click

COMPILERS = ("gcc", "g++", "cc", "c++", "clang", "nvcc", "ninja", "ptxas")
ASKED = ("--version", "-V", "-v", "-dumpversion", "-dumpfullversion")
HIDE = 'for folder in /usr/local/cuda*; do mount --bind /mnt/empty $folder; done; hash -r; exec "$@"'
#: What vLLM's log says of its phases.
PHASES = {
    "weights": r"Model loading took .* and ([\d.]+) seconds",
    "dynamo": r"Dynamo bytecode transform time: ([\d.]+) s",
    "compile": r"torch.compile took ([\d.]+) s",
    "profiling": r"Initial profiling/warmup run took ([\d.]+) s",
    "capture": r"Graph capturing finished in (\d+) secs",
    "engine": r"init engine .* took ([\d.]+) s",
}
STEPS = "1x1,1x17,1x100,8x33,31x5,64x20,128x3,1x3000"


def child(model: str, max_len: int, steps: str, graphs: bool) -> None:
    """The engine, inside the process whose environment is the serving one's."""
    started = time.monotonic()
    from vllm import LLM, SamplingParams

    imported = time.monotonic() - started
    llm = LLM(
        model=model,
        load_format="dummy",
        skip_tokenizer_init=True,
        enforce_eager=not graphs,
        max_model_len=max_len,
        max_num_batched_tokens=8192,
        moe_backend="deep_gemm",
        jit_monitor_mode=os.environ.get("JIT_MONITOR", "warn"),
    )
    up = time.monotonic() - started
    engine = llm.llm_engine
    numbers = iter(range(10**6))

    if path := os.environ.get("KEYS_FILE"):
        Path(path).write_text(json.dumps(key_parts(engine.vllm_config), indent=1, sort_keys=True, default=str))
    outputs: dict[str, list[int]] = {}

    def serve(batch: int, prompt: int, tokens: int, **sampling: float) -> list[float]:
        """The seconds of each step."""
        for _ in range(batch):
            parameters = SamplingParams(max_tokens=tokens, detokenize=False, ignore_eos=True, **sampling)
            engine.add_request(str(next(numbers)), {"prompt_token_ids": [1] * prompt}, parameters)
        seconds = []
        while engine.has_unfinished_requests():
            before = time.monotonic()
            for output in engine.step():
                outputs[output.request_id] = list(output.outputs[0].token_ids)
            seconds.append(time.monotonic() - before)
        return seconds

    longest, first = {}, None
    for step in steps.split(","):
        batch, prompt = map(int, step.split("x"))
        seconds = serve(batch, prompt, 4, temperature=0.0)
        first = first if first is not None else seconds[0]
        longest[step] = round(max(seconds), 3)
    # From the likeliest tokens: this takes FlashInfer's sampler.
    longest["sampled"] = round(max(serve(3, 20, 4, top_k=20, top_p=0.95)), 3)
    decode = {}
    for batch in (1, 8, 31):
        seconds = serve(batch, 16, 130, temperature=0.0)[2:]
        decode[str(batch)] = round(batch * len(seconds) / sum(seconds), 1)
    result = {
        "up": round(up, 1),
        "import": round(imported, 1),
        "first_token": round(first or 0, 3),
        "longest_step": longest,
        "decode": decode,
        "tokens": hashlib.sha256(repr(list(outputs.values())).encode()).hexdigest()[:16],
        "first_tokens": [tokens[:4] for tokens in list(outputs.values())[:6]],
    }
    print("RESULT " + json.dumps(result), flush=True)
    os._exit(0)


def key_parts(config: Any) -> dict[str, Any]:
    """What the caches' keys hold, part by part, for a comparison of two machines."""
    import platform

    import torch
    import triton
    import vllm
    from torch._inductor.codecache import CacheBase, torch_key
    from vllm.config.utils import get_hash_factors

    parts: dict[str, Any] = {"python": platform.python_version(), "torch_key": torch_key().hex()}
    parts["inductor"] = {key: repr(value)[:200] for key, value in CacheBase.get_system().items()}
    parts["settings"] = {k: repr(v) for k, v in torch._inductor.config.save_config_portable().items()}
    parts["paths"] = [module.__file__ for module in (torch, triton, vllm)]
    for name, value in vars(config).items():
        if hasattr(value, "compute_hash"):
            parts[name] = {"hash": value.compute_hash()}
            try:
                parts[name] |= {key: repr(factor)[:2000] for key, factor in get_hash_factors(value, set()).items()}
            except (TypeError, ValueError) as error:
                parts[name]["factors"] = str(error)
    parts["hash"] = config.compute_hash()
    return parts


def run(name: str, environment: dict[str, str], arguments: list[str], hidden: bool, log: Path) -> dict[str, Any]:
    command = [sys.executable, __file__, "--child", *arguments]
    if hidden:
        Path("/mnt/empty").mkdir(exist_ok=True)
        command = ["unshare", "-m", "sh", "-c", HIDE, "sh", *command]
    calls = log.with_suffix(".calls")
    calls.unlink(missing_ok=True)  # a run of this name before it
    environment = environment | counted(log.parent / f"compilers-{name}", calls, environment["PATH"])
    environment["KEYS_FILE"] = str(log.with_suffix(".keys.json"))
    started = time.monotonic()
    with log.open("w") as output:
        process = subprocess.run(
            ["timeout", os.environ.get("RUN_LIMIT", "280"), *command],
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            check=False,
        )
    lines = log.read_text(errors="replace").splitlines()
    result = next((json.loads(line[7:]) for line in lines if line.startswith("RESULT ")), None)
    if result is None:
        result = {
            "failed": process.returncode,
            "end": [line[-300:] for line in lines if "Error" in line][-4:] or lines[-5:],
        }
    whole = "\n".join(lines)
    result["generated"] = generated(Path(environment["VLLM_CACHE_ROOT"]))
    result["phases"] = {name: float(found[1]) for name, text in PHASES.items() if (found := re.search(text, whole))}
    called = [line.split() for line in calls.read_text().splitlines()] if calls.exists() else []
    compiled = [words for words in called if words[1:2] and words[1] not in ASKED]
    result["compilers"] = {one: sum(words[0] == one for words in compiled) for one in sorted({w[0] for w in compiled})}
    return {"run": name, "whole": round(time.monotonic() - started, 1)} | result


def serve(dir: Path, model: str, environment: dict[str, str], steps: str, log: Path) -> dict[str, Any]:
    """``vllm serve`` from a restored folder: seconds until it is healthy, and of each batch of requests."""
    command = [sys.executable, "-m", "cachebuilder", "run", str(dir), "--engine", "vllm", "--", "vllm", "serve", model]
    command += ["--max-model-len", "16384", "--max-num-batched-tokens", "8192", "--moe-backend", "deep_gemm"]
    command += ["--load-format", "dummy", "--skip-tokenizer-init", "--port", "8765", "--jit-monitor-mode", "error"]
    calls = log.with_suffix(".calls")
    calls.unlink(missing_ok=True)  # a run of this name before it
    environment = environment | counted(log.parent / "compilers-served", calls, environment["PATH"])
    longest: dict[str, float] = {}
    started = time.monotonic()
    with log.open("w") as output:
        process = subprocess.Popen(
            ["unshare", "-m", "sh", "-c", HIDE, "sh", *command],
            env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            while process.poll() is None and time.monotonic() - started < 280:
                try:
                    urllib.request.urlopen("http://127.0.0.1:8765/health", timeout=5)
                    break
                except OSError:
                    time.sleep(0.1)
            up, first = time.monotonic() - started, None
            for step in steps.split(",") if process.poll() is None else ():
                batch, prompt = map(int, step.split("x"))
                before = time.monotonic()
                with ThreadPoolExecutor(batch) as pool:
                    list(pool.map(complete, [prompt] * batch, range(batch), [1 if first is None else 4] * batch))
                longest[step] = round(time.monotonic() - before, 3)
                first = first if first is not None else longest[step]
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    called = [line.split() for line in calls.read_text().splitlines()] if calls.exists() else []
    compiled = [words for words in called if words[1:2] and words[1] not in ASKED]
    misses = dir / "cachebuilder" / "misses.jsonl"
    return {
        "run": "served",
        "up": round(up, 1),
        "first_token": first,
        "longest_request": longest,
        "compilers": {one: sum(words[0] == one for words in compiled) for one in sorted({w[0] for w in compiled})},
        "compilations": len(misses.read_text().splitlines()) if misses.exists() else 0,
        "end": log.read_text(errors="replace").splitlines()[-3:] if not longest else [],
    }


def complete(prompt: int, number: int, tokens: int) -> None:
    """One request of so many prompt tokens, which its number decides: vLLM does not compute again what it has cached."""
    sampling = {"max_tokens": tokens, "temperature": 0, "ignore_eos": True, "detokenize": False}
    body = {
        "token_ids": [1 + (7 * number + 13 * prompt + i) % 1000 for i in range(prompt)],
        "sampling_params": sampling,
    }
    request = urllib.request.Request(
        "http://127.0.0.1:8765/inference/v1/generate", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    urllib.request.urlopen(request, timeout=120).read()


def generated(caches: Path) -> list[Any]:
    """How many files Inductor generated and a digest of their names, which are hashes; how many choices it kept."""
    names = sorted(path.name for path in caches.rglob("inductor_cache/*/*.py"))
    digest = hashlib.sha256(" ".join(names).encode()).hexdigest()[:12]
    return [len(names), digest, len(list(caches.rglob("*.best_config")))]


def counted(folder: Path, calls: Path, path: str) -> dict[str, str]:
    """Variables by which every compiler on PATH, and Triton's ptxas, writes down that it was called."""
    import triton

    folder.mkdir(parents=True, exist_ok=True)
    own_ptxas = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    for name in COMPILERS:
        real = own_ptxas if name == "ptxas" else shutil.which(name, path=path)
        if real and Path(real).resolve().parent.parent != Path("/usr/local/cuda").resolve():
            (folder / name).write_text(f'#!/bin/sh\necho "{name} $*" >>{calls}\nexec {real} "$@"\n')
            (folder / name).chmod(0o755)
    return {"PATH": f"{folder}:{path}", "TRITON_PTXAS_PATH": str(folder / "ptxas")}


def own_caches(folder: Path) -> dict[str, str]:
    """Caches of its own for every compiler, so that no run warms another. HOME stays, since vLLM's keys hold paths."""
    folder.mkdir(parents=True, exist_ok=True)
    dropped = ("CUDA_", "VLLM_", "DG_", "TRTLLM_", "FLASHINFER_", "TORCH_CUDA_ARCH", "CC", "CXX", "XDG_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
    return kept | {
        "FLASHINFER_WORKSPACE_BASE": str(folder),
        "CUDA_CACHE_PATH": str(folder / "driver"),
        "VLLM_CACHE_ROOT": str(folder / "vllm"),
        "TRITON_CACHE_DIR": str(folder / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
        "HUMMING_CACHE_DIR": str(folder / "humming"),
        "TILELANG_CACHE_DIR": str(folder / "tilelang"),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }


@click.command()
@click.argument("model")
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option(
    "--runs", default="restored", show_default=True, help="of restored, second-start, baked, switched-off, served, cold"
)
@click.option("--baked", type=click.Path(path_type=Path), help="an artifact with what cachebuilder bake filled")
@click.option("--served", type=click.Path(path_type=Path), help="the same, baked with vllm serve")
@click.option("--graphs", is_flag=True, help="CUDA graphs and torch.compile on, as vLLM comes; else eager")
@click.option("--deep-gemm", type=click.Path(path_type=Path))
@click.option("--max-len", type=int, default=16384)
@click.option("--steps", default=STEPS)
@click.option("--logs", type=click.Path(path_type=Path), default=Path("/tmp"))
def main(
    model: str,
    artifact: Path,
    runs: str,
    baked: Path | None,
    served: Path | None,
    graphs: bool,
    deep_gemm: Path | None,
    max_len: int,
    steps: str,
    logs: Path,
) -> None:
    arguments = [model, str(max_len), steps, "graphs" if graphs else "eager"]
    results = []
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        restored = Path("/opt/restored") / artifact.name.split(".")[0]
        shutil.rmtree(restored, ignore_errors=True)
        cachebuilder = [sys.executable, "-m", "cachebuilder"]
        options = ["--deep-gemm", str(deep_gemm)] if deep_gemm else []
        subprocess.run([*cachebuilder, "restore", str(artifact), "--to", str(restored), *options], check=True)
        for name in [name for name in runs.split(",") if name not in ("cold", "served")]:
            environment = own_caches(work / ("restored" if name == "second-start" else name))
            if name == "baked" and baked is not None:
                shutil.rmtree(restored)
                subprocess.run([*cachebuilder, "restore", str(baked), "--to", str(restored), *options], check=True)
                environment["JIT_MONITOR"] = "error" if graphs else "warn"
            Path("/mnt/empty").mkdir(exist_ok=True)
            ask = [*cachebuilder, "env", str(restored), "--engine", "vllm", "--format", "json"]
            printed = subprocess.run(
                ["unshare", "-m", "sh", "-c", HIDE, "sh", *ask],
                env=environment,
                check=False,
                capture_output=True,
                text=True,
            )
            if printed.returncode:
                print(json.dumps({"run": name, "refused": printed.stderr[-3000:]}), flush=True)
                continue
            environment |= json.loads(printed.stdout)
            if name == "switched-off":
                environment["VLLM_BLOCKSCALE_FP8_GEMM_FLASHINFER"] = "0"
            result = run(name, environment, arguments, True, logs / f"{name}.log")
            misses = restored / "cachebuilder" / "misses.jsonl"
            result["compilations"] = len(misses.read_text().splitlines()) if misses.exists() else 0
            results.append(result)
            print(json.dumps(result), flush=True)
        if served is not None and "served" in runs.split(","):
            to = Path("/opt/restored") / served.name.split(".")[0]
            shutil.rmtree(to, ignore_errors=True)
            subprocess.run([*cachebuilder, "restore", str(served), "--to", str(to), *options], check=True)
            environment = own_caches(work / "served")
            del environment["VLLM_ENABLE_V1_MULTIPROCESSING"]
            results.append(serve(to, model, environment, steps, logs / "served.log"))
            print(json.dumps(results[-1]), flush=True)
        if "cold" in runs.split(","):
            home, count = work / "cuda", work / "nvcc-calls"
            real = Path("/usr/local/cuda").resolve()
            (home / "bin").mkdir(parents=True)
            for path in [*real.iterdir(), *(real / "bin").iterdir()]:
                link = home / path.relative_to(real)
                if path.name not in ("bin", "nvcc"):
                    link.symlink_to(path)
            (home / "bin" / "nvcc").write_text(f'#!/bin/sh\necho x >>{count}\nexec {real}/bin/nvcc "$@"\n')
            (home / "bin" / "nvcc").chmod(0o755)
            environment = own_caches(work / "cold") | {
                "CUDA_HOME": str(home),
                "PATH": f"{home}/bin:{os.environ['PATH']}",
            }
            result = run("cold", environment, arguments, False, logs / "cold.log")
            result["compilations"] = len(count.read_text().splitlines()) if count.exists() else 0
            results.append(result)
            print(json.dumps(result), flush=True)
    print(
        f"{'run':<14}{'up s':>8}{'import s':>10}{'first s':>9}{'longest step s':>16}"
        f"{'tok/s 1':>9}{'8':>9}{'31':>9}{'compiled':>10}"
    )
    for result in results:
        steps_of = result.get("longest_step") or result.get("longest_request") or {"": 0}
        decode = result.get("decode", {})
        print(
            f"{result['run']:<14}{result.get('up', 0):>8}{result.get('import', 0):>10}"
            f"{result.get('first_token', 0):>9}{max(steps_of.values()):>16}"
            + "".join(f"{decode.get(key, 0):>9}" for key in ("1", "8", "31"))
            + f"{result['compilations']:>10}"
        )


if __name__ == "__main__":
    if sys.argv[1] == "--child":
        child(sys.argv[2], int(sys.argv[3]), sys.argv[4], sys.argv[5] == "graphs")
    else:
        main()
