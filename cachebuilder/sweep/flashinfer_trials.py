"""FlashInfer's GEMM on random inputs, on a real GPU, compared with a reference in float32 and timed.

The child process of `flashinfer_child` does it, with a job of the kind ``trials``.
"""

from __future__ import annotations

import importlib
from typing import Any

from cachebuilder.flashinfer.entries import GEMM_FUNCTION
from cachebuilder.flashinfer.schema import Gemm
from cachebuilder.ops.trial import GUARD_ROWS, Output
from cachebuilder.sweep.flashinfer_protocol import GemmTrialsAnswer, GemmTrialsJob
from cachebuilder.sweep.loading import JobError
from cachebuilder.sweep.protocol import TrialResult
from cachebuilder.sweep.trials import median_microseconds

#: A scale is for as many values along K, and in the weight for as many rows, too.
_BLOCK = 128


def try_gemms(job: GemmTrialsJob) -> GemmTrialsAnswer:
    """Call the GEMM at each of the job's points. FlashInfer and its modules are loaded.

    Raises:
        JobError: FlashInfer refuses a call.
    """
    import torch

    torch.backends.cuda.matmul.allow_tf32 = False
    gemm_module = importlib.import_module("flashinfer.gemm.gemm_base")
    results = []
    for number, (index, m) in enumerate(job.points):
        shape = job.gemms[index]
        try:
            results.append(_try(torch, gemm_module, shape, m, seed=number))
        except Exception as error:
            raise JobError("refused", f"{shape} at m {m}: {error}") from error
    return GemmTrialsAnswer(results=tuple(results))


def _try(torch: Any, gemm_module: Any, shape: Gemm, m: int, seed: int) -> TrialResult:
    generator = torch.Generator("cuda").manual_seed(seed)
    weight, scales = _blocks(torch, torch.randn(shape.n, shape.k, device="cuda", generator=generator))
    activations = torch.randn(m, shape.k, device="cuda", generator=generator).bfloat16()
    whole = torch.full((m + GUARD_ROWS, shape.n), torch.nan, device="cuda", dtype=torch.bfloat16)

    def call() -> None:
        getattr(gemm_module, GEMM_FUNCTION)(activations, weight, None, scales, out=whole[:m])

    call()
    dequantised = weight.float() * scales.repeat_interleave(_BLOCK, 0)[: shape.n].repeat_interleave(_BLOCK, 1)
    expected = torch.zeros(whole.shape, device="cuda")
    expected[:m] = _groups(torch, gemm_module, activations) @ dequantised.T
    rows = torch.arange(len(whole), device="cuda")[:, None]
    output = Output("out", whole, expected, written=rows < m, untouched=rows >= m)
    in_bfloat16 = weight.bfloat16()
    return TrialResult(
        relative_error=output.relative_error(),
        worst_row_error=output.worst_row_error(),
        microseconds=median_microseconds(torch, call),
        reference_microseconds=median_microseconds(torch, lambda: activations @ in_bfloat16.T),
        problems=(problem,) if (problem := output.problem()) else (),
    )


def _blocks(torch: Any, matrix: Any) -> tuple[Any, Any]:
    """FP8 values of ``matrix`` [N, K], and the scales of its blocks; the rows of the last block may be fewer."""
    n, k = matrix.shape
    padded = torch.zeros(-(-n // _BLOCK) * _BLOCK, k, device="cuda")
    padded[:n] = matrix
    tiles = padded.view(-1, _BLOCK, k // _BLOCK, _BLOCK)
    scales = tiles.abs().amax((1, 3)).clamp(1e-4) / torch.finfo(torch.float8_e4m3fn).max
    values = (tiles / scales[:, None, :, None]).to(torch.float8_e4m3fn)
    return values.reshape(padded.shape)[:n].contiguous(), scales


def _groups(torch: Any, gemm_module: Any, activations: Any) -> Any:
    """What the module itself makes of BF16 activations [M, K], as float32: FP8 values times the scales of groups in K.

    The scales are [K / 128, M], with M padded to a multiple of 4 (``scale_1x128_kernel`` in
    ``fp8_blockscale_gemm_kernel.cuh``, FlashInfer 0.6.13).
    """
    m, k = activations.shape
    values = torch.empty(m, k, device="cuda", dtype=torch.float8_e4m3fn)
    scales = torch.zeros(k // _BLOCK, -(-m // 4) * 4, device="cuda")
    gemm_module.get_fp8_blockscale_gemm_runner_sm90().fp8_quantize_1x128(activations, values, scales, False)
    return values.float() * scales[:, :m].T.repeat_interleave(_BLOCK, 1)
