"""The variables that a process needs to serve from a restored cache: each one's value and the reason.

Facts about the engines are from their sources: vLLM 0.25.0, 0.32.0 and 0.33.0 (``vllm/utils/deep_gemm.py``,
``vllm/utils/flashinfer.py``, ``vllm/envs.py``, ``vllm/model_executor/warmup/kernel_warmup.py``,
``vllm/model_executor/kernels/linear/scaled_mm/flashinfer.py``, ``vllm/v1/sample/ops/topk_topp_sampler.py``), SGLang
0.5.15 and 0.5.23 (``sglang/srt/layers/deep_gemm_wrapper/compile_utils.py``, ``sglang/srt/environ.py``,
``sglang/srt/layers/quantization/fp8_utils.py``), FlashInfer 0.6.13 and 0.7.2 (``flashinfer/jit/``).
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cachebuilder.artifact.index import Index
from cachebuilder.deepgemm import installation
from cachebuilder.deepgemm.generation import Generation
from cachebuilder.errors import RestoreError
from cachebuilder.restoring import baked, frozen
from cachebuilder.restoring.place import Place, generation_of

Engine = Literal["vllm", "sglang", "none"]
ENGINES: tuple[Engine, ...] = ("vllm", "sglang", "none")

#: vLLM serves block-FP8 products with M < 32 on SM90 by FlashInfer's own DeepGEMM, unless this variable is 0.
FLASHINFER_GEMM = "VLLM_BLOCKSCALE_FP8_GEMM_FLASHINFER"
#: vLLM samples by FlashInfer's kernels, unless this variable is 0.
FLASHINFER_SAMPLER = "VLLM_USE_FLASHINFER_SAMPLER"
#: SGLang's `--fp8-gemm-backend` for the same kernels. The default on SM90 is DeepGEMM, and no variable sets it.
SGLANG_FLASHINFER_GEMM = "flashinfer_deepgemm"

_COMPILES = "FlashInfer compiles with ninja and nvcc at the first tokens, and this artifact does not hold them"


@dataclass(frozen=True)
class Variable:
    """One environment variable and why it is set."""

    name: str
    value: str
    why: str


def variables(place: Place, indexes: Sequence[Index], engine: Engine, environment: Mapping[str, str]) -> list[Variable]:
    """The variables for a process that serves from ``place``.

    Args:
        indexes: those of the artifacts in its folder.
        environment: the serving machine's variables: `CUDA_HOME` is added only if they lead to no CUDA home.

    Raises:
        RestoreError: the artifacts are of two generations, or need different values of a variable.
    """
    dir = place.dir
    generation = generation_of(dir, indexes)
    roots = ":".join(map(str, place.roots))
    if generation == "deepjit":
        why = "a writable root first, for what the cache lacks; the restored one is only read (deep_jit/cache/disk.hpp)"
    elif dir in place.roots:
        why = "the restored root; legacy DeepGEMM has only one root (csrc/jit/compiler.hpp, DeepGEMM 2.6.1)"
    else:
        why = "a writable root with links to the entries; legacy DeepGEMM has only one (csrc/jit/compiler.hpp, 2.6.1)"
    serving = [
        Variable("DG_JIT_CACHE_DIR", roots, why),
        Variable(
            "DG_JIT_NVCC_COMPILER",
            str(place.nvcc),
            "answers with the nvcc text that is in the kernels' keys, and logs every missing kernel",
        ),
    ]
    if place.log is not None and frozen.LOG_VARIABLE not in environment:
        why = "the log of misses, since the frozen nvcc cannot write it beside itself"
        serving.append(Variable(frozen.LOG_VARIABLE, str(place.log), why))
    if not has_cuda_home(environment):
        why = (
            "DeepGEMM does not load without a CUDA home, and takes any folder. This one has no bin/nvcc: FlashInfer, "
            "TileLang and others must not take the frozen nvcc for a compiler, and vLLM 0.32.0 and later switch "
            "FlashInfer off where there is none"
        )
        serving.append(Variable("CUDA_HOME", str(dir), why))
    serving += _manifest_variables(dir, indexes)
    if place.flashinfer:
        serving += _flashinfer_variables(place, place.flashinfer, environment)
    if engine == "vllm":
        serving += _vllm_variables(indexes, environment)
    elif engine == "sglang":
        serving += _sglang_variables(generation, roots)
    if place.baked:
        serving += [Variable(name, value, why) for name, (value, why) in baked.variables(dir).items()]
    return serving


def notes(
    indexes: Sequence[Index], engine: Engine, environment: Mapping[str, str], command: Sequence[str]
) -> list[str]:
    """What ``engine`` would compile because the user asks for it, in a sentence each.

    Args:
        environment: the machine's variables; one that is set there stays as it is.
        command: how the engine is started.
    """
    if not any(index.fingerprint.arch == "sm_90a" and not has_gemms(index) for index in indexes):
        return []
    if engine == "vllm" and _is_on(environment, FLASHINFER_GEMM):
        value = environment[FLASHINFER_GEMM]
        return [f"{FLASHINFER_GEMM}={value} is set and stays: for M < 32, vLLM calls kernels that {_COMPILES}"]
    if engine == "sglang" and any(word.endswith(SGLANG_FLASHINFER_GEMM) for word in command):
        return [
            f"--fp8-gemm-backend {SGLANG_FLASHINFER_GEMM}: for M < 32, SGLang calls kernels that {_COMPILES}; "
            "deep_gemm serves every M from the cache"
        ]
    return []


def has_gemms(index: Index) -> bool:
    """Whether an artifact holds kernels for FlashInfer's GEMM."""
    return index.flashinfer is not None and bool(index.flashinfer.entries)


