"""How FlashInfer names what it builds at run time, and where it looks for it.

Two kinds are kept: *modules*, which are shared libraries with host code, and the cubins of its copy of TensorRT-LLM's
DeepGEMM, which the module `GEMM_MODULE` compiles and loads. Facts are from FlashInfer 0.6.13 and 0.7.2.post1:
``jit/env.py``, ``jit/core.py`` and ``data/csrc/nv_internal/tensorrt_llm/deep_gemm/compiler.cuh`` and ``runtime.cuh``.
"""

from __future__ import annotations

import re

#: The module with the GEMMs, and FlashInfer's function that calls it.
GEMM_MODULE = "fp8_blockscale_gemm_90"
GEMM_FUNCTION = "fp8_blockscale_gemm_sm90"

#: The files of a GEMM's entry. FlashInfer reads the cubin only; the source is kept for whoever wants to look.
SOURCE, CUBIN = "kernel.cu", "nvcc_kernel.cubin"
FILES = (SOURCE, CUBIN)

#: The most bytes of each file. The module with the GEMMs has 3 MB, one of attention 20 MB.
MAX_BYTES = {SOURCE: 256 << 10, CUBIN: 64 << 20}
MAX_MODULE_BYTES = 512 << 20

_ENTRY = re.compile(r"gemm_(?:swapAB_)?[0-9]{1,7}(?:_[0-9]{1,8}){8}_[A-Za-z]{1,40}")
_MODULE = re.compile(r"[a-z0-9][a-zA-Z0-9_]{0,199}")


def is_entry(name: str) -> bool:
    """Whether ``name`` is the name of a GEMM's entry: shape, tiles, groups, stages, multicast and kind."""
    return _ENTRY.fullmatch(name) is not None


def is_module(name: str) -> bool:
    """Whether ``name`` can be the name of a module."""
    return _MODULE.fullmatch(name) is not None


def module_file(name: str) -> str:
    """The file of a module, in the folder that has its name."""
    return f"{name}.so"
