"""The table of block-FP8 recipes that people serve: what the rules say of each, held against the engines' own runs.

    python benchmarks/engines/recipes.py              print the table
    python benchmarks/engines/recipes.py --layouts    a line for each recipe, engine and layout

`RECIPES` has each recipe of a book, the checkpoint that it serves, and the parallel layouts of its serve commands on
eight H200. `RUNS` has what each engine asked DeepGEMM for when it was run whole on the virtual GPU with that checkpoint's
config and layout (``benchmarks/observe.py --rules``), fewer layers, but one of each kind. A recipe names the release
that was run: the newest one where the oldest has no class for the model.

Verdicts on a layout:
    exact: the manifest has just the shapes of GEMMs that the engine asked for, and all the kernels of its run.
    refused rightly: the rules refuse, and the engine does not serve it, or not with DeepGEMM.
    not read: no rule reads the model or a field of it, and the manifest is refused for that.
    refused wrongly: the rules refuse for another reason, and the engine serves it.
    surplus, incomplete: the manifest has shapes beyond the engine's, or lacks some.
    not judged: the engine was not run with this; what the rules say stands behind it.

A recipe has the worst verdict of those of its layouts that were judged.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.engines.cases import expanded
from cachebuilder.authoring.derive.config import Config
from cachebuilder.authoring.derive.derive import derive
from cachebuilder.authoring.derive.manifest import Deployment
from cachebuilder.errors import ModelError

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "tests/data/recipes.json"
RUNS = ROOT / "benchmarks/results/recipes.jsonl"

#: From the best to the worst.
VERDICTS = ("exact", "refused rightly", "not read", "not judged", "surplus", "refused wrongly", "incomplete")

#: Fields with the number of draft layers.
DRAFTS = ("num_nextn_predict_layers", "mtp_num_hidden_layers")

Shape = tuple[str, int | None, int, int]  # function, experts, N, K


@dataclass(frozen=True)
class Judged:
    """The verdict on one layout of a recipe, and what it rests on."""

    book: str
    recipe: str
    model: str
    engine: str
    layout: str
    verdict: str
    why: str = ""


def rules_shapes(config: dict[str, Any], engine: str, layout: str) -> set[Shape]:
    """The GEMMs of the rules' manifest. Raises ModelError where it is refused."""
    name, release = engine.split()
    sizes = {option: int(size) for option, size in re.findall(r"(tp|ep|dp)(\d+)", layout)}
    serving = Deployment(engine=name, engine_version=release, gpu="H200", **sizes).serving()  # type: ignore[arg-type]
    derived = derive(Config.of(expanded(config), Path("config.json")), serving)
    if derived.unread:
        raise ModelError(f"no rule reads {', '.join(derived.unread)}")
    ops = [item.op.model_dump() for item in derived.ops]
    return {(op["op"], op.get("experts"), op["n"], op["k"]) for op in ops if "gemm" in op["op"] and "k" in op}


def without_drafts(config: dict[str, Any]) -> dict[str, Any]:
    """The config with no layers of multi-token prediction."""
    text = config.get("text_config", config)
    fields = {name: 0 if name in DRAFTS else value for name, value in text.items() if not name.startswith("dspark_")}
    return {**config, "text_config": fields} if "text_config" in config else fields


def verdict(config: dict[str, Any] | None, engine: str, layout: str, run: dict[str, Any] | None) -> tuple[str, str]:
    """The verdict on a layout, given the engine's run, and the reason."""
    if config is None:
        return "not judged", "no copy of its config was found"
    try:
        shapes = rules_shapes(config, engine, layout)
    except ModelError as error:
        reason = str(error).removeprefix("config.json: ")
        if reason.startswith("no rule"):
            return "not read", reason
        if run is None:
            return "not judged", f"the rules refuse: {reason}"
        return ("refused wrongly" if "shapes" in run else "refused rightly"), reason
    if run is None:
        return "not judged", f"the rules: {len(shapes)} shapes"
    if "shapes" not in run:
        return "surplus", f"the engine does not serve it: {run['refuses']}"
    asked: set[Shape] = {(name, experts, n, k) for name, experts, n, k in run["shapes"]}
    if missing := asked - shapes:
        return "incomplete", f"missing {sorted(missing, key=str)}"
    if run["lack"]:
        return "incomplete", f"{run['lack']} kernels of the run are missing"
    decoder = rules_shapes(without_drafts(config), engine, layout)  # the runs have no draft layers
    surplus = {shape for shape in decoder if not shape[0].endswith("masked")} - asked
    return ("surplus", f"surplus {sorted(surplus, key=str)}") if surplus else ("exact", "")


