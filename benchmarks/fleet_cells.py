"""Plan a fleet of many cells: how many are equal, how many kernels they have in all, and how many different ones.

    python benchmarks/fleet_cells.py MODELS --legacy DEEP_GEMM [--store DIR] [--models NAME,...] [--gpus NAME,...]

MODELS is a folder with a folder for each model, which has a config.json. Each model is served by SGLang with the installed
DeepGEMM, and by vLLM with the legacy one at DEEP_GEMM, on each GPU. Cells that an engine's rules refuse are excluded and
counted. Prints one JSON object.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click

SERVING = {"tp4": {"tp": 4, "ep": 4, "max_tokens": 8192}}


def run(*arguments: object) -> str:
    command = [sys.executable, "-m", "cachebuilder", "fleet", *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.returncode)
    return done.stdout


@click.command()
@click.argument("models", type=click.Path(path_type=Path, exists=True))
@click.option("--legacy", type=click.Path(path_type=Path, exists=True), required=True)
@click.option("--store", type=click.Path(path_type=Path), default=None)
@click.option("--models", "chosen", default="")
@click.option("--gpus", default="H100,H200,H20,B200")
def main(models: Path, legacy: Path, store: Path | None, chosen: str, gpus: str) -> None:
    names = [name for name in chosen.split(",") if name] or sorted(
        path.parent.name for path in models.glob("*/config.json")
    )
    folder = Path(tempfile.mkdtemp())
    fleet = {
        "name": "cells",
        "store": str(store or folder / "store"),
        "models": {name: {"config": str((models / name).absolute())} for name in names},
        "gpus": gpus.split(","),
        "engines": {
            "sglang": {"engine": "sglang"},
            "vllm": {"engine": "vllm", "version": "0.25.0", "deep_gemm": str(legacy)},
        },
        "serving": SERVING,
    }
    path = folder / "fleet.yaml"
    path.write_text(json.dumps(fleet))  # JSON is YAML
    started = time.monotonic()
    status = json.loads(run("plan", path, "--json", "--price", "0.04"))
    seconds = time.monotonic() - started
    cells = status.pop("cells")
    merged = [cell for cell in cells if cell["equal_to"]]
    refused = [cell["name"] for cell in cells if cell["refusal"]]
    facts = {
        "cells": len(cells), "refused": refused, "merged": len(merged),
        "artifacts": len(cells) - len(merged) - len(refused), "kernels": status["kernels"], "distinct": status["distinct"],
        "share": round(1 - status["distinct"] / status["kernels"], 3), "left": status["left"], "seconds": round(seconds, 1),
    }  # fmt: skip
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
