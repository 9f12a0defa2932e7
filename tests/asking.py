"""A program that uses DeepGEMM, for the tests of `record`: ``python -m tests.asking FOLDER STEP…`` on a virtual H200.

FOLDER holds the deep_gemm package. The steps: ``layout4`` and ``layout5`` ask for one small kernel each, ``dense`` for the
first GEMM of the tests' small manifest, ``refused`` for a kernel that nvcc refuses; ``stay`` waits until the program is ended; a number is the exit code.
"""

from __future__ import annotations

import os
import sys
import time
from typing import Any

from cachebuilder.cuda import gpus
from cachebuilder.virtual_gpu import library as virtual_gpu


def main(folder: str, *steps: str) -> None:
    if "LD_PRELOAD" not in os.environ:  # the linker reads it when a program starts
        os.environ |= virtual_gpu.environment(gpus.find("H200")) | {"VIRTUAL_GPU_CHECK_CUBINS": "1"}
        os.execv(sys.executable, [sys.executable, "-m", "tests.asking", folder, *steps])
    sys.path.insert(0, folder)
    import deep_gemm
    import torch
    from deep_gemm.utils.layout import get_mn_major_tma_aligned_tensor

    def empty(*shape: int, dtype: Any = torch.float32) -> Any:
        return torch.empty(shape, device="cuda", dtype=dtype)

    def operands(rows: int, scale_rows: int) -> Any:
        return empty(rows, 512, dtype=torch.float8_e4m3fn), empty(scale_rows, 4)

    for step in steps:
        if step.startswith("layout"):
            get_mn_major_tma_aligned_tensor(empty(64, int(step[-1])))
        elif step == "dense":
            out = empty(16, 576, dtype=torch.bfloat16)
            deep_gemm.fp8_gemm_nt(operands(16, 16), operands(576, 5), out, compiled_dims="nk")
        elif step == "refused":  # ops/dense.py, ScaledGemm.points, says why
            out = empty(16, 256)
            try:
                deep_gemm.fp8_gemm_nt(operands(16, 16), operands(256, 256), out, c=out, recipe=(1, 1, 128))
            except Exception as error:
                print("refused:", error)
        elif step == "stay":
            print("asked", flush=True)
            time.sleep(600)
        else:
            sys.stdout.flush()
            os._exit(int(step))  # DeepGEMM's destructors would clean up a GPU that does not exist


if __name__ == "__main__":
    main(*sys.argv[1:])
