"""What a serving process must have set to run from a restored cache: each variable, its value and the reason.

The engines' parts were read in their own sources: vLLM 0.25.0 and 0.33.0 (``vllm/utils/deep_gemm.py``,
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

#: What cachebuilder itself reads, for the reference page; a test holds it to the code.
OWN_VARIABLES: dict[str, str] = {
    "CACHEBUILDER_CACHE_DIR": "plans, compiled kernels, scratch folders; else XDG_CACHE_HOME/cachebuilder",
    "CACHEBUILDER_KEY_PASSPHRASE": "the passphrase of a signing key, where nobody can be asked",
    "CACHEBUILDER_MISS_LOG": "where the frozen nvcc writes a miss; else DIR/cachebuilder/misses.jsonl",
    "CACHEBUILDER_ON_MISS": "the frozen nvcc's answer to a missing kernel: refuse (default), compile, compile-and-warn",
    "CACHEBUILDER_REAL_NVCC": "the nvcc that the compiling policies call; else the first on PATH that is not frozen",
    "CACHEBUILDER_RETRIES": "how often a transfer is tried again; else 5",
    "CACHEBUILDER_TRUST": "public keys, separated by ':', for every verb that has --trust, where that is not given",
    "CC": "the C compiler that builds the virtual GPU; else the first of cc, gcc, clang",
    "CUDA_DEVICE_ORDER": "with CUDA_VISIBLE_DEVICES: which GPU --device cuda uses",
    "CUDA_HOME": "its bin/nvcc compiles, unless --nvcc names another",
    "CUDA_PATH": "where CUDA_HOME is not set",
    "CUDA_VISIBLE_DEVICES": "which GPU --device cuda uses",
    "DOCKER_CONFIG": "the folder of docker's config.json, for a registry's credentials; else ~/.docker",
    "HTTPS_PROXY": "a proxy for registries, but for hosts in NO_PROXY",
    "NO_COLOR": "set to anything: no colour on a terminal",
    "NVCC_CCBIN": "nvcc's host compiler; else gcc",
    "PATH": "nvcc, where neither --nvcc nor CUDA_HOME names one",
    "REGISTRY_AUTH_FILE": "a file with a registry's credentials, before docker's",
    "REQUESTS_CA_BUNDLE": "certificate authorities for registries",
    "SOURCE_DATE_EPOCH": "the time of every member of an artifact, seconds since 1970; else 0",
    "TMPDIR": "where the frozen nvcc logs a miss when no other place can be written",
    "XDG_CACHE_HOME": "the user's cache folder; else ~/.cache",
}


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
        indexes: of the artifacts in ``dir``, from `open_folder`.
        scratch: DeepJIT's writable root; ``dir/scratch`` when left out. Legacy has none: it writes into ``dir``.
        environment: of the machine that serves: whether it has a CUDA home decides if one is named.

    Raises:
        RestoreError: the artifacts in ``dir`` want different things.
    """
    dir = Path(os.path.abspath(dir))
    generations = sorted({index.fingerprint.generation for index in indexes})
    if len(generations) != 1:
        raise RestoreError(
            f"{dir}: wanted artifacts of one cache generation, found {' and '.join(generations)}",
            hint="restore each generation into a folder of its own",
        )
    if generations[0] == "deepjit":
        roots = f"{Path(os.path.abspath(scratch)) if scratch else dir / 'scratch'}:{dir}"
        why = "a writable root first, for what the cache lacks; the restored one is only read (deep_jit/cache/disk.hpp)"
    else:
        roots, why = str(dir), "the restored root; legacy DeepGEMM knows one (csrc/jit/compiler.hpp, DeepGEMM 2.6.1)"
    found = [
        Variable("DG_JIT_CACHE_DIR", roots, why),
        Variable(
            "DG_JIT_NVCC_COMPILER",
            str(frozen.frozen_nvcc(dir)),
            "says the nvcc text that is in the kernels' keys, and makes a missing kernel an event",
        ),
    ]
    if not has_cuda_home(environment):
        why = "DeepGEMM does not load without one, and here is none: it holds the frozen nvcc and nothing else"
        found.append(Variable("CUDA_HOME", str(dir / frozen.FOLDER), why))
    found += _manifest_variables(dir, indexes)
    return found + _engine_variables(engine, generations[0], roots)


def has_cuda_home(environment: Mapping[str, str]) -> bool:
    """Whether DeepGEMM finds a CUDA home: ``CUDA_HOME`` or ``CUDA_PATH``, nvcc on ``PATH``, ``/usr/local/cuda``.

    The order is that of ``find_cuda_toolkit`` (deep_jit/backend/cuda/backend.hpp); a variable that is set and names no
    folder is fatal there.
    """
    if named := environment.get("CUDA_HOME") or environment.get("CUDA_PATH"):
        return os.path.isdir(named)
    on_path = (os.path.join(folder, "nvcc") for folder in environment.get("PATH", "").split(":") if folder)
    return any(os.access(nvcc, os.X_OK) and os.path.isfile(nvcc) for nvcc in on_path) or os.path.isdir(
        "/usr/local/cuda"
    )


def _manifest_variables(dir: Path, indexes: Sequence[Index]) -> list[Variable]:
    wanted: dict[str, str] = {}
    for index in indexes:
        for name, value in index.fingerprint.environment.items():
            if wanted.setdefault(name, value) != value:
                raise RestoreError(
                    f"{dir}: its artifacts want different values of {name}: {wanted[name]} and {value}",
                    hint="restore them into folders of their own",
                )
    return [Variable(name, value, "the manifest's environment: it changes kernels") for name, value in wanted.items()]


def _engine_variables(engine: Engine, generation: Generation, roots: str) -> list[Variable]:
    if engine == "vllm":
        # DG_JIT_CACHE_DIR is kept if set; only otherwise does vLLM take VLLM_CACHE_ROOT/deep_gemm. That root is left
        # alone: vLLM keeps much else in it.
        why = (
            "no warm-up: every kernel is there. vLLM keeps DG_JIT_CACHE_DIR as set, VLLM_CACHE_ROOT need not be "
            "(vllm/envs.py, vllm/utils/deep_gemm.py, 0.25.0 and 0.33.0)"
        )
        return [Variable("VLLM_DEEP_GEMM_WARMUP", "skip", why)]
    if engine == "sglang":
        source = "sglang/srt/layers/deep_gemm_wrapper/compile_utils.py, 0.5.15 and 0.5.23"
        found = [
            Variable("SGLANG_DG_CACHE_DIR", roots, f"SGLang overwrites DG_JIT_CACHE_DIR with it ({source})"),
            # The pre-compilation's lock files would go into the folder "<scratch>:<dir>/locks" (0.5.23).
            Variable(
                "SGLANG_JIT_DEEPGEMM_PRECOMPILE",
                "0",
                f"no warm-up: every kernel is there; its lock files also cannot handle a list of roots ({source})",
            ),
        ]
        if generation == "legacy":
            # Named SGL_… in 0.5.15; later SGLang has the other name, and DeepJIT has no NVRTC.
            why = (
                "SGLang sets DG_JIT_USE_NVRTC by it: NVRTC's kernels have other keys, and the frozen nvcc sees no miss"
            )
            found += [Variable(name, "0", why) for name in ("SGL_DG_USE_NVRTC", "SGLANG_DG_USE_NVRTC")]
        return found
    return []
