"""Check manifests on the target GPU: build with the GPU's confirmation, restore, and verify every kernel's results.

    python benchmarks/gpu/truth.py OUT MANIFEST... [--deep-gemm FOLDER]...

For each copy of DeepGEMM and each manifest, this runs the commands that a person would run: ``build --device cuda`` without the
store (the GPU must ask for exactly the planned kernels, and every call is served from the finished artifact), ``restore``,
and ``verify --device cuda``. Writes one JSON object for each step to OUT/truth.jsonl, and the reports of `verify` beside it.
The exit code is 1 if any step failed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import click


def run(out: Path, *command: str | Path) -> tuple[subprocess.CompletedProcess[str], float]:
    """Run cachebuilder in ``out``, so that what it prints of its files names no folder of this machine."""
    started = time.monotonic()
    words = [sys.executable, "-m", "cachebuilder", *map(str, command)]
    done = subprocess.run(words, cwd=out, capture_output=True, text=True)
    return done, round(time.monotonic() - started, 2)


@click.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.argument("manifests", nargs=-1, type=click.Path(path_type=Path), required=True)
@click.option("--deep-gemm", multiple=True, required=True, type=click.Path(path_type=Path))
def main(out: Path, manifests: tuple[Path, ...], deep_gemm: tuple[Path, ...]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    failed: list[object] = []
    with (out / "truth.jsonl").open("a") as log:

        def say(**figures: object) -> None:
            if figures.get("exit"):
                failed.append(figures["what"])
            line = json.dumps(figures)
            print(line, flush=True)
            log.write(line + "\n")
            log.flush()

        say(step="machine", cores=len(os.sched_getaffinity(0)))
        for copy in deep_gemm:
            for manifest in manifests:
                name = f"{manifest.stem}-{copy.parent.name}"
                artifact = f"{name}.tar.zst"
                copied = ["--deep-gemm", copy.absolute()]
                done, seconds = run(
                    out, "build", manifest.absolute(), *copied, "--device", "cuda", "--no-store", "-o", artifact
                )
                text = done.stdout if done.returncode == 0 else done.stderr[-1500:]
                say(step="build", what=name, seconds=seconds, exit=done.returncode, said=text.splitlines()[-8:])
                if done.returncode:
                    continue
                done, seconds = run(out, "restore", artifact, "--to", f"{name}-restored", *copied)
                say(
                    step="restore", what=name, seconds=seconds, exit=done.returncode, said=done.stderr.splitlines()[-2:]
                )
                done, seconds = run(out, "verify", artifact, *copied, "--device", "cuda")
                text = done.stdout + done.stderr[-1500:] if done.returncode else done.stdout
                say(step="verify", what=name, seconds=seconds, exit=done.returncode, said=text.splitlines()[-8:])
    if failed:
        sys.exit(f"failed: {', '.join(map(str, failed))}")


if __name__ == "__main__":
    main()
