"""Write a manifest of every op that one copy of DeepGEMM has on SM90, for `truth.py` to run on the GPU.

    python benchmarks/gpu/entry_points.py FOLDER OUT.yaml [--gpu H200] [--only OP]...

The shapes are those that the CI plans and compiles (``tests/entry_points.py``), mega-MoE with one rank, because a trial has
one GPU. Ops whose function FOLDER lacks are left out and listed.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click

ROOT = Path(__file__).parents[2]
#: A larger shape beside the CI's: one of eight ranks of DeepSeek-V3, whole batches of decoding.
LARGE = {"ranks": 1, "experts": 32, "topk": 8, "hidden": 7168, "intermediate": 2048, "max_tokens": 1024}
sys.path.insert(0, str(ROOT))

from cachebuilder.deepgemm import installation  # noqa: E402
from cachebuilder.ops.catalog import OPS  # noqa: E402
from tests import entry_points  # noqa: E402


@click.command()
@click.argument("folder", type=click.Path(path_type=Path, exists=True))
@click.argument("output", type=click.Path(path_type=Path))
@click.option("--gpu", default="H200", show_default=True, help="This machine's GPU.")
@click.option("--only", multiple=True, metavar="OP", help="This op; several may be given. Left out: all.")
def main(folder: Path, output: Path, gpu: str, only: tuple[str, ...]) -> None:
    copy = installation.find(folder)
    sources = "\n".join(file.read_text() for file in folder.rglob("*.py"))
    ops, left_out = [], set()
    large = [{"op": op} | LARGE for op in ("mega_moe_pre_dispatch_sm90", "fp8_mega_moe")]
    for fields in [*entry_points.ops("sm90", copy.generation), *large]:
        names = OPS[fields["op"]].entry_points or (fields["op"],)
        if only and fields["op"] not in only:
            continue
        if not any(name in sources for name in names):
            left_out.add(fields["op"])
            continue
        ops.append(fields | ({"ranks": 1} if "ranks" in fields else {}))
    manifest = {"name": "entry-points", "target": {"gpu": gpu}, "max_tokens": 16, "ops": ops}
    output.write_text(json.dumps(manifest, indent=1))  # JSON is YAML without anchors, which a manifest may not have
    click.echo(
        f"{output}: {len(ops)} ops for {copy}" + (f"; it has no {', '.join(sorted(left_out))}" if left_out else "")
    )


if __name__ == "__main__":
    main()
