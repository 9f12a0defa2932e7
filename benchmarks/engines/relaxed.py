"""Counts the kernels of a full sweep that vLLM's warm-up misses, for each model and GPU. Plans, but compiles nothing.

    PYTHONPATH=. python benchmarks/engines/relaxed.py MODEL/config.json TP EP [MODEL/config.json TP EP…] \
        --gpu H200 --gpu B200 --max-num-batched-tokens 8192 --deep-gemm VLLM/third_party/deep_gemm [--commit HASH] \
        > benchmarks/results/relaxed-vllm.jsonl

A kernel is missed where no M of vLLM's list (`benchmarks/relaxed_list.py`) selects it in any layer. For experts, the list
is turned into padded rows as ``compute_aligned_M_and_alignment`` does, at DeepGEMM's default alignment of 128 rows. On
Hopper and Blackwell, 0.33.0 serves experts with ``use_psum_layout``, but its warm-up calls the other layout. `check.py`
runs vLLM's own functions on the cache; this only counts. `benchmarks/plot.py` makes the docs' table.
"""

from __future__ import annotations

import collections
import json
from collections.abc import Container, Iterable, Sequence
from pathlib import Path

import click

from benchmarks.relaxed_list import relaxed
from cachebuilder.authoring.derive.manifest import Deployment, derive_manifest
from cachebuilder.authoring.derive.text import model_name
from cachebuilder.cuda import toolchain as toolchains
from cachebuilder.deepgemm import installation as installations
from cachebuilder.manifest import schema as manifests
from cachebuilder.manifest.inputs import Inputs
from cachebuilder.ops.catalog import OpBase
from cachebuilder.ops.device import ceil_div
from cachebuilder.planning import make as planning
from cachebuilder.planning.plan import Kernel

ALIGNMENT = 128
VLLM = "0.33.0"


def padded_rows(op: OpBase, tokens: Iterable[int]) -> set[int]:
    """Rows of the expert GEMM for each number of tokens, at the default alignment."""
    counts = ((m * op.topk, min(m * op.topk, op.experts)) for m in tokens)
    return {ceil_div(used + active * (ALIGNMENT - 1), ALIGNMENT) * ALIGNMENT for used, active in counts}


def warmed_and_served(
    op: OpBase, ops: list[OpBase], max_tokens: int, dp: int, sms: int
) -> tuple[Container[int], Container[int]]:
    """The points of ``op`` that vLLM's warm-up calls in the mode ``relax``, and those that serving can call.

    Without DeepEP's counts, serving pads for the worst case: the rows of few experts are never a small multiple of 128.
    """
    if op.op == "fp8_gemm_nt":
        return frozenset(relaxed(max_tokens, op.n, sms)), range(1, op.largest_m + 1)
    if op.op != "m_grouped_fp8_gemm_nt_contiguous":  # the indexer's, which no warm-up calls
        return (), range(1 << 40)
    largest_n = max(other.n for other in ops if other.op == op.op and other.experts == op.experts)
    tokens = dp * max_tokens
    warmed = set() if op.psum else padded_rows(op, [*relaxed(tokens, largest_n, sms), tokens])
    return warmed, padded_rows(op, range(1, tokens + 1))


def selected(kernel: Kernel, lists: Sequence[Container[int]]) -> bool:
    """Whether a point in its op's list selects ``kernel``."""
    return any(
        m in lists[where.op]
        for where in kernel.selected_by
        for r in where.ranges
        for m in range(r.first, r.last + 1, r.step)
    )


@click.command()
@click.argument("models", nargs=-1, required=True)
@click.option("--gpu", "cards", multiple=True, required=True)
@click.option("--max-num-batched-tokens", default=8192, show_default=True)
@click.option("--deep-gemm", type=click.Path(path_type=Path))
@click.option("--commit", default="")
def main(
    models: tuple[str, ...], cards: tuple[str, ...], max_num_batched_tokens: int, deep_gemm: Path | None, commit: str
) -> None:
    installation, toolchain = installations.find(deep_gemm), toolchains.find(None, None)
    run = {"what": "run", "command": "python benchmarks/engines/relaxed.py", "commit": commit, "vllm": VLLM}
    print(json.dumps(run | {"deep_gemm": installation.version, "max_tokens": max_num_batched_tokens}), flush=True)
    for path, tp, ep in zip(models[::3], models[1::3], models[2::3], strict=True):
        for card in cards:
            deployment = Deployment(
                engine="vllm",
                engine_version=VLLM,
                gpu=card,
                tp=int(tp),
                ep=int(ep),
                max_tokens=max_num_batched_tokens,
            )
            derived = derive_manifest(Path(path), deployment)
            serving = derived.serving
            manifest = manifests.parse(derived.text.encode())
            plan = planning.make(Inputs(manifest, b"", toolchain, installation))
            limits = serving.max_tokens, serving.dp, serving.gpu.sm_count
            lists = (warmed_and_served(op, manifest.ops, *limits) for op in manifest.ops)
            warmed, served = zip(*lists, strict=True)
            missed = [kernel for kernel in plan.kernels if not selected(kernel, warmed)]
            names = collections.Counter(kernel.name for kernel in missed)
            row = {"model": model_name(derived.config), "gpu": card, "tp": int(tp), "ep": int(ep)}
            row |= {"kernels": len(plan.kernels), "missed": len(missed)}
            row |= {
                "reached": sum(selected(kernel, served) for kernel in missed),
                "names": dict(sorted(names.items())),
            }
            print(json.dumps({"what": "missed"} | row), flush=True)


if __name__ == "__main__":
    main()
