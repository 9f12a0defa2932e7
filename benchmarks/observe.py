"""Observe engines on models of which only the config is here, and compare with what is expected.

    python benchmarks/observe.py --gpu H200 -o benchmarks/results/observe.jsonl MODEL[:LAYOUT]... [-- OPTIONS...]
    python benchmarks/observe.py --with-flashinfer -o benchmarks/results/observe-flashinfer.jsonl …
    python benchmarks/observe.py --rules -o benchmarks/results/recipes.jsonl …

Runs in the engine's environment, with cachebuilder importable: the engine that is installed there is observed. MODEL is
a folder with ``config.json``; LAYOUT is ``tpN``, ``tpN-epN`` or ``tpN-epN-dpN``, and ``-CLASS`` behind it adds the
model's own draft layers. Without a LAYOUT, all of the engine's in the folder's ``expected.json`` are observed. OPTIONS are added to the serve command. One line of JSON is
added to the results for each observation, also for one that failed. ``plot.py`` makes the docs' table from them.

``--rules`` compares with the manifest that ``cachebuilder manifest --model`` writes for the same deployment: which
kernels of this run it lacks (``observe --check``), and which shapes each of them has. ``--manifests FOLDER`` keeps
the manifests that were observed.

Seconds and memory depend on the machine and on what else runs on it; CPU seconds depend less. Memory is the most that all
processes of the engine held at once, shared pages counted once (PSS, sampled every 2 s).
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import platform
import re
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from cachebuilder.authoring.derive.manifest import Deployment, derive_manifest
from cachebuilder.authoring.observe import observe as observing
from cachebuilder.cuda import gpus
from cachebuilder.errors import CacheBuilderError, ModelError

ROOT = Path(__file__).parents[1]
ENGINE = "vllm" if importlib.util.find_spec("vllm") else "sglang"
#: What is served with, besides the layout. Both engines take DeepGEMM for experts only where they are told to.
OPTIONS = {
    "vllm": ["--max-num-batched-tokens", "8192", "--max-model-len", "16384", "--moe-backend", "deep_gemm"],
    "sglang": ["--chunked-prefill-size", "8192", "--context-length", "16384", "--moe-runner-backend", "deep_gemm"],
}
#: The model's own draft layers.
DRAFT = {
    "vllm": ["--speculative-config", '{"method": "mtp", "num_speculative_tokens": 1}'],
    "sglang": ["--speculative-algorithm", "EAGLE"],
}

Shape = tuple[str, int | None, int, int]


def layouts(folder: Path) -> list[str]:
    """The engine's layouts that a case has."""
    keys = json.loads((folder / "expected.json").read_text())
    return [key.removeprefix(f"{ENGINE}-") for key in keys if key.startswith(f"{ENGINE}-")]


def serve_command(folder: Path, layout: str, more: list[str]) -> list[str]:
    """The serve command of the engine that is installed."""
    parts = dict(re.findall(r"(tp|ep|dp)(\d+)", layout))
    if ENGINE == "vllm":
        command = ["vllm", "serve", str(folder), "--tensor-parallel-size", parts["tp"]]
        if "dp" in parts:
            command += ["--data-parallel-size", parts["dp"]]
        if "ep" in parts:
            command += ["--enable-expert-parallel"]
    else:
        command = [sys.executable, "-m", "sglang.launch_server", "--model-path", str(folder), "--tp", parts["tp"]]
        if "dp" in parts:
            command += ["--dp", parts["dp"], "--enable-dp-attention"]
        if "ep" in parts:
            command += ["--ep", parts["ep"]]
    if is_draft(layout):
        command += DRAFT[ENGINE]
    return [*command, *OPTIONS[ENGINE], *more]


def shown(command: list[str], folder: Path) -> list[str]:
    """The command without this machine's paths."""
    names = {str(folder): folder.resolve().name, sys.executable: "python"}
    return [names.get(word, word) for word in command]


