"""The values of M at which vLLM warms up a dense layer by default, for the scripts beside this one."""

from __future__ import annotations

from cachebuilder.ops.device import ceil_div


def relaxed(max_tokens: int, n: int, sm_count: int) -> list[int]:
    """The list for a weight of ``n`` rows, in order.

    ``_generate_optimal_warmup_m_values`` of vllm/model_executor/warmup/deep_gemm_warmup.py, 0.32.0 (0.33.0's is the
    same), written again here.
    """
    values = {1, 2, 4, *range(8, 65, 8)}
    for block_m in (64, 128, 256):
        values.update(range(block_m, max_tokens + 1, block_m))
        for block_n in range(16, min(257, n + 1), 16):
            values.update(wave * sm_count * block_m // ceil_div(n, block_n) for wave in range(1, 11))
    return sorted(m for m in values if 1 <= m <= max_tokens)