def judged() -> Iterator[Judged]:
    """All layouts of all recipes."""
    recorded = json.loads(RECIPES.read_text())
    runs_as = {model: entry.get("runs_as", model) for model, entry in recorded["models"].items()}
    runs = {(runs_as[run["model"]], run["engine"], run["layout"]): run for run in map(json.loads, RUNS.open())}
    for entry in recorded["recipes"]:
        name = runs_as[entry["model"]]
        config = recorded["models"][name]["config"]
        for layout in entry["layouts"]:
            run = runs.get((name, entry["engine"], layout))
            word, why = verdict(config, entry["engine"], layout, run)
            yield Judged(entry["book"], entry["recipe"], entry["model"], entry["engine"], layout, word, why)


def of_recipes(lines: list[Judged]) -> dict[tuple[str, str], dict[str, list[Judged]]]:
    """(book, engine with its releases) → recipe → its layouts."""
    releases: dict[str, set[str]] = {}
    for line in lines:
        name, release = line.engine.split()
        releases.setdefault(name, set()).add(release)
    books: dict[tuple[str, str], dict[str, list[Judged]]] = {}
    for line in lines:
        name = line.engine.split()[0]
        engine = f"{name} {', '.join(sorted(releases[name]))}"
        books.setdefault((line.book, engine), {}).setdefault(f"{line.recipe} ({line.model})", []).append(line)
    return books


def of_one(lines: list[Judged]) -> str:
    """A recipe's verdict: the worst of the judged layouts'; `not judged` where no layout was."""
    words = [line.verdict for line in lines if line.verdict != "not judged"]
    return max(words, key=VERDICTS.index) if words else "not judged"


def table(lines: list[Judged]) -> list[str]:
    """The counts as Markdown: a row for each book and engine, of recipes and of layouts."""
    rows = [f"| book | engine | of | all | {' | '.join(VERDICTS)} |", f"|{' --- |' * (4 + len(VERDICTS))}"]
    for (book, engine), recipes in of_recipes(lines).items():
        layouts = [line.verdict for own in recipes.values() for line in own]
        for of, words in (("recipes", [of_one(own) for own in recipes.values()]), ("layouts", layouts)):
            counts = Counter(words)
            rows.append(f"| {book} | {engine} | {of} | {len(words)} | {' | '.join(str(counts[w]) for w in VERDICTS)} |")
    return rows


def layouts_table(lines: list[Judged]) -> list[str]:
    """Each checkpoint with its layouts under their verdicts, as Markdown."""
    words = [word for word in VERDICTS if any(line.verdict == word for line in lines)]
    rows = [f"| engine | checkpoint | {' | '.join(words)} |", f"|{' --- |' * (2 + len(words))}"]
    for found in of_recipes(lines).values():
        for own in found.values():
            cells = [", ".join(line.layout for line in own if line.verdict == word) for word in words]
            rows.append(f"| {own[0].engine} | {own[0].model} | {' | '.join(cells)} |")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layouts", action="store_true", help="a line for each recipe, engine and layout")
    options = parser.parse_args()
    lines = list(judged())
    if options.layouts:
        for line in lines:
            print(f"{line.engine:14} {line.model:44} {line.layout:12} {line.verdict:16} {line.why}".rstrip())
        print()
    print("\n".join(table(lines)))


if __name__ == "__main__":
    main()
