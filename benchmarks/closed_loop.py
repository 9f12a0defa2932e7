"""The closed loop: observe an engine, build, restore, and run the engine again from that cache with a compiler that refuses.

    python benchmarks/closed_loop.py --gpu B200 -o benchmarks/results/closed-loop.jsonl MODEL:LAYOUT... [-- OPTIONS...]

Runs in the engine's environment, with cachebuilder importable. MODEL, LAYOUT and OPTIONS are those of ``observe.py``.
The second run has another traffic than the observer's, seeded, and the engine's own warm-up in its longest form. It is
on a virtual GPU too, which loads the real cubins. One line of JSON is added to the results for each model.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from observe import ENGINE, machine, serve_command, shown, split

import cachebuilder
from cachebuilder.authoring.observe import engines, observe, program, traffic
from cachebuilder.authoring.observe.traffic import Request
from cachebuilder.cuda import gpus
from cachebuilder.restoring import miss_log
from cachebuilder.sweep.process import Compiler
from cachebuilder.virtual_gpu import library as virtual_gpu

SEED = 7


def other_traffic() -> list[list[Request]]:
    """Batches of random sizes, which the observer does not send."""
    numbers = random.Random(SEED)
    lengths = [[3], [77], [500, 1999], [5000]]
    lengths += [[numbers.randint(1, most) for _ in range(count)] for most, count in ((700, 12), (60, 40))]
    return [[Request(length, numbers.randint(2, 9), numbers.random() < 0.3) for length in batch] for batch in lengths]


def serve(command: Sequence[str], gpu: str, dir: Path, folder: Path) -> dict[str, Any]:
    """Run the engine's command from the cache in ``dir``; returns what was missed."""
    target = gpus.find(gpu)
    launch = engines.launch(command, os.environ, target)
    assert launch.server is not None
    setting = program.Setting(target, Compiler(dir / "nvcc", dir), folder, os.environ)
    exports = cli("env", dir, "--engine", ENGINE, "--format", "json")
    variables = program.environment(launch, setting) | json.loads(exports)
    own_warmup = {"VLLM_DEEP_GEMM_WARMUP": "full", "SGLANG_JIT_DEEPGEMM_PRECOMPILE": "1"}
    variables |= own_warmup | {"VIRTUAL_GPU_CHECK_CUBINS": "1"}
    (folder / "calls").mkdir()
    started = time.monotonic()
    with (folder / "log.txt").open("wb") as log:
        process = subprocess.Popen(launch.command, env=variables, stdout=log, stderr=log, start_new_session=True)
    try:
        while not traffic.is_up(launch.server):
            if process.poll() is not None:
                sys.exit((folder / "log.txt").read_text()[-3000:])
            time.sleep(0.5)
        up = time.monotonic()
        batches = other_traffic()
        traffic.send(launch.server, batches, lambda done, total: None)
    finally:
        os.killpg(process.pid, signal.SIGINT)
        process.wait(60)
    logs = miss_log.logs(dir, variables)
    unanswered = folder / virtual_gpu.UNANSWERED
    return {
        "up_seconds": round(up - started, 1),
        "served_seconds": round(time.monotonic() - up, 1),
        "requests": sum(map(len, batches)),
        "misses": sum(miss_log.tally(logs).requests.values()),
        "unanswered": unanswered.read_text().split() if unanswered.exists() else [],
    }


def cli(*arguments: Any) -> str:
    """Run cachebuilder's command line in a process of its own."""
    command = [sys.executable, "-m", "cachebuilder", *map(str, arguments)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def loop(folder: Path, layout: str, gpu: str, more: list[str]) -> dict[str, Any]:
    """The whole loop for one model."""
    command = serve_command(folder, layout, more)
    with TemporaryDirectory() as name:
        work = Path(name)
        observation = observe.observe(command, observe.Host(gpus.find(gpu), os.environ))
        (work / "m.yaml").write_text(observation.manifest)
        inputs = cachebuilder.load_manifest(work / "m.yaml", deep_gemm=observation.installation.path)
        built = cachebuilder.build(inputs, work / "a.tar.zst")
        cli("restore", work / "a.tar.zst", "--to", work / "dir", "--deep-gemm", observation.installation.path)
        (work / "run").mkdir()
        served = serve(command, gpu, work / "dir", work / "run")
    return {
        "model": folder.resolve().name,
        "layout": layout,
        "gpu": gpu,
        "command": shown(command, folder),
        "deep_gemm": str(observation.installation).split(", /")[0],
        "kernels": len(built.plan.kernels),
        "requested_while_observed": len(observation.requested),
    } | served


def main() -> None:
    own, more = split(sys.argv[1:])
    parser = argparse.ArgumentParser()
    parser.add_argument("--gpu", default="H200")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("models", nargs="+")
    arguments = parser.parse_args(own)
    for model in arguments.models:
        folder, _, layout = model.partition(":")
        row = loop(Path(folder), layout, arguments.gpu, more) | machine()
        with arguments.output.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row, indent=1), flush=True)


if __name__ == "__main__":
    main()