def uncovered(arch: str, environment: Mapping[str, str]) -> str | None:
    """What vLLM would serve on ``arch`` without an artifact's kernels, in a sentence; None where that is nothing.

    For an artifact without kernels for FlashInfer's GEMM.
    """
    if arch != "sm_90a" or _is_off(environment, FLASHINFER_GEMM):
        return None
    return (
        f"vLLM takes kernels for M < 32 that {_COMPILES}, unless {FLASHINFER_GEMM}=0: "
        "cachebuilder env --engine vllm sets it"
    )


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


def _flashinfer_variables(place: Place, folder: Path, environment: Mapping[str, str]) -> list[Variable]:
    source = "flashinfer/data/csrc/nv_internal/tensorrt_llm/deep_gemm/compiler.cuh, 0.6.13 and 0.7.2"
    path = os.pathsep.join(filter(None, [str(folder / "python"), environment.get("PYTHONPATH")]))
    return [
        Variable("TRTLLM_DG_CACHE_DIR", str(folder), f"the cubins of FlashInfer's GEMM ({source})"),
        Variable(
            "TRTLLM_DG_NVCC_COMPILER", str(place.nvcc), f"logs every kernel that FlashInfer's GEMM misses ({source})"
        ),
        Variable(
            "PYTHONPATH",
            path,
            "a package in place of flashinfer-jit-cache, from which FlashInfer loads its modules without compiling "
            "(flashinfer/jit/env.py, 0.6.13 and 0.7.2)",
        ),
    ]


def _vllm_variables(indexes: Sequence[Index], environment: Mapping[str, str]) -> list[Variable]:
    # VLLM_CACHE_ROOT stays as it is, since vLLM keeps much else there.
    why = (
        "no warm-up: every kernel is in the cache. vLLM takes DG_JIT_CACHE_DIR where it is set, else "
        "VLLM_CACHE_ROOT/deep_gemm (vllm/envs.py, vllm/utils/deep_gemm.py, 0.25.0 and 0.33.0)"
    )
    serving = [Variable("VLLM_DEEP_GEMM_WARMUP", "skip", why)]
    if any(index.fingerprint.arch == "sm_90a" and not has_gemms(index) for index in indexes):
        if _is_on(environment, FLASHINFER_GEMM):
            why = f"set here, so it stays: for M < 32, vLLM calls kernels that {_COMPILES}. 0 takes those of the cache"
            serving.append(Variable(FLASHINFER_GEMM, environment[FLASHINFER_GEMM], why))
        else:
            why = (
                f"every M is served from the cache: for M < 32, vLLM would call kernels that {_COMPILES} "
                "(vllm/model_executor/kernels/linear/scaled_mm/flashinfer.py, 0.25.0 to 0.33.0). They are 5 to 8 % "
                "faster end to end at small batches (SGLang's pull request 15514)"
            )
            serving.append(Variable(FLASHINFER_GEMM, "0", why))
    modules = {module.name for index in indexes if index.flashinfer for module in index.flashinfer.modules}
    can_sample = "sampling" in modules or _flashinfer_can_sample(environment)
    if not environment.get(FLASHINFER_SAMPLER) and not can_sample:
        why = (
            "no nvcc is here, and FlashInfer would compile its sampler while vLLM starts: vLLM's own samples "
            "(vllm/v1/sample/ops/topk_topp_sampler.py, 0.25.0 to 0.33.0)"
        )
        serving.append(Variable(FLASHINFER_SAMPLER, "0", why))
    return serving


def _is_off(environment: Mapping[str, str], name: str) -> bool:
    """Whether a switch of vLLM's is set and off: vLLM reads it as a number (vllm/envs.py)."""
    try:
        return int(environment.get(name, "")) == 0
    except ValueError:
        return False


def _is_on(environment: Mapping[str, str], name: str) -> bool:
    return bool(environment.get(name)) and not _is_off(environment, name)


def _flashinfer_can_sample(environment: Mapping[str, str]) -> bool:
    """Whether FlashInfer has its module ``sampling`` or an nvcc to build it with (flashinfer/jit/env.py, cpp_ext.py).

    Also where FlashInfer is not installed here: then nothing is known about the image that serves.
    """
    flashinfer = installation.package_folder("flashinfer")
    if flashinfer is None or installation.package_folder("flashinfer_jit_cache"):
        return True
    if (flashinfer / "data" / "aot" / "sampling" / "sampling.so").is_file():
        return True
    home = environment.get("CUDA_HOME") or environment.get("CUDA_PATH")
    on_path = shutil.which("nvcc", path=environment.get("PATH", ""))
    nvcc = os.path.join(home, "bin", "nvcc") if home else on_path or "/usr/local/cuda/bin/nvcc"
    return os.access(nvcc, os.X_OK) and not frozen.is_frozen(Path(nvcc))


def _sglang_variables(generation: Generation, roots: str) -> list[Variable]:
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
