"""Grouped against separate compilation of one manifest's kernels, in one run, no store.

    python benchmarks/compile.py [MANIFEST] [--kernels N ...] [--jobs N ...] [--separate]

For each count of kernels and of jobs: wall and CPU seconds, the limit (CPU ÷ jobs), the largest process's memory.
``--separate`` adds the one-by-one way and the ratios. Prints one JSON object a measurement.
"""

from __future__ import annotations

import json
import random
import resource
from pathlib import Path

import click

from cachebuilder import build as building
from cachebuilder import compile as compiling
from cachebuilder import plan as planning
from cachebuilder.store import NoStore

DEFAULT = Path(__file__).parents[1] / "manifests" / "deepseek-v3-tp8-h200.yaml"


@click.command()
@click.argument("manifest", type=click.Path(path_type=Path), default=DEFAULT)
@click.option("--kernels", multiple=True, type=int, help="Random kernels of the plan; default: all.")
@click.option("--jobs", multiple=True, type=int, help="Default: all cores.")
@click.option("--separate", is_flag=True)
@click.option("--deep-gemm", type=click.Path(path_type=Path))
def main(
    manifest: Path, kernels: tuple[int, ...], jobs: tuple[int, ...], separate: bool, deep_gemm: Path | None
) -> None:
    inputs = building.find_inputs(manifest, deep_gemm=deep_gemm)
    plan = planning.make(inputs.manifest, inputs.installation, inputs.toolchain)
    for count in kernels or (len(plan.kernels),):
        chosen = random.Random(count).sample(plan.kernels, min(count, len(plan.kernels)))
        for job_count in jobs or (compiling.available_cores(),):
            found = {}
            for grouped in (True, False) if separate else (True,):
                cubins, report = compiling.compile_all(
                    chosen, inputs.toolchain, inputs.installation, NoStore(), job_count, grouped=grouped
                )
                found[grouped] = (cubins, report)
                figures = {
                    "manifest": manifest.stem,
                    "way": "grouped" if grouped else "separate",
                    "kernels": len(chosen),
                    "jobs": job_count,
                    "wall_seconds": round(report.wall_seconds, 1),
                    "cpu_seconds": round(report.cpu_seconds, 1),
                    "limit_seconds": round(report.cpu_seconds / job_count, 1),
                    "largest_process_mb": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1000,
                }
                print(json.dumps(figures), flush=True)
            if separate:
                (ours, grouped_report), (own, separate_report) = found[True], found[False]
                ratios = {
                    "cpu_ratio": round(separate_report.cpu_seconds / grouped_report.cpu_seconds, 2),
                    "wall_ratio": round(separate_report.wall_seconds / grouped_report.wall_seconds, 2),
                    "equal_bytes": ours == own,
                }
                print(json.dumps(ratios), flush=True)


if __name__ == "__main__":
    main()