def is_draft(layout: str) -> bool:
    return bool(re.search(r"-[A-Z]", layout))


def expected_shapes(folder: Path, layout: str) -> tuple[set[Shape], list[str]] | None:
    """What the case says of a layout, with its main model where the layout is of the draft; and what is refused."""
    file = folder / "expected.json"
    if not file.exists():
        return None
    cases = json.loads(file.read_text())
    parts = [cases.get(f"{ENGINE}-{name}") for name in {layout, re.sub(r"-[A-Z].*", "", layout)}]
    shapes = {(op["op"], op.get("experts"), op["n"], op["k"]) for part in parts if part for op in part["deep_gemm"]}
    return shapes, [text for part in parts if part for _, text in part["engine_refuses"]]


def observed_shapes(observation: observing.Observation) -> dict[Shape, list[str]]:
    """The shapes of the GEMMs with weights that were observed, with the modules that called."""
    shapes: dict[Shape, list[str]] = {}
    for op in observation.observed.ops:
        if "n" in op.fields and "k" in op.fields and "gemm" in op.name:
            shape = op.name, op.fields.get("experts"), op.fields["n"], op.fields["k"]
            shapes.setdefault(shape, []).extend(sorted(op.modules))
    return shapes


@contextlib.contextmanager
def memory() -> Iterator[list[int]]:
    """Yields a list of one: the most bytes that all descendants of this process held at once."""
    most, ended = [0], threading.Event()

    def sample() -> None:
        while not ended.wait(2):
            most[0] = max(most[0], sum(map(pss, descendants(os.getpid()))))

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield most
    finally:
        ended.set()
        thread.join()


def descendants(root: int) -> list[int]:
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(stat.parent.name))
    found, todo = [], [root]
    while todo:
        todo += (own := children.get(todo.pop(), []))
        found += own
    return found


def pss(pid: int) -> int:
    with contextlib.suppress(OSError):
        rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
        return int(re.search(r"^Pss: +(\d+)", rollup, re.M)[1]) * 1024  # type: ignore[index]
    return 0


