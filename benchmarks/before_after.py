"""Compare two checkouts on this machine: the plan and the whole build of a manifest, in turn, medians of several runs.

    python benchmarks/before_after.py MANIFEST --before FOLDER [--after FOLDER] [--deep-gemm FOLDER] [--runs 5]
                                      [--cores N] [--only plan|build] [--memory] >> benchmarks/results/before-after.jsonl

FOLDER is a checkout of this repository (``git worktree add FOLDER COMMIT``); left out, ``--after`` is this one. Each run is a
process of its own, which takes nothing from a store. Plans must be equal except for their peak memory, and artifacts must be
equal; otherwise the exit code is 1. With ``--memory``, one further run of each samples the proportional memory (PSS) of all
its processes together every 0.2 s; that run is not timed. Prints one JSON object for each run and a last one with medians
and ratios (before ÷ after).
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click

#: Runs in each checkout, so it uses only what both have.
RUN = """
import hashlib, json, os, resource, sys, time
from pathlib import Path
what, manifest, deep_gemm, output, cores = sys.argv[1:]
if int(cores):
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: int(cores)])
from cachebuilder import building
from cachebuilder.compiling.compiler import CompileOptions
from cachebuilder.manifest.inputs import load_manifest
inputs = load_manifest(Path(manifest), deep_gemm=Path(deep_gemm) if deep_gemm else None)
started = time.monotonic()
if what == "plan":
    plan, more = building.plan(inputs, reuse=False), {}
else:
    built = building.build(inputs, output, options=CompileOptions(use_store=False))
    plan = built.plan
    more = dict(plan_seconds=built.plan_seconds, compile_seconds=built.compiled.wall_seconds,
                pack_seconds=built.pack_seconds, compile_cpu_seconds=built.compiled.cpu_seconds,
                sha256=built.packed.sha256)
seconds = time.monotonic() - started
usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
text = json.dumps({k: v for k, v in plan.model_dump(mode="json").items() if k != "peak_bytes"}, sort_keys=True)
print(json.dumps(dict(seconds=seconds, cpu_seconds=sum(u.ru_utime + u.ru_stime for u in usage), kernels=len(plan.kernels),
                      calls=plan.calls, peak_bytes=plan.peak_bytes, plan=hashlib.sha256(text.encode()).hexdigest(), **more)))
"""
#: Of these, the last line gives the median and the ratio.
TIMES = ("seconds", "cpu_seconds", "plan_seconds", "compile_seconds", "pack_seconds", "compile_cpu_seconds")


def say(what: str, **figures: object) -> None:
    print(json.dumps({"what": what} | figures), flush=True)


def tree(process: int) -> list[int]:
    """A process and all that descend from it."""
    found = [process]
    for each in found:
        with contextlib.suppress(OSError):
            for thread in Path(f"/proc/{each}/task").iterdir():
                found += map(int, (thread / "children").read_text().split())
    return found


def proportional_memory(process: int) -> int:
    """Bytes of memory of a process and its descendants; what some of them share counts once."""
    kilobytes = 0
    for each in tree(process):
        with contextlib.suppress(OSError, AttributeError):
            text = Path(f"/proc/{each}/smaps_rollup").read_text()
            kilobytes += int(re.search(r"^Pss: +(\d+) kB", text, re.MULTILINE)[1])  # type: ignore[index]
    return kilobytes * 1024


def run(checkout: Path, arguments: list[str], memory: bool = False) -> dict[str, Any]:
    environment = os.environ | {"PYTHONPATH": str(checkout), "PYTHONDONTWRITEBYTECODE": ""}
    command = [sys.executable, "-P", "-c", RUN, *arguments]
    with subprocess.Popen(command, env=environment, cwd=checkout, stdout=subprocess.PIPE, text=True) as process:
        most = 0
        while memory and process.poll() is None:
            most = max(most, proportional_memory(process.pid))
            time.sleep(0.2)
        text, _ = process.communicate()
    if process.returncode:
        sys.exit(f"{checkout}: {arguments[0]} ended with {process.returncode}")
    return json.loads(text.splitlines()[-1]) | ({"tree_peak_bytes": most} if memory else {})


def rounded(figures: dict[str, Any]) -> dict[str, Any]:
    return {name: round(value, 3) if isinstance(value, float) else value for name, value in figures.items()}


@click.command()
@click.argument("manifest", type=click.Path(path_type=Path, exists=True))
@click.option("--before", type=click.Path(path_type=Path, exists=True), required=True)
@click.option("--after", type=click.Path(path_type=Path, exists=True), default=Path(__file__).parents[1])
@click.option("--deep-gemm", type=click.Path(path_type=Path, exists=True))
@click.option("--runs", default=5)
@click.option("--cores", default=0, help="use only so many of the cores")
@click.option("--only", type=click.Choice(["plan", "build"]))
@click.option("--memory", is_flag=True)
def main(
    manifest: Path, before: Path, after: Path, deep_gemm: Path | None, runs: int, cores: int, only: str, memory: bool
) -> None:
    checkouts = {"before": before.resolve(), "after": after.resolve()}
    equal = True
    with tempfile.TemporaryDirectory() as folder:
        os.environ["CACHEBUILDER_CACHE_DIR"] = f"{folder}/cache"
        for what in [only] if only else ["plan", "build"]:
            output = f"{folder}/artifact.tar.zst"
            copy = str(deep_gemm.resolve()) if deep_gemm else ""
            arguments = [what, str(manifest.resolve()), copy, output, str(cores)]
            for checkout in checkouts.values():
                run(checkout, ["plan", *arguments[1:]])  # so that files are in memory and our C libraries compiled
            figures: dict[str, list[dict[str, Any]]] = {way: [] for way in checkouts}
            for number in range(runs):
                for way in sorted(checkouts, reverse=number % 2 == 0):  # before first, then after first
                    figures[way].append(run(checkouts[way], arguments))
                    say(what, way=way, manifest=manifest.stem, **rounded(figures[way][-1]))
            if memory:
                for way, checkout in checkouts.items():
                    figures[way].append(run(checkout, arguments, memory=True))
                    say(f"{what}, memory", way=way, manifest=manifest.stem, **rounded(figures[way][-1]))
            every = [one for way in figures.values() for one in way]
            same = len({(one["plan"], one.get("sha256")) for one in every}) == 1
            equal = equal and same
            medians = {
                way: {
                    name: statistics.median(one[name] for one in figures[way][:runs])
                    for name in TIMES
                    if name in figures[way][0]
                }
                for way in checkouts
            }
            say(
                f"{what}, medians",
                manifest=manifest.stem,
                cores=cores or len(os.sched_getaffinity(0)),
                runs=runs,
                equal=same,
                before=rounded(medians["before"]),
                after=rounded(medians["after"]),
                before_to_after={
                    name: round(medians["before"][name] / value, 3) for name, value in medians["after"].items() if value
                },
                plan_peak_bytes={way: max(one["peak_bytes"] for one in figures[way]) for way in checkouts},
            )
    if not equal:
        sys.exit("plans or artifacts differ")


if __name__ == "__main__":
    main()
