"""Would DeepGEMM, here, find the kernels of an artifact? A fingerprint against an environment, field by field."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from cachebuilder.artifact.index import Index
from cachebuilder.deepgemm.installation import Installation
from cachebuilder.nvml import VisibleGpu

#: Variables that DeepGEMM reads and that change no key: where to look, what to print (``deep_jit/backend/cuda`` and
#: ``csrc/jit`` of the copies in docs/serving.md).
_HARMLESS = ("JIT_CACHE_DIR", "JIT_NVCC_COMPILER", "JIT_PRINT_COMPILER_COMMAND", "JIT_PRINT_LOAD_TIME", "PRINT_CONFIGS")
_OFF = ("", "0", "false", "no")

_BUILD_FOR_IT = "build an artifact for the DeepGEMM that serves: cachebuilder build --deep-gemm"


@dataclass(frozen=True)
class Mismatch:
    """One field in which artifact and environment differ.

    Attributes:
        causes_miss: DeepGEMM would not find its kernels; otherwise it is worth knowing, no more.
        remedy: what to do about it.
    """

    field: str
    wanted: str
    found: str
    causes_miss: bool
    remedy: str


def compare(
    index: Index,
    installation: Installation | None,
    gpu: VisibleGpu | None,
    environment: Mapping[str, str],
    frozen_nvcc: str | None = None,
) -> list[Mismatch]:
    """Every difference that matters; empty where each kernel of the artifact would be found.

    The compiler's text is not compared: the frozen nvcc gives it. The legacy install path is not either: entries are
    relocated. ``distribution`` binds nothing.

    Args:
        installation: the DeepGEMM that the engine will use, None where none was found.
        gpu: None where none is visible; arch and SM count are not compared then.
        environment: the serving process's variables.
        frozen_nvcc: the path of the frozen nvcc, which ``DG_JIT_NVCC_COMPILER`` may name.

    Raises:
        InstallationError: the installation is not whole.
    """
    found = _deep_gemm(index, installation)
    if gpu is not None:
        found += _gpu(index, gpu)
    return found + _environment(index, environment, frozen_nvcc)


def _deep_gemm(index: Index, installation: Installation | None) -> list[Mismatch]:
    wanted = index.fingerprint
    if installation is None:
        remedy = "install the engine first, name its copy with --deep-gemm PATH, or pass --force"
        return [Mismatch("deep_gemm", wanted.deep_gemm, "none", True, remedy)]
    if wanted.generation != installation.generation:
        # The rest would only say the same again: nothing of one generation is found by the other.
        text = f"{installation.generation} ({installation.version} in {installation.path})"
        return [Mismatch("generation", wanted.generation, text, True, _BUILD_FOR_IT)]
    facts = (
        ("deep_gemm", wanted.deep_gemm, installation.version, True),
        ("headers", wanted.headers, installation.headers_digest, True),
        # DeepJIT's keys hold CUTLASS's version (the extra signature), legacy's do not.
        ("cutlass", wanted.cutlass, installation.cutlass_version, wanted.generation == "deepjit"),
    )
    return [
        Mismatch(field, want, have, causes_miss, _BUILD_FOR_IT if causes_miss else "nothing: no key holds it")
        for field, want, have, causes_miss in facts
        if want != have
    ]


def _gpu(index: Index, gpu: VisibleGpu) -> list[Mismatch]:
    wanted = index.fingerprint
    found = []
    major, minor = gpu.capability
    # Legacy calls every 10.x but 10.1 sm_100 (csrc/jit/device_runtime.hpp, DeepGEMM 2.6.1).
    number = 100 if wanted.generation == "legacy" and major == 10 and minor != 1 else 10 * major + minor
    if re.sub(r"\D", "", wanted.arch) != str(number):
        remedy = "build for this GPU: target.gpu in the manifest"
        found.append(Mismatch("arch", wanted.arch, f"sm_{number} ({gpu.name})", True, remedy))
    elif gpu.sm_count is not None and gpu.sm_count not in wanted.sm_counts and _card_sms(index) != gpu.sm_count:
        counts = ", ".join(map(str, wanted.sm_counts))
        remedy = f"build for this GPU: target.gpu or target.sm_counts: [{gpu.sm_count}] in the manifest"
        found.append(Mismatch("sm_counts", counts, f"{gpu.sm_count} ({gpu.name})", True, remedy))
    return found


def _card_sms(index: Index) -> int | None:
    """The SM count of the card that was planned for: an engine may be told to use fewer than there are."""
    from cachebuilder.gpus import GPUS  # only where it comes to that: a restore is in a hurry

    card = GPUS.get(index.recorded.get("gpu", ""))
    return card.sm_count if card else None


def _environment(index: Index, environment: Mapping[str, str], frozen_nvcc: str | None) -> list[Mismatch]:
    wanted = {name: value for name, value in index.fingerprint.environment.items() if _changes_kernels(name, value)}
    set_here = {name: value for name, value in environment.items() if _changes_kernels(name, value)}
    found = []
    for name in sorted(wanted.keys() | set_here.keys()):
        want, have = wanted.get(name), set_here.get(name)
        if want == have:
            continue
        if have is None:
            # `cachebuilder env` and `run` set it for the serving process, which this one need not be.
            remedy = f"set {name}={want} in the serving process; cachebuilder env does"
            found.append(Mismatch(name, str(want), "not set", False, remedy))
        else:
            remedy = f"unset {name}, or build with it under environment: in the manifest"
            found.append(Mismatch(name, want or "not set", have, True, remedy))
    for name in ("DG_JIT_NVCC_COMPILER", "DJ_JIT_NVCC_COMPILER"):
        nvcc = environment.get(name)
        if nvcc and nvcc != frozen_nvcc:
            remedy = "cachebuilder env names the frozen nvcc instead"
            found.append(Mismatch(name, frozen_nvcc or "the frozen nvcc", nvcc, False, remedy))
    return found


def _changes_kernels(name: str, value: str) -> bool:
    prefix, _, rest = name.partition("_")
    return prefix in ("DG", "DJ") and rest not in _HARMLESS and value.lower() not in _OFF