def cpu_seconds() -> float:
    """Of all ended descendants."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def against_rules(
    observation: observing.Observation | None, folder: Path, layout: str, gpu: str, command: list[str]
) -> dict[str, Any]:
    """What the rules' manifest of the same deployment has, and which kernels of this run it lacks.

    Args:
        observation: None: the engine did not serve the model.
    """
    sizes = {name: int(size) for name, size in re.findall(r"(tp|ep|dp)(\d+)", layout)}

    def option(name: str) -> int:
        return int([command[at + 1] for at, word in enumerate(command) if word == name][-1])

    tokens, length = (word for word in OPTIONS[ENGINE] if word.startswith(("--max", "--chunk", "--context")))
    deployment = Deployment(
        engine=ENGINE,
        engine_version=version(ENGINE),
        gpu=gpu,
        max_tokens=option(tokens),
        max_model_len=option(length),
        **sizes,  # type: ignore[arg-type]
    )
    try:
        written = derive_manifest(folder, deployment)
    except ModelError as error:
        return {"rules_refuse": str(error).replace(f"{folder}/", "")}
    ops = [item.op.model_dump() for item in written.derived.ops]
    row: dict[str, Any] = {
        "rules": sorted(
            {(op["op"], op.get("experts"), op["n"], op["k"]) for op in ops if "n" in op and "k" in op}, key=str
        )
    }
    if observation:
        with tempfile.TemporaryDirectory() as scratch:
            manifest = Path(scratch) / "rules.yaml"
            manifest.write_text(written.text)
            lack = observing.check(observation, manifest)
        row["lack"] = {"requested": lack.requested, "kernels": lack.kernels, "names": lack.names}
    return row


def observe(
    folder: Path, layout: str, gpu: str, more: list[str], with_flashinfer: bool = False, rules: bool = False
) -> dict[str, Any]:
    command = serve_command(folder, layout, more)
    row: dict[str, Any] = {
        "model": folder.resolve().name,
        "layout": layout,
        "gpu": gpu,
        "command": shown(command, folder),
        "load": os.getloadavg()[0],
    }
    started, cpu = time.monotonic(), cpu_seconds()
    expected = expected_shapes(folder, layout)
    with memory() as most:
        try:
            observation = observing.observe(
                command, observing.Host(gpus.find(gpu), os.environ), with_flashinfer=with_flashinfer
            )
        except CacheBuilderError as error:
            observation, row["error"] = None, re.sub(r"(/[\w.+-]+)+/", "…/", str(error))
            refused = [text for text in expected[1] if text in str(error)] if expected else []
            row |= {"refused_as_expected": refused} if refused else {}
    row |= {
        "whole_seconds": round(time.monotonic() - started, 1),
        "cpu_seconds": round(cpu_seconds() - cpu, 1),
        "memory_gb": round(most[0] / 1e9, 2),
    }
    if rules:
        row |= against_rules(observation, folder, layout, gpu, command)
    if observation is None:
        return row
    run, observed = observation.run, observation.observed
    row |= {
        "deep_gemm": str(observation.installation).split(", /")[0],
        "up_seconds": round(run.up_seconds, 1),
        "seconds": round(run.seconds, 1),
        "processes": observed.processes,
        "requests": run.requests,
        "calls": observed.calls,
        "call_sites": len({place for op in observed.ops for place in op.places}),
        "ops": len(observed.ops),
        "kernels_requested": len(observation.requested),
        "kernels_planned": len(observation.planned),
        "sources": observation.sources,
        "no_op": dict(observed.unexpressed),
        "uncalled": [[one.modules, one.count, one.shapes, one.warmed] for one in observed.uncalled],
        "manifest": observation.manifest,
    }
    if with_flashinfer:
        row["flashinfer"] = observation.flashinfer.model_dump() if observation.flashinfer else {}
    shapes = observed_shapes(observation)
    if rules:
        row["shapes"] = sorted(map(list, shapes), key=str)
    if expected is not None:
        row["missing"] = sorted(map(list, expected[0] - shapes.keys()), key=str)
        row["extra"] = sorted(
            ([*shape, modules] for shape, modules in shapes.items() if shape not in expected[0]), key=str
        )
    return row


def split(arguments: list[str]) -> tuple[list[str], list[str]]:
    """The script's own arguments, and those behind ``--``."""
    if "--" not in arguments:
        return arguments, []
    at = arguments.index("--")
    return arguments[:at], arguments[at + 1 :]


def machine() -> dict[str, Any]:
    """What the results were measured with."""
    commit = subprocess.run(["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    return {
        "engine": f"{ENGINE} {version(ENGINE)}",
        "torch": version("torch"),
        "commit": commit[:12],
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
    }


def main() -> None:
    own, more = split(sys.argv[1:])
    parser = argparse.ArgumentParser()
    parser.add_argument("--gpu", default="H200")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--with-flashinfer", action="store_true", help="also what the engine takes from FlashInfer")
    parser.add_argument("--rules", action="store_true", help="compare with the manifest that the rules write")
    parser.add_argument("--manifests", type=Path, help="a folder that gets each observation's manifest")
    parser.add_argument("models", nargs="+")
    arguments = parser.parse_args(own)
    for model in arguments.models:
        folder, _, only = model.partition(":")
        for layout in [only] if only else layouts(Path(folder)):
            row = observe(Path(folder), layout, arguments.gpu, more, arguments.with_flashinfer, arguments.rules)
            row |= machine()
            manifest = row.pop("manifest", "")
            if arguments.manifests and manifest:
                name = f"{row['model']}-{layout}-{arguments.gpu}-{row['engine'].replace(' ', '-')}.yaml".lower()
                (arguments.manifests / name).write_text(manifest)
            with arguments.output.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(json.dumps(row, indent=1), flush=True)


if __name__ == "__main__":
    main()
