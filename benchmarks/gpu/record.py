"""Record what `verify --device cuda` wrote, and make the docs' table of it.

    python benchmarks/gpu/record.py COMMIT [REPORT...]

Each REPORT (``*.verified.json``) becomes one file in benchmarks/results/gpu/, without the points that were all right; the
ops that were compared with a reference are noted in benchmarks/gpu/entry-points.json for docs/entry-points.md. The table
in docs/verify.md is made anew from all files in benchmarks/results/gpu/, so no figure is typed by hand.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "gpu"
DOCS = ROOT / "docs" / "verify.md"
RUNS = ROOT / "benchmarks" / "gpu" / "entry-points.json"
BEGIN, END = "<!-- table: benchmarks/gpu/record.py -->", "<!-- end of table -->"


def summary(report: dict[str, Any], name: str, commit: str) -> dict[str, Any]:
    """What one report says, in short."""
    trials = [trial for replay in report["replays"] for trial in replay["trials"]]
    compared = [trial for trial in trials if trial["relative_error"] is not None]
    wrong = [trial for trial in trials if trial["problems"]]
    worst = max(compared, key=lambda trial: trial["relative_error"])
    return {
        "name": name,
        "command": "cachebuilder verify ARTIFACT --device cuda --deep-gemm COPY",
        "commit": commit,
        "artifact_sha256": report["artifact"]["sha256"],
        "device": report["device"],
        "torch": report["torch"],
        "deep_gemm": report["deep_gemm"],
        "calls": sum(replay["calls"] for replay in report["replays"]),
        "missed": sum(len(replay["missed"]) for replay in report["replays"]),
        "refused": sum(len(replay["refusals"]) for replay in report["replays"]),
        "kernels": len({kernel for trial in trials for kernel in trial["kernels"]}),
        "points": len(trials),
        "compared": len(compared),
        "wrong": len(wrong),
        "problems": [f"{trial['op']} {trial['shape']} at {trial['value']}: {trial['problems']}" for trial in wrong],
        "worst": {key: worst[key] for key in ("op", "shape", "variable", "value", "relative_error", "worst_row_error")},
        "ops_compared": sorted({trial["op"] for trial in compared} - {trial["op"] for trial in wrong}),
    }


def table() -> str:
    """All results, a row each."""
    lines = [
        "| manifest | DeepGEMM | GPU | calls | missed | kernels | points | wrong | worst error |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for path in sorted(RESULTS.glob("*.json")):
        found = json.loads(path.read_text())
        error = f"{found['worst']['relative_error']:.2e}"
        row = (found["name"], found["deep_gemm"], found["device"]["name"], found["calls"], found["missed"])
        row += (found["kernels"], found["points"], found["wrong"], error)
        lines.append("| " + " | ".join(map(str, row)) + " |")
    return "\n".join(lines)


def main() -> None:
    commit, *reports = sys.argv[1:]
    RESULTS.mkdir(parents=True, exist_ok=True)
    runs = json.loads(RUNS.read_text())
    for report in map(Path, reports):
        name = report.name.removesuffix(".tar.zst.verified.json")
        found = summary(json.loads(report.read_text()), name, commit)
        (RESULTS / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")
        pair = "sm90 legacy" if found["deep_gemm"].startswith(("0.1.", "2.5")) else "sm90 deepjit"
        runs[pair] = sorted({*runs[pair], *found["ops_compared"]})
    RUNS.write_text(json.dumps(runs, indent=1) + "\n")
    before, rest = DOCS.read_text().split(BEGIN)
    DOCS.write_text(f"{before}{BEGIN}\n{table()}\n{END}{rest.split(END)[1]}")


if __name__ == "__main__":
    main()
