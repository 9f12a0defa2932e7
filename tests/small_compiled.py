"""A program that compiles as an engine does: by torch.compile, with several candidates for a kernel, and by Triton."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import torch
import triton
import triton.language as tl
from torch._dynamo.utils import counters


@triton.jit
def add_one(x, n, block: tl.constexpr):
    at = tl.program_id(0) * block + tl.arange(0, block)
    tl.store(x + at, tl.load(x + at, at < n) + 1, at < n)


def norm(x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.rms_norm(torch.nn.functional.silu(x.float()), (4096,)).to(x.dtype)


def registers_from_file(cubin: Path) -> int:
    """The registers of add_one when its file is loaded, as torch's own launcher of Triton kernels does."""
    driver, module, function = ctypes.CDLL("libcuda.so.1"), ctypes.c_void_p(), ctypes.c_void_p()
    registers = ctypes.c_int()
    assert driver.cuModuleLoad(ctypes.byref(module), bytes(cubin)) == 0
    assert driver.cuModuleGetFunction(ctypes.byref(function), module, b"add_one") == 0
    assert driver.cuFuncGetAttribute(ctypes.byref(registers), 4, function) == 0  # CU_FUNC_ATTRIBUTE_NUM_REGS
    return registers.value


x = torch.zeros(512, 4096, device="cuda", dtype=torch.bfloat16)
torch.compile(norm)(x)
kernel = add_one[(4,)](torch.zeros(1000, device="cuda"), 1000, block=256)
torch.cuda.synchronize()
print("CACHES", {name: counters["inductor"][f"fxgraph_cache_{name}"] for name in ("hit", "miss")})
(cubin,) = Path(os.environ["TRITON_CACHE_DIR"]).rglob("add_one.cubin")
print("REGISTERS", kernel.n_regs, registers_from_file(cubin))
