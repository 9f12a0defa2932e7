"""Compare the rules of `cachebuilder manifest --model` with what the engines' own model classes answered.

    python benchmarks/engines/cases.py                     the answers recorded in tests/data/engine_shapes.json
    python benchmarks/engines/cases.py FOLDER              a folder of cases
    python benchmarks/engines/cases.py FOLDER --record     a folder of cases, whose answers are then recorded

FOLDER holds ``NAME/config.json`` and ``NAME/expected.json``, whose keys are ``ENGINE-tpN[-epN][-dpN]``, with ``-CLASS``
behind them for a draft model alone. Prints a line for each layout and engine release, with what differs, and a table of
the verdicts. Ends with 1 where a manifest lacks or has more than the engine's shapes, or is refused where the engine
loads the model, or is not where it does not.

``--record`` also takes over what ``observe.jsonl`` says of vLLM run whole: for the layouts in which it had just the
shapes of the case, the case's shapes are that release's answer, too.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cachebuilder.authoring.derive.config import Config
from cachebuilder.authoring.derive.derive import derive
from cachebuilder.authoring.derive.manifest import Deployment
from cachebuilder.errors import CacheBuilderError, ModelError

ROOT = Path(__file__).parents[2]
RECORDED = ROOT / "tests/data/engine_shapes.json"
OBSERVED = ROOT / "benchmarks/results/observe.jsonl"
LAYOUT = re.compile(r"tp(\d+)(?:-ep(\d+))?(?:-dp(\d+))?(-[A-Z]\w*)?$")
GOOD = ("exact", "refused rightly")
VERDICTS = (*GOOD, "refused wrongly", "not refused", "incomplete", "surplus")

Shape = tuple[int, ...]  # N, K of a linear layer; experts, top-k, N, K of experts


@dataclass(frozen=True)
class Answer:
    """What an engine answered for a layout.

    Attributes:
        layout: as ``tp8-ep8``; ``tp8-CLASS`` of a draft model alone.
        refuses: why the engine does not load the model like this; empty: it does.
    """

    model: str
    config: dict[str, Any]
    engine: str
    release: str
    layout: str
    shapes: frozenset[Shape]
    refuses: str = ""

    @property
    def name(self) -> str:
        """For a table."""
        return f"{self.model:36} {self.engine + ' ' + self.release:14} {self.layout:26}"


def of_folder(folder: Path) -> Iterator[Answer]:
    """The answers of a folder of cases."""
    for file in sorted(folder.glob("*/expected.json")):
        config = json.loads(file.with_name("config.json").read_text())
        for key, case in json.loads(file.read_text()).items():
            engine, _, layout = key.partition("-")
            release = case["engine"].split()[1]
            ops = case["deep_gemm"]
            shapes = [tuple(op[name] for name in ("experts", "topk", "n", "k") if name in op) for op in ops]
            # A refusal that names no module is of a model that was built without names, to which no ignore list applies.
            refusals = [text for module, text in case["engine_refuses"] if module]
            yield Answer(
                file.parent.name, config, engine, release, layout, frozenset(shapes), refusals[0] if refusals else ""
            )


def of_record(file: Path) -> Iterator[Answer]:
    """The answers that were recorded."""
    for model, entry in json.loads(file.read_text())["models"].items():
        config = expanded(entry["config"])
        for answer in entry["answers"]:
            shapes = frozenset(map(tuple, answer.get("shapes", [])))
            for release in answer["releases"]:
                engine, _, version = release.partition(" ")
                yield Answer(model, config, engine, version, answer["layout"], shapes, answer.get("refuses", ""))


def expanded(config: dict[str, Any]) -> dict[str, Any]:
    """A recorded config, its ``*`` in names of modules replaced by all numbers of layers."""
    quantization = dict(config["quantization_config"])
    for name in ("modules_to_not_convert", "ignored_layers", "ignore"):
        if quantization.get(name):
            quantization[name] = [
                entry.replace("*", str(number))
                for entry in quantization[name]
                for number in range(99 if "*" in entry else 1)
            ]
    return {**config, "quantization_config": quantization}


def derived_shapes(answer: Answer) -> frozenset[Shape]:
    """The linear layers and contiguous experts of a manifest. Raises ModelError where it is refused."""
    parts = LAYOUT.match(answer.layout)
    assert parts, answer.layout
    tp, ep, dp = (int(parts[index] or 1) for index in (1, 2, 3))
    serving = Deployment(engine=answer.engine, engine_version=answer.release, gpu="H200", tp=tp, ep=ep, dp=dp).serving()
    fields = {"fp8_gemm_nt": ("n", "k"), "m_grouped_fp8_gemm_nt_contiguous": ("experts", "topk", "n", "k")}
    derived = derive(Config.of(answer.config, Path(answer.model) / "config.json"), serving)
    if derived.unread:
        raise ModelError(f"no rule reads {', '.join(derived.unread)}")
    return frozenset(
        tuple(getattr(item.op, name) for name in fields[item.op.op]) for item in derived.ops if item.op.op in fields
    )


def verdict(answer: Answer, answers: list[Answer]) -> tuple[str, str]:
    """The verdict on one answer, and what differs."""
    try:
        shapes = derived_shapes(answer)
    except CacheBuilderError as error:
        return ("refused rightly" if answer.refuses else "refused wrongly"), str(error)
    if answer.refuses:
        return "not refused", answer.refuses
    if missing := answer.shapes - shapes:
        return "incomplete", f"missing {sorted(missing)}"
    base = re.sub(r"-[A-Z].*", "", answer.layout)
    if base != answer.layout:  # a draft model alone: the manifest also has the model itself
        return "exact", ""
    drafts = [
        other.shapes
        for other in answers
        if (other.model, other.engine, other.release) == (answer.model, answer.engine, answer.release)
        and re.fullmatch(rf"{base}-[A-Z]\w*", other.layout)
    ]
    surplus = shapes - answer.shapes.union(*drafts)
    return ("surplus", f"surplus {sorted(surplus)}") if surplus else ("exact", "")


def record(answers: list[Answer], observed: Path) -> dict[str, Any]:
    """The answers in this project's form, each model's config with the fields that the rules read."""
    whole = {
        (row["model"], row["layout"], row["engine"])
        for row in map(json.loads, observed.read_text().splitlines())
        if row.get("missing") == row.get("extra") == [] or "refused_as_expected" in row
    }
    models: dict[str, Any] = {}
    for answer in answers:
        entry = models.setdefault(answer.model, {"config": shortened(answer), "answers": []})
        releases = [f"{answer.engine} {answer.release}"]
        if answer.engine == "vllm":
            runs = (engine for model, layout, engine in whole if (model, layout) == (answer.model, answer.layout))
            releases = sorted({*releases, *runs})
        row: dict[str, Any] = {"layout": answer.layout, "releases": releases}
        row |= {"refuses": answer.refuses} if answer.refuses else {"shapes": sorted(map(list, answer.shapes))}
        entry["answers"].append(row)
    return {
        "source": "N and K, or experts, top-k, N and K, of what each engine release sends to DeepGEMM on an H200. vLLM "
        "0.33.0 and SGLang 0.5.23: their own model classes, built on torch's meta device with the layout stood in. vLLM "
        "0.25.0: run whole on the virtual GPU (benchmarks/results/observe.jsonl); models `built without quantisation`: its "
        "own classes on the meta device, with all linear layers and experts but the routers. The configs are rebuilt from "
        "class defaults, training scripts and model cards: sizes may differ from the released files. `*` in a module's "
        "name stands for every layer's number.",
        "models": models,
    }


def shortened(answer: Answer) -> dict[str, Any]:
    """The config's fields that the rules read."""
    config = Config.of(answer.config, Path("config.json"))
    for engine in ("vllm", "sglang"):
        try:
            derive(config, Deployment(engine=engine, gpu="H200", max_tokens=64).serving())
        except CacheBuilderError as error:
            print(f"{answer.model}: {error}", file=sys.stderr)
    names = config.fields.read.copy()  # to look at a field is to read it
    read = {name: config.fields[name] for name in config.fields if name in names}
    kept: dict[str, Any] = {"architectures": answer.config["architectures"]}
    kept |= {"text_config": read} if config.around else read
    names = config.quantization.read.copy()
    quantization = {name: config.quantization[name] for name in config.quantization if name in names}
    for name in ("modules_to_not_convert", "ignored_layers", "ignore"):
        if quantization.get(name):
            entries = (re.sub(r"(?<=\.)\d+(?=\.)", "*", entry) for entry in quantization[name])
            quantization[name] = sorted(set(entries))
    return {**kept, "quantization_config": quantization}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--record", action="store_true", help=f"write {RECORDED.relative_to(ROOT)}")
    options = parser.parse_args()
    answers = list(of_folder(options.folder) if options.folder else of_record(RECORDED))
    counts: dict[str, Counter[str]] = {}
    for answer in answers:
        word, difference = verdict(answer, answers)
        counts.setdefault(f"{answer.engine} {answer.release}", Counter())[word] += 1
        print(f"{answer.name} {word:16} {'' if word in GOOD else difference}".rstrip())
    print(f"\n{'':14}" + "".join(f"{word:>17}" for word in VERDICTS))
    for engine, verdicts in counts.items():
        print(f"{engine:14}" + "".join(f"{verdicts[word]:>17}" for word in VERDICTS))
    if options.record:
        recorded = record(answers, OBSERVED)
        recorded["models"] = json.loads(RECORDED.read_text())["models"] | recorded["models"]
        text = json.dumps(recorded, indent=1, sort_keys=True)
        # A list of numbers on one line.
        text = re.sub(r"\[\s+((?:[\d\"\w.-]+,?\s+)+)\]", lambda found: f"[{' '.join(found[1].split())}]", text)
        RECORDED.write_text(text + "\n")
    sys.exit(any(count for verdicts in counts.values() for word, count in verdicts.items() if word not in GOOD))


if __name__ == "__main__":
    main()
