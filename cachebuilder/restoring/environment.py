"""The variables that a process needs to serve from a restored cache: each one's value and the reason.

Facts about the engines are from their sources: vLLM 0.25.0 and 0.33.0 (``vllm/utils/deep_gemm.py``,
``vllm/envs.py``, ``vllm/model_executor/warmup/kernel_warmup.py``), SGLang 0.5.15 and 0.5.23
(``sglang/srt/layers/deep_gemm_wrapper/compile_utils.py``, ``sglang/srt/environ.py``).
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cachebuilder.artifact.index import Index
from cachebuilder.deepgemm.generation import Generation
from cachebuilder.errors import RestoreError
from cachebuilder.restoring import frozen

Engine = Literal["vllm", "sglang", "none"]
ENGINES: tuple[Engine, ...] = ("vllm", "sglang", "none")


@dataclass(frozen=True)
class Variable:
    """One environment variable and why it is set."""

    name: str
    value: str
    why: str


def variables(
    dir: Path, indexes: Sequence[Index], engine: Engine, scratch: Path | None, environment: Mapping[str, str]
) -> list[Variable]:
    """The variables for a process that serves from ``dir``.

    Args:
        indexes: those of the artifacts in ``dir``.
        scratch: DeepJIT's writable root; default: ``dir/scratch``. Legacy has no such root: it writes into ``dir``.
        environment: the serving machine's variables: `CUDA_HOME` is added only if they lead to no CUDA home.

    Raises:
        RestoreError: the artifacts in ``dir`` are of two generations, or need different values of a variable.
    """
    dir = Path(os.path.abspath(dir))
    generation, *more = sorted({index.fingerprint.generation for index in indexes})
    if more:
        raise RestoreError(
            f"{dir}: wanted artifacts of one cache generation, found {generation} and {more[0]}",
            hint="restore each generation into a folder of its own",
        )
    if generation == "deepjit":
        roots = f"{Path(os.path.abspath(scratch)) if scratch else dir / 'scratch'}:{dir}"
        why = "a writable root first, for what the cache lacks; the restored one is only read (deep_jit/cache/disk.hpp)"
    else:
        roots = str(dir)
        why = "the restored root; legacy DeepGEMM has only one root (csrc/jit/compiler.hpp, DeepGEMM 2.6.1)"
    serving = [
        Variable("DG_JIT_CACHE_DIR", roots, why),
        Variable(
            "DG_JIT_NVCC_COMPILER",
            str(frozen.frozen_nvcc(dir)),
            "answers with the nvcc text that is in the kernels' keys, and logs every missing kernel",
        ),
    ]
    if not has_cuda_home(environment):
        why = "DeepGEMM does not load without a CUDA home; this folder holds the frozen nvcc and nothing else"
        serving.append(Variable("CUDA_HOME", str(dir / frozen.FOLDER), why))
    serving += _manifest_variables(dir, indexes)
    return serving + _engine_variables(engine, generation, roots)


def has_cuda_home(environment: Mapping[str, str]) -> bool:
    """Whether DeepGEMM finds a CUDA home: ``CUDA_HOME`` or ``CUDA_PATH``, nvcc on ``PATH``, ``/usr/local/cuda``.

    The order is that of ``find_cuda_toolkit`` (deep_jit/backend/cuda/backend.hpp), which aborts where a variable is set
    and names no folder.
    """
    if named := environment.get("CUDA_HOME") or environment.get("CUDA_PATH"):
        return os.path.isdir(named)
    on_path = (os.path.join(folder, "nvcc") for folder in environment.get("PATH", "").split(":") if folder)
    return any(os.access(nvcc, os.X_OK) and os.path.isfile(nvcc) for nvcc in on_path) or os.path.isdir(
        "/usr/local/cuda"
    )


def _manifest_variables(dir: Path, indexes: Sequence[Index]) -> list[Variable]:
    values: dict[str, str] = {}
    for index in indexes:
        for name, value in index.fingerprint.environment.items():
            if values.setdefault(name, value) != value:
                raise RestoreError(
                    f"{dir}: its artifacts need different values of {name}: {values[name]} and {value}",
                    hint="restore them into folders of their own",
                )
    return [Variable(name, value, "the manifest's environment: it changes kernels") for name, value in values.items()]


def _engine_variables(engine: Engine, generation: Generation, roots: str) -> list[Variable]:
    if engine == "vllm":
        # VLLM_CACHE_ROOT stays as it is, since vLLM keeps much else there.
        why = (
            "no warm-up: every kernel is in the cache. vLLM takes DG_JIT_CACHE_DIR where it is set, else "
            "VLLM_CACHE_ROOT/deep_gemm (vllm/envs.py, vllm/utils/deep_gemm.py, 0.25.0 and 0.33.0)"
        )
        return [Variable("VLLM_DEEP_GEMM_WARMUP", "skip", why)]
    if engine == "sglang":
        source = "sglang/srt/layers/deep_gemm_wrapper/compile_utils.py, 0.5.15 and 0.5.23"
        sglang = [
            Variable("SGLANG_DG_CACHE_DIR", roots, f"SGLang overwrites DG_JIT_CACHE_DIR with it ({source})"),
            # The warm-up's lock files would go into a folder called "<scratch>:<dir>/locks" (0.5.23).
            Variable(
                "SGLANG_JIT_DEEPGEMM_PRECOMPILE",
                "0",
                f"no warm-up: every kernel is in the cache, and its lock files need a single root ({source})",
            ),
        ]
        if generation == "legacy":
            # SGLang 0.5.15 calls it SGL_…, later versions SGLANG_….
            why = "SGLang sets DG_JIT_USE_NVRTC to it: NVRTC's keys differ, and the frozen nvcc sees no miss"
            sglang += [Variable(name, "0", why) for name in ("SGL_DG_USE_NVRTC", "SGLANG_DG_USE_NVRTC")]
        return sglang
    return []
