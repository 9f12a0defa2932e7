"""Which properties of a GPU change a plan? Each one alone, over a range, on the virtual GPU.

    python benchmarks/sensitivity.py [MANIFEST...] [--deep-gemm FOLDER] [--commit HASH] > benchmarks/results/sensitivity.jsonl

The first line says what was run. Then follows one JSON object for each manifest, property and value: how many kernels are
planned, how many of them the plan for the manifest's own GPU does not have (``other``), and how many only that plan has
(``gone``); or why DeepGEMM refused.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from cachebuilder.errors import CacheBuilderError
from cachebuilder.manifest.inputs import Inputs, load_manifest
from cachebuilder.manifest.schema import Manifest
from cachebuilder.planning import make as planning

KIB, MIB = 1024, 1024 * 1024
MANIFESTS = Path(__file__).parents[1] / "manifests"
DEFAULT = (MANIFESTS / "deepseek-v3-tp8-h200.yaml", MANIFESTS / "deepseek-v3-tp8-b200.yaml")
VALUES = {
    "sm_count": (66, 78, 108, 114, 120, 128, 130, 131, 132, 144, 146, 148, 152, 160, 188),
    "l2_bytes": tuple(size * MIB for size in (10, 30, 40, 50, 60, 96, 126, 192, 256)),
    "shared_memory_bytes": tuple(size * KIB for size in (99, 163, 200, 220, 226, 227, 228, 256)),
    "clock_khz": (1_000_000, 1_500_000, 1_755_000, 1_980_000, 2_500_000, 3_000_000),
}


def entries(manifest: Manifest, inputs: Inputs) -> set[str]:
    return {kernel.entry for kernel in planning.make(replace(inputs, manifest=manifest)).kernels}


def changed(manifest: Manifest, **properties: Any) -> Manifest:
    """The manifest for its own GPU with some properties changed, and for all of that GPU's SMs."""
    fields = manifest.target.gpu.model_dump() | {"name": "changed", "source": "", "verified": False} | properties
    return Manifest.model_validate(manifest.model_dump(exclude={"target"}) | {"target": {"gpu": fields}})


@click.command()
@click.argument("manifests", nargs=-1, type=click.Path(path_type=Path))
@click.option("--deep-gemm", type=click.Path(path_type=Path))
@click.option("--commit", default="")
def main(manifests: tuple[Path, ...], deep_gemm: Path | None, commit: str) -> None:
    for path in manifests or DEFAULT:
        inputs = load_manifest(path, deep_gemm=deep_gemm)
        gpu = inputs.manifest.target.gpu
        base = entries(changed(inputs.manifest), inputs)
        using = {"manifest": path.stem, "gpu": gpu.name, "deep_gemm": inputs.installation.version, "commit": commit}
        print(json.dumps({"command": "python benchmarks/sensitivity.py"} | using | {"kernels": len(base)}), flush=True)
        for name, values in VALUES.items():
            for value in values:
                line: dict[str, Any] = {"manifest": path.stem, "property": name, "value": value}
                try:
                    found = entries(changed(inputs.manifest, **{name: value}), inputs)
                except CacheBuilderError as error:
                    line |= {"refused": str(error).splitlines()[0]}
                else:
                    line |= {"kernels": len(found), "other": len(found - base), "gone": len(base - found)}
                print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
