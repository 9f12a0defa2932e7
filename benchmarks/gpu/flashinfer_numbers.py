"""Compare every kernel of FlashInfer's GEMM in a restored folder with float32, on the target GPU.

    eval "$(cachebuilder env DIR --engine vllm)"; python benchmarks/gpu/flashinfer_numbers.py DIR

Each shape of DIR's artifacts is called at M = 1, 8, 17 and 31 on random inputs: BF16 activations, which the module makes FP8
in groups of 128 along K, and an FP8 weight with a scale for each block of 128 × 128. The reference is the float32 product
of the same FP8 values, those of the activations as the module's own quantisation makes them. Prints one line a call, and
ends with 1 if an error is above 0.4 %, BF16's own rounding.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from flashinfer.gemm import fp8_blockscale_gemm_sm90
from flashinfer.gemm.gemm_base import get_fp8_blockscale_gemm_runner_sm90

from cachebuilder.restoring.folder import open_folder

BOUND = 4e-3


def blocks(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """FP8 values of ``matrix`` and the scales of its blocks of 128 × 128; the rows of the last block may be fewer."""
    n, k = matrix.shape
    padded = torch.zeros(-(-n // 128) * 128, k, device=matrix.device)
    padded[:n] = matrix.float()
    tiles = padded.view(-1, 128, k // 128, 128)
    scales = tiles.abs().amax((1, 3)).clamp(1e-4) / 448
    values = (tiles / scales[:, None, :, None]).to(torch.float8_e4m3fn)
    return values.reshape(padded.shape)[:n].contiguous(), scales


def groups(matrix: torch.Tensor) -> torch.Tensor:
    """What the module makes of BF16 activations, as float32: FP8 values times the scales of groups of 128 along K.

    The scales are [K / 128, M], with M padded to a multiple of 4 (``scale_1x128_kernel`` in
    ``fp8_blockscale_gemm_kernel.cuh``, FlashInfer 0.6.13).
    """
    m, k = matrix.shape
    values = torch.empty(m, k, device="cuda", dtype=torch.float8_e4m3fn)
    scales = torch.zeros(k // 128, -(-m // 4) * 4, device="cuda")
    get_fp8_blockscale_gemm_runner_sm90().fp8_quantize_1x128(matrix, values, scales, False)
    return values.float() * scales[:, :m].T.repeat_interleave(128, 1)


def main() -> int:
    torch.manual_seed(0)
    worst = 0.0
    for index in open_folder(Path(sys.argv[1])).indexes:
        for gemm in index.flashinfer.gemms if index.flashinfer else ():
            n, k = int(str(gemm["n"])), int(str(gemm["k"]))
            weight, scales = blocks(torch.randn(n, k, device="cuda"))
            dequantized = weight.float() * scales.repeat_interleave(128, 0)[:n].repeat_interleave(128, 1)
            for m in (1, 8, 17, 31):
                activations = torch.randn(m, k, device="cuda").bfloat16()
                expected = groups(activations) @ dequantized.T
                result = fp8_blockscale_gemm_sm90(activations, weight, None, scales, out_dtype=torch.bfloat16).float()
                error = float((result - expected).norm() / expected.norm())
                worst = max(worst, error)
                print(json.dumps({"n": n, "k": k, "m": m, "relative_error": round(error, 6)}), flush=True)
    print(f"worst {worst:.2e}, bound {BOUND}")
    return int(not worst < BOUND)


if __name__ == "__main__":
    torch.backends.cuda.matmul.allow_tf32 = False
    sys.exit(main())
