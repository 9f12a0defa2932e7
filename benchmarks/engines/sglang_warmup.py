"""The child of `check.py`: SGLang's own pre-compilation, on whatever GPU this process sees. Runs in SGLang's environment.

    python benchmarks/engines/sglang_warmup.py JOB.json RESULT.json

Real: SGLang's ``deep_gemm_wrapper.compile_utils`` as installed: ``update_deep_gemm_config`` makes the list of M and
``_compile_deep_gemm_one_type_all`` calls DeepGEMM at each. Replaced: the settings of the scheduler and the device that
they read (chunked prefill size, base GPU), the amount of free memory (unlimited), and the symmetric-memory hooks, which
need a process group.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from drain import drain


def run(job: dict[str, Any]) -> dict[str, Any]:
    import torch

    sys.setdlopenflags(os.RTLD_LAZY)  # extensions link to driver functions that the virtual GPU does not have
    os.environ["SGLANG_JIT_DEEPGEMM_FAST_WARMUP"] = "1" if job["mode"] == "fast" else "0"
    import deep_gemm
    import sglang
    from sglang.srt.layers.deep_gemm_wrapper import compile_utils, configurer

    assert configurer.ENABLE_JIT_DEEPGEMM, "SGLang does not recognise this as a GPU that DeepGEMM runs on"
    assert Path(deep_gemm.__file__).parent == Path(job["deep_gemm"]), deep_gemm.__file__
    compile_utils.get_schedule = lambda: SimpleNamespace(chunked_prefill_size=job["max_tokens"] // job["dp"])
    compile_utils.get_device = lambda: SimpleNamespace(base_gpu_id=0)
    compile_utils.get_available_gpu_memory = lambda **_: 1 << 20
    compile_utils.disable_symmetric_memory_context = lambda: None
    compile_utils.restore_symmetric_memory_context = lambda _: None
    empty = drain()

    def drained(items: Iterable[Any], **_: Any) -> Iterator[Any]:
        for item in items:
            empty()
            yield item

    compile_utils.tqdm = drained
    if configurer.ENABLE_JIT_DEEPGEMM and hasattr(deep_gemm, "set_pdl"):
        deep_gemm.set_pdl(True)  # as entrypoint.update_deep_gemm_config does
    compile_utils.update_deep_gemm_config(0)
    kinds = compile_utils.DeepGemmKernelType
    jobs = [(kinds.GEMM_NT_F8F8BF16, n, k, 1) for n, k in job["dense"]]
    for count, _, hidden, width in job["experts"]:
        jobs += [
            (kinds.GROUPED_GEMM_NT_F8F8BF16_CONTIG, 2 * width, hidden, count),
            (kinds.GROUPED_GEMM_NT_F8F8BF16_CONTIG, hidden, width, count),
        ]
    jobs += [(kinds.GROUPED_GEMM_NT_F8F8BF16_MASKED, n, k, count) for count, n, k in job["masked"]]
    for kind, n, k, count in jobs:
        compile_utils._compile_deep_gemm_one_type_all(
            kernel_type=kind, n=n, k=k, num_groups=count, m_list=compile_utils._BUILTIN_M_LIST
        )
    return {
        "engine": f"sglang {sglang.__version__}",
        "torch": torch.__version__,
        "gpu": torch.cuda.get_device_name(0),
        "shapes": len(jobs),
        "list": [len(compile_utils._BUILTIN_M_LIST), max(compile_utils._BUILTIN_M_LIST)],
    }


def main() -> None:
    result = run(json.loads(Path(sys.argv[1]).read_text()))
    Path(sys.argv[2]).write_text(json.dumps(result))
    sys.stdout.flush()
    os._exit(0)  # the destructors would tidy up a GPU that does not exist


if __name__ == "__main__":
    main()
