"""Make the documentation's pictures and tables from the recorded results; no figure is typed by hand.

    PYTHONPATH=. python benchmarks/plot.py

Reads from benchmarks/results: compile.jsonl (machine by machine; each ``run`` line names its machine), gpu/warmup.jsonl,
sensitivity.jsonl, relaxed-vllm.jsonl, observe.jsonl, observe-flashinfer.jsonl, closed-loop.jsonl, recipes.jsonl,
warmup-*.json and restore-*.json. Writes docs/pictures/compile.svg, and the tables between the markers of
docs/explanation/speed.md, docs/explanation/virtual-gpu.md, docs/models.md, docs/recipes.md, docs/howto/observe.md,
docs/howto/flashinfer.md and README.md.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import altair as alt

from benchmarks.engines import recipes

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
SPEED = ROOT / "docs" / "explanation" / "speed.md"
VIRTUAL = ROOT / "docs" / "explanation" / "virtual-gpu.md"
MODELS = ROOT / "docs" / "models.md"
RECIPES = ROOT / "docs" / "recipes.md"
OBSERVE = ROOT / "docs" / "howto" / "observe.md"
FLASHINFER = ROOT / "docs" / "howto" / "flashinfer.md"
README = ROOT / "README.md"
PICTURE = ROOT / "docs" / "pictures" / "compile.svg"

Row = dict[str, Any]


def read(name: str) -> list[Row]:
    """Every measurement, with the fields of its run."""
    run: Row = {}
    found = []
    for line in (RESULTS / name).read_text().splitlines():
        row = json.loads(line)
        if row.get("what") == "run":
            run = {f"run_{key}": value for key, value in row.items()}
        else:
            found.append(run | row)
    return found


def put(page: Path, name: str, lines: Sequence[str]) -> None:
    """Write a table between its markers on a page."""
    begin, end = f"<!-- {name}: benchmarks/plot.py -->", "<!-- end -->"
    before, rest = page.read_text().split(begin)
    page.write_text(before + begin + "\n" + "\n".join(lines) + "\n" + end + rest.split(end, 1)[1])


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    return ["| " + " | ".join(map(str, row)) + " |" for row in (header, ["---"] * len(header), *rows)]


def compile_rows(rows: Sequence[Row]) -> list[str]:
    """Grouped and separate compilation, for each machine, manifest and number of jobs."""
    found: dict[tuple[str, str, int], dict[str, Row]] = {}
    for row in rows:
        if row["what"] == "compile":
            key = row["run_machine"], row["manifest"], row["kernels"], row["jobs"]
            found.setdefault(key, {})[row["way"]] = row
    lines = []
    for (machine, manifest, kernels, jobs), ways in found.items():
        grouped, separate = ways["grouped"], ways.get("separate", {})
        row = [machine, manifest, kernels, jobs, *(grouped[f"{what}_seconds"] for what in ("wall", "cpu", "limit"))]
        for what in ("wall", "cpu"):
            row.append(separate.get(f"{what}_seconds", ""))
        for what in ("cpu", "wall"):
            row.append(f"{separate[f'{what}_seconds'] / grouped[f'{what}_seconds']:.2f} ×" if separate else "")
        memory = grouped.get("peak_memory_mb")
        lines.append([*row, f"{memory / 1000:.1f} GB" if memory else ""])
    header = "machine,manifest,kernels,jobs,wall s,CPU s,CPU ÷ jobs s,separate: wall s,separate: CPU s,CPU ratio,wall ratio,memory"
    return table(header.split(","), lines)


def floor_rows(rows: Sequence[Row]) -> list[str]:
    """The most that sharing a front end can gain: one for each kernel, against none at all."""
    lines = []
    for row in rows:
        if row["what"] == "floor":
            head = row["front_end_cpu_seconds"] / row["front_ends"]
            own = row["llvm_cpu_seconds"] + row["ptxas_cpu_seconds"]
            most = (own + head * row["kernels"]) / own
            spent = [f"{head:.1f}", row["llvm_cpu_seconds"], row["ptxas_cpu_seconds"], f"{own / row['kernels']:.2f}"]
            lines.append([row["manifest"], row["kernels"], *spent, f"{most:.1f} ×"])
    header = "manifest,kernels,one front end s,LLVM s (all),ptxas s (all),own s a kernel,the most that sharing can gain"
    return table(header.split(","), lines)


def warmup_rows(rows: Sequence[Row]) -> list[str]:
    """DeepGEMM's own warm-up and ours, one row a run."""
    lines = []
    found: dict[str, Row] = {}
    for row in rows:
        found[row["what"] if row["what"] != "build" else row["way"]] = row
        if row["what"] == "ratios":
            built, cold, cached = found["grouped"], found["cold"], found["cached"]
            ran = [row["run_manifest"], f"{row['run_deep_gemm']} ({row['run_generation']})", cold["kernels"]]
            parts = [built["plan_seconds"], built["compile_seconds"]]
            ours = [
                " + ".join(f"{seconds:.1f}" for seconds in parts),
                built["wall_seconds"],
                found["restore"]["seconds"],
            ]
            again = f"{cached['seconds']} ({cached['misses']} missed)"
            ratios = [sum(parts), built["wall_seconds"], cached["seconds"]]
            lines.append([*ran, cold["seconds"], *ours, again, *(f"{cold['seconds'] / each:.1f} ×" for each in ratios)])
            found = {}
    header = (
        "manifest,DeepGEMM,kernels,cold warm-up s,plan + compile s,whole build s,restore s,warm-up on the cache s,"
        "cold ÷ (plan + compile),cold ÷ build,cold ÷ warm-up on the cache"
    )
    return table(header.split(","), lines)


