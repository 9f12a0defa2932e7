"""The child of `check.py`: vLLM's own warm-up functions, on whatever GPU this process sees. Runs in vLLM's environment.

    python benchmarks/engines/vllm_warmup.py JOB.json RESULT.json

Real: vLLM's modules as installed, its CUDA platform class for machines without NVML, its DeepGEMM wrapper and copy, its
processing of weights and scales, its workspace manager, its lists of M, ``deepgemm_fp8_gemm_nt_warmup`` over a module
tree, and ``_deepgemm_grouped_fp8_gemm_nt_contiguous_warmup``. Replaced: the weights (by memory of the right shape and
type), the layers that hold them (by plain modules that carry vLLM's kernel object, made without its constructor), and
the data parallel group (by its size).
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from drain import drain


def run(job: dict[str, Any]) -> dict[str, Any]:
    import torch

    # vLLM's extensions link to driver functions that the virtual GPU lacks; none of them is called here.
    sys.setdlopenflags(os.RTLD_LAZY)
    import vllm.platforms
    from vllm.platforms.cuda import NonNvmlCudaPlatform

    vllm.platforms._current_platform = NonNvmlCudaPlatform()

    import vllm
    from vllm.distributed import parallel_state
    from vllm.model_executor.kernels.linear.scaled_mm.deep_gemm import DeepGemmFp8BlockScaledMMKernel
    from vllm.model_executor.layers.quantization.utils.fp8_utils import deepgemm_post_process_fp8_weight_block
    from vllm.model_executor.warmup import deep_gemm_warmup as warmup
    from vllm.utils import deep_gemm as wrapper
    from vllm.v1.worker.workspace import init_workspace_manager

    assert wrapper.is_deep_gemm_supported(), "vLLM does not recognise this as a GPU that DeepGEMM runs on"
    deep_gemm = wrapper._import_deep_gemm()
    assert Path(deep_gemm.__file__).parent == Path(job["deep_gemm"]), deep_gemm.__file__
    parallel_state._DP = SimpleNamespace(world_size=job["dp"])
    device = torch.device("cuda:0")
    init_workspace_manager(device)
    calls, empty = {"dense": 0, "grouped": 0}, drain()

    def counting(name: str, function: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            calls[name] += 1
            empty()
            return function(*arguments, **options)

        return call

    warmup.fp8_gemm_nt = counting("dense", warmup.fp8_gemm_nt)
    warmup.m_grouped_fp8_gemm_nt_contiguous = counting("grouped", warmup.m_grouped_fp8_gemm_nt_contiguous)

    def weights(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
        """FP8 weights with block scales, in the layout that vLLM serves with."""
        *outer, n, k = shape
        empty()
        data = torch.empty(shape, device=device, dtype=torch.float8_e4m3fn)
        scales = torch.empty((*outer, -(-n // 128), k // 128), device=device, dtype=torch.float32)
        return deepgemm_post_process_fp8_weight_block(
            data, scales, (128, 128), use_e8m0=job["requantize"] and wrapper.is_deep_gemm_e8m0_used()
        )

    model = torch.nn.Module()
    for index, (n, k) in enumerate(job["dense"]):
        layer = torch.nn.Module()
        layer.weight, layer.weight_scale_inv = weights(n, k)
        layer.weight_block_size = [128, 128]
        layer.deep_gemm_warmup_provider = object.__new__(DeepGemmFp8BlockScaledMMKernel)
        model.add_module(f"layer_{index}", layer)
    warmup.deepgemm_fp8_gemm_nt_warmup(model, job["max_tokens"])
    for count, topk, hidden, width in job["experts"]:
        w13, w13_scale = weights(count, 2 * width, hidden)
        w2, w2_scale = weights(count, hidden, width)
        warmup._deepgemm_grouped_fp8_gemm_nt_contiguous_warmup(w13, w2, w13_scale, w2_scale, topk, job["max_tokens"])
    return {
        "engine": f"vllm {vllm.__version__}",
        "torch": torch.__version__,
        "calls": calls,
        "gpu": torch.cuda.get_device_name(0),
        "lists": {
            f"{n}x{k}": len(warmup._get_fp8_gemm_nt_m_values(torch.empty(n, k, device=device), job["max_tokens"]))
            for n, k in job["dense"]
        },
    }


def main() -> None:
    result = run(json.loads(Path(sys.argv[1]).read_text()))
    Path(sys.argv[2]).write_text(json.dumps(result))
    sys.stdout.flush()
    os._exit(0)  # the destructors would tidy up a GPU that does not exist


if __name__ == "__main__":
    main()
