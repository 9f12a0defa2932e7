"""The kernels that vLLM's warm-up misses and a full sweep has, for each model and GPU. Plans only: no compilation.

    PYTHONPATH=. python benchmarks/engines/relaxed.py CONFIG_FOLDER… --gpu H200 --gpu B200 --tp 8 --ep 8 \
        --max-num-batched-tokens 8192 --deep-gemm VLLM/third_party/deep_gemm

A kernel is missed where no M of vLLM's list selects it in any layer. The list is ``_generate_optimal_warmup_m_values`` of
vllm/model_executor/warmup/deep_gemm_warmup.py, 0.32.0 (0.33.0's is the same), written down again here; for experts it is
brought to padded rows as ``compute_aligned_M_and_alignment`` does, at DeepGEMM's default alignment of 128 rows.
`check.py` holds vLLM's own functions against the cache; this only counts.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path

from cachebuilder import gpus
from cachebuilder import manifest as manifests
from cachebuilder import plan as planning
from cachebuilder import toolchain as toolchains
from cachebuilder.deepgemm import installation as installations
from cachebuilder.models import ENGINES, Config, derive, manifest_text
from cachebuilder.models.text import model_name
from cachebuilder.ops import OpBase
from cachebuilder.ops.base import ceil_div

ALIGNMENT = 128


def relaxed(max_tokens: int, n: int, sms: int) -> set[int]:
    """vLLM's relaxed list of M for a weight of ``n`` rows."""
    found = {1, 2, 4, *range(8, 65, 8)}
    for block_m in (64, 128, 256):
        found |= set(range(block_m, max_tokens + 1, block_m))
        for block_n in range(16, min(257, n + 1), 16):
            edges = (wave * sms * block_m // ceil_div(n, block_n) for wave in range(1, 11))
            found |= {m for m in edges if 1 <= m <= max_tokens}
    return found


def padded_rows(op: OpBase, tokens: Iterable[int]) -> set[int]:
    """Rows of the expert GEMM for each number of tokens, at the default alignment."""
    counts = ((m * op.topk, min(m * op.topk, op.experts)) for m in tokens)
    return {ceil_div(used + active * (ALIGNMENT - 1), ALIGNMENT) * ALIGNMENT for used, active in counts}


def warmed_and_served(
    op: OpBase, ops: list[OpBase], max_tokens: int, dp: int, sms: int
) -> tuple[set[int], set[int]] | None:
    """The points of ``op`` that vLLM's warm-up in ``relax`` calls, and those that serving can; None: not warmed at all.

    Serving without DeepEP's counts pads for the worst case, so few experts' rows are never a small multiple of 128.
    """
    if op.op == "fp8_gemm_nt":
        return relaxed(max_tokens, op.n, sms), set(range(1, op.largest_m + 1))
    if op.op != "m_grouped_fp8_gemm_nt_contiguous":
        return None
    largest_n = max(other.n for other in ops if other.op == op.op and other.experts == op.experts)
    tokens = dp * max_tokens
    return padded_rows(op, relaxed(tokens, largest_n, sms) | {tokens}), padded_rows(op, range(1, tokens + 1))


def selected(kernel: planning.Kernel, lists: list[tuple[set[int], set[int]] | None], which: int) -> bool:
    """Whether a point of the warm-up's (0) or of serving's (1) selects ``kernel``."""
    return any(
        (pair := lists[where.op]) is not None and any(m in pair[which] for m in range(r.first, r.last + 1, r.step))
        for where in kernel.selected_by
        for r in where.ranges
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("configs", type=Path, nargs="+")
    parser.add_argument("--gpu", action="append", required=True)
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--ep", type=int, default=1)
    parser.add_argument("--max-num-batched-tokens", type=int, default=8192)
    parser.add_argument("--deep-gemm", type=Path)
    given = parser.parse_args()
    installation, toolchain = installations.find(given.deep_gemm), toolchains.find(None, None)
    for path in given.configs:
        config = Config.read(path)
        for gpu in given.gpu:
            serving = ENGINES["vllm"](
                gpu=gpus.find(gpu), version="0.33.0", tp=given.tp, ep=given.ep, max_tokens=given.max_num_batched_tokens
            )
            text = manifest_text(config, serving, derive(config, serving))
            manifest = manifests.parse(text.encode())
            plan = planning.make(manifest, installation, toolchain)
            lists = [
                warmed_and_served(op, manifest.ops, serving.max_tokens, serving.dp, serving.gpu.sm_count)
                for op in manifest.ops
            ]
            missed = [kernel for kernel in plan.kernels if not selected(kernel, lists, 0)]
            names = [kernel.name for kernel in missed]
            print(
                json.dumps(
                    {
                        "model": model_name(config),
                        "gpu": gpu,
                        "tp": given.tp,
                        "ep": given.ep,
                        "deep_gemm": installation.version,
                        "kernels": len(plan.kernels),
                        "missed": len(missed),
                        "reached": sum(selected(kernel, lists, 1) for kernel in missed),
                        "names": {name: names.count(name) for name in sorted(set(names))},
                    }
                ),
                flush=True,
            )


if __name__ == "__main__":
    main()
