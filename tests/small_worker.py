"""What each worker of `small_engine` does. The engine's first process does not import torch."""

from __future__ import annotations

import ctypes

import torch
import triton
import triton.language as tl

BLOCK = 128


@triton.jit
def add(x, y, out, n, block: tl.constexpr):
    at = tl.program_id(0) * block + tl.arange(0, block)
    tl.store(out + at, tl.load(x + at, at < n) + tl.load(y + at, at < n), at < n)


def quantised(rows: int, k: int, block: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    data = torch.empty(rows, k, device="cuda", dtype=torch.float8_e4m3fn)
    return data, torch.empty(-(-rows // block), k // BLOCK, device="cuda", dtype=torch.float32)


def linear(deep_gemm, m: int, n: int, k: int) -> None:
    deep_gemm.fp8_gemm_nt(
        quantised(m, k), quantised(n, k, BLOCK), torch.empty(m, n, device="cuda", dtype=torch.bfloat16)
    )


def experts(deep_gemm, rows: int) -> None:
    weight = torch.empty(2, 256, 512, device="cuda", dtype=torch.float8_e4m3fn)
    scales = torch.empty(2, 2, 4, device="cuda", dtype=torch.float32)
    out = torch.empty(rows, 256, device="cuda", dtype=torch.bfloat16)
    layout = torch.zeros(rows, device="cuda", dtype=torch.int32)
    deep_gemm.m_grouped_fp8_gemm_nt_contiguous(quantised(rows, 512), (weight, scales), out, layout)


def without_op(deep_gemm) -> None:
    """cuBLASLt serves this function, so no op is for it."""
    a, b = (torch.empty(64, 64, device="cuda", dtype=torch.bfloat16) for _ in "ab")
    deep_gemm.cublaslt_gemm_nt(a, b, torch.empty(64, 64, device="cuda", dtype=torch.bfloat16))


def work(rank: int, function: str | None) -> None:
    torch.cuda.set_device(0)
    if function:
        getattr(ctypes.CDLL(None), function)(0, 0, 0, 0, 0, 0, 0, 0)
    x = torch.ones(1000, device="cuda")
    add[(triton.cdiv(1000, BLOCK),)](x, x, torch.empty_like(x), 1000, block=BLOCK)
    torch.mm(x.view(10, 100), x.view(100, 10))
    import deep_gemm

    for m in (1, 8, 40):
        linear(deep_gemm, m, 576, 512)
    if rank:
        deep_gemm.set_num_sms(100)
        linear(deep_gemm, 16, 1024, 512)
    else:
        experts(deep_gemm, 256)
        without_op(deep_gemm)