def sensitivity_rows(rows: Sequence[Row]) -> list[str]:
    """For each property and manifest: the values that leave the plan as it is, that change it, and that are refused."""
    lines = []
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if "property" in row:
            groups.setdefault((row["property"], row["manifest"]), []).append(row)
    for (name, manifest), tried in groups.items():
        same = [row["value"] for row in tried if row.get("other") == 0 and row.get("gone") == 0]
        other = [row["value"] for row in tried if row.get("other") or row.get("gone")]
        refused = [row["value"] for row in tried if "refused" in row]
        lines.append((f"`{name}`", manifest, *(shown(name, values) for values in (same, other, refused))))
    return table(("property", "manifest", "same plan at", "another plan at", "refused at"), lines)


def shown(name: str, values: Sequence[int]) -> str:
    unit, scale = {
        "l2_bytes": (" MiB", 1 << 20),
        "shared_memory_bytes": (" KiB", 1 << 10),
        "clock_khz": (" MHz", 1000),
    }.get(name, ("", 1))
    return ", ".join(str(value // scale) for value in values) + (unit if values else "–")


def readme_rows(compiled: Sequence[Row], warmed: Sequence[Row]) -> list[str]:
    """The README's table: one manifest, DeepGEMM's warm-up against each of our steps."""
    ratios = {
        row["run_generation"]: row for row in warmed if row["what"] == "ratios" and row["run_manifest"] == "eighty-one"
    }
    by_way = {row["way"]: row for row in warmed if row["what"] == "build" and row["run_manifest"] == "eighty-one"}
    cold = next(row for row in warmed if row["what"] == "cold" and row["run_manifest"] == "eighty-one")
    cached = next(row for row in warmed if row["what"] == "cached" and row["run_manifest"] == "eighty-one")
    restore = next(row for row in warmed if row["what"] == "restore" and row["run_manifest"] == "eighty-one")
    built, ratio = by_way["grouped"], next(iter(ratios.values()))
    cores = f"{built['run_gpu']}, {built['run_cores']} cores"
    rows = [
        ("DeepGEMM's own warm-up, cold", f"{cold['kernels']} kernels, one after the other", f"{cold['seconds']:.0f} s", ""),
        ("`cachebuilder build`, whole", "importing torch, plan, compile, pack", f"{built['wall_seconds']:.1f} s", f"{ratio['cold_to_build']} ×"),
        ("`cachebuilder restore`", "checked, into an image", f"{restore['seconds']} s", f"{ratio['cold_to_restore']:.0f} ×"),
        ("the warm-up on the restored cache", f"{cached['misses']} missed", f"{cached['seconds']} s", f"{ratio['cold_to_cached']:.0f} ×"),
    ]  # fmt: skip
    return table((cores, "", "seconds", "speed-up"), rows)


def picture(rows: Sequence[Row]) -> alt.Chart:
    """Wall time against the number of kernels and of compilers at once, with the lower limit."""
    runs = [
        row for row in rows if row["what"] == "compile" and row["way"] == "grouped" and row["manifest"] == "eighty-one"
    ]
    most = max(row["jobs"] for row in runs)
    everything = max(row["kernels"] for row in runs)
    by_kernels = [row for row in runs if row["jobs"] == most]
    by_jobs = [row for row in runs if row["kernels"] == everything]
    return alt.hconcat(
        _curve(by_kernels, "kernels", f"kernels, on {most} compilers at once"),
        _curve(by_jobs, "jobs", f"compilers at once, {everything} kernels"),
    ).configure_view(stroke=None)


def _curve(rows: Sequence[Row], field: str, title: str) -> alt.LayerChart:
    values = [
        {field: row[field], "seconds": row[f"{what}_seconds"], "what": text}
        for row in rows
        for what, text in (("wall", "measured"), ("limit", "all CPU ÷ compilers"))
    ]
    base = alt.Chart(alt.Data(values=values), width=300, height=220).encode(
        x=alt.X(f"{field}:Q", title=title, scale=alt.Scale(type="log", base=2, nice=False, padding=12)),
        y=alt.Y("seconds:Q", title="wall seconds", scale=alt.Scale(zero=True)),
        color=alt.Color(
            "what:N", title=None, scale=alt.Scale(range=["#b2b2b2", "#1f77b4"]), legend=alt.Legend(orient="top")
        ),
    )
    return base.mark_line() + base.mark_point(filled=True, size=45)


def engine_rows() -> list[str]:
    """Engines' own warm-ups on our caches, one file each."""
    lines = []
    for file in sorted(RESULTS.glob("warmup-*.json")):
        row = json.loads(file.read_text())
        given = dict(zip(row["command"][2::2], row["command"][3::2], strict=False))
        model = f"{row['command'][1]} --tp {given['--tp']}" + (f" --ep {given['--ep']}" if "--ep" in given else "")
        model += f", {given['--max-num-batched-tokens']} tokens"
        for mode, found in row["modes"].items():
            if "calls" in found:
                what = f"{found['calls']['dense']} dense, {found['calls']['grouped']} grouped calls"
            else:
                what = f"{found['shapes']} shapes × {found['list'][0]} M up to {found['list'][1]}"
            engine, gpu = f"{found['engine']}, torch {found['torch']}", found["gpu"].removeprefix("virtual ")
            lines.append((engine, model, gpu, mode, what, row["kernels"], len(found["misses"])))
    header = ("engine", "model", "GPU", "mode", "the engine's calls", "kernels in the cache", "misses")
    return table(header, lines)


def restore_rows() -> list[str]:
    """A restore and tar, one file each."""
    lines = []
    for file in sorted(RESULTS.glob("restore-*.json")):
        row = json.loads(file.read_text())
        what = file.stem.removeprefix("restore-1000-").replace("-", ", ")
        times = [
            f"{row[way]['seconds']:.2f} ({row[way]['cpu_seconds']:.2f})"
            for way in ("restore", "tar", "smallest", "restore_again")
        ]
        ratio = row["restore_to_tar"]
        lines.append((what, row["kernels"], *times, f"{ratio['seconds']:.2f} × ({ratio['cpu_seconds']:.2f} ×)"))
    header = (
        "cache, file system",
        "kernels",
        "restore s (CPU)",
        "tar s (CPU)",
        "smallest s (CPU)",
        "restore again s (CPU)",
        "restore ÷ tar (CPU)",
    )
    return table(header, lines)


def missed_rows(rows: Sequence[Row]) -> list[str]:
    """Kernels that vLLM's relaxed list misses."""
    lines = [
        (row["model"], f"{row['tp']}, {row['ep']}", row["gpu"], row["kernels"], row["missed"], row["reached"])
        for row in rows
    ]
    return table(("model", "tp, ep", "GPU", "kernels", "missed", "reached"), lines)


def observed_rows(rows: Sequence[Row]) -> list[str]:
    """Observed engines, a row a run; what differs from the expected shapes, or why the engine did not start."""
    lines = []
    for row in rows:
        layers = re.search(r'"(?:num_hidden_)?layers": (\d+)', " ".join(row["command"]))
        model = row["model"] + (f" ({layers[1]} layers)" if layers else "")
        first = [row["engine"], model, row["layout"], row["gpu"]]
        spent = [row.get("seconds", row["whole_seconds"]), row["cpu_seconds"], row["memory_gb"]]
        if "error" in row:
            reasons = re.findall(r"\w+Error: .+|.*does not answer .+", row["error"])
            reason = (row.get("refused_as_expected") or reasons or [row["error"]])[0]
            lines.append([*first, *spent, "", "", "", "", f"not served: {reason[:150]}"])
            continue
        differences = [f"missing {_shape(shape)}" for shape in row.get("missing", [])]
        differences += [f"also {_shape(shape)}" for shape in row.get("extra", [])]
        told = "; ".join(differences) or ("equal" if "missing" in row else "–")
        kernels = f"{row['kernels_requested']}, {row['kernels_planned']}, {row['sources']}"
        lines.append([*first, *spent, row["calls"], row["call_sites"], row["ops"], kernels, told])
    header = (
        "engine", "model", "layout", "GPU", "seconds", "CPU seconds", "memory, GB", "calls", "call sites", "ops",
        "kernels asked for, planned, sources", "against the expected shapes",
    )  # fmt: skip
    return table(header, lines)


def closed_loop_rows(rows: Sequence[Row]) -> list[str]:
    """Engines that were observed, and run again from the cache that was built of it."""
    lines = [
        (
            row["engine"], row["deep_gemm"].split(" (")[0], row["model"], row["layout"], row["gpu"], row["kernels"],
            row["requests"], row["misses"],
        )
        for row in rows
    ]  # fmt: skip
    header = ("engine", "DeepGEMM", "model", "layout", "GPU", "kernels in the cache", "requests", "misses")
    return table(header, lines)


def flashinfer_rows(rows: Sequence[Row]) -> list[str]:
    """What observed engines take from FlashInfer."""
    lines = []
    for row in rows:
        needs = row["flashinfer"]
        modules = [f"`{name}`" for name in needs.get("modules", [])]
        gemms = needs.get("gemms", [])
        shapes = f"{len(gemms)} shapes, M up to {max(gemm['max_m'] for gemm in gemms)}" if gemms else "–"
        lines.append((row["engine"], row["model"], row["layout"], row["gpu"], ", ".join(modules) or "–", shapes))
    return table(("engine", "model", "layout", "GPU", "modules", "`fp8_blockscale_gemm_90`"), lines)


def _shape(shape: Sequence[Any]) -> str:
    """Of a GEMM: ``[op, experts, n, k, …]``."""
    op, experts, n, k = shape[:4]
    return f"`{op}` {f'{experts} × ' if experts else ''}({n}, {k})"


def main() -> None:
    compiled, warmed = read("compile.jsonl"), read("gpu/warmup.jsonl")
    picture(compiled).save(PICTURE)
    put(SPEED, "compile", compile_rows(compiled))
    put(SPEED, "floor", floor_rows(compiled))
    put(SPEED, "warm-up", warmup_rows(warmed))
    put(SPEED, "restore", restore_rows())
    put(VIRTUAL, "sensitivity", sensitivity_rows(read("sensitivity.jsonl")))
    put(MODELS, "engines", engine_rows())
    put(MODELS, "missed", missed_rows(read("relaxed-vllm.jsonl")))
    judged = list(recipes.judged())
    put(RECIPES, "recipes", recipes.table(judged))
    put(RECIPES, "recipe-layouts", recipes.layouts_table(judged))
    put(OBSERVE, "observed", observed_rows(read("observe.jsonl")))
    put(OBSERVE, "closed-loop", closed_loop_rows(read("closed-loop.jsonl")))
    put(FLASHINFER, "flashinfer", flashinfer_rows(read("observe-flashinfer.jsonl")))
    put(README, "warm-up", readme_rows(compiled, warmed))


if __name__ == "__main__":
    main()
