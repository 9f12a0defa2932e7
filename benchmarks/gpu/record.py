"""Record what `verify --device cuda` wrote, and make the tables of the documentation from it.

    python benchmarks/gpu/record.py COMMIT [REPORT...]

Each REPORT (``*.verified.json``) becomes one file in benchmarks/results/gpu/, without the points that were right. The ops that
were compared with a reference go into benchmarks/gpu/entry-points.json, for docs/entry-points.md. The tables in docs/verify.md
are then made from all files in benchmarks/results/gpu/, with the rows of `faults.py`. No figure is typed by hand.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "gpu"
DOCS = ROOT / "docs" / "verify.md"
RUNS = ROOT / "benchmarks" / "gpu" / "entry-points.json"
BEGIN, END = "<!-- {}: benchmarks/gpu/record.py -->", "<!-- end of table -->"
#: What DeepGEMM's or the driver's error says, without the paths around it.
REASON = re.compile(
    "CUDA_ERROR_[A-Z_]+|Corrupted JIT cache directory|missing CUDA CUBIN|expected exactly one kernel|failed to close"
)


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


def served(outcome: dict[str, Any]) -> str:
    """How a serving process ended."""
    if "hung" in outcome:
        return "hangs"
    if outcome["exit"] == 0:
        return f"serves, {outcome['wrong']} wrong"
    if outcome["exit"] < 0:
        return f"crashes (signal {-outcome['exit']})"
    reason = REASON.search(" ".join(outcome["said"]))
    return f"`{reason[0]}`" if reason else f"exit code {outcome['exit']}"


def fault_table() -> str:
    """Each fault, a row: what DeepGEMM did, once or more often, and what the three verbs said."""
    found: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for line in (RESULTS / "faults.jsonl").read_text().splitlines():
        row = json.loads(line)
        found.setdefault(row["fault"], {}).setdefault(row["generation"], []).append(row)
    lines = ["| fault | legacy | DeepJIT | doctor | verify | run |", "|---|---|---|---|---|---|"]
    for fault, generations in found.items():
        cells = [fault]
        for generation in ("legacy", "deepjit"):
            outcomes = [row["serving"] for row in generations[generation] if "serving" in row]
            outcomes += [row["next"] for row in generations[generation] if "next" in row]
            said = [served(outcome) for outcome in outcomes]
            said += [
                f"`restore` refuses, {len(row['files_left'])} files left"
                for row in generations[generation]
                if "files_left" in row
            ]
            cells.append(", or ".join(dict.fromkeys(said)))
        looked = [row for rows in generations.values() for row in rows if "run" in row]
        cells.append(" / ".join({"damaged" if row["doctor"] else "whole" for row in looked}))
        for verb in ("verify", "run"):
            cells.append(" / ".join({"refuses" if row[verb]["exit"] else "accepts" for row in looked}))
        lines.append("| " + " | ".join(cell or "–" for cell in cells) + " |")
    return "\n".join(lines)


def put(name: str, lines: str) -> None:
    """Write a table between its markers."""
    begin = BEGIN.format(name)
    before, rest = DOCS.read_text().split(begin)
    DOCS.write_text(f"{before}{begin}\n{lines}\n{END}{rest.split(END, 1)[1]}")


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
    put("table", table())
    put("faults", fault_table())


if __name__ == "__main__":
    main()
