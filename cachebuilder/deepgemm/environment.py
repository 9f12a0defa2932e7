"""What DeepGEMM reads from its environment: where its caches are, and which variables change a kernel's key.

Facts from ``deep_jit/utils/env.hpp``, ``deep_jit/cache/disk.hpp`` and ``deep_jit/backend/cuda/options.hpp`` in
sgl-deep-gemm 0.2.3.post2 (DeepJIT), and from ``csrc/jit/compiler.hpp`` of DeepGEMM 2.6.1 (legacy).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from cachebuilder.deepgemm.installation import Generation

#: Variables, without their prefix, that put a flag into every key. ``JIT_DUMP_…`` and ``JIT_PRINT_…`` do not.
_FLAGS: dict[Generation, tuple[str, ...]] = {
    "deepjit": (
        "JIT_DEBUG",
        "JIT_PTXAS_VERBOSE",
        "JIT_CHECK_NO_SPILLS",
        "JIT_CHECK_NO_LOCAL_MEMORY",
        "JIT_WITH_LINEINFO",
    ),
    "legacy": ("JIT_DEBUG", "JIT_PTXAS_VERBOSE", "JIT_PTXAS_CHECK", "JIT_WITH_LINEINFO", "JIT_USE_NVRTC"),
}
_CPP_STANDARD, _DEFAULT_CPP_STANDARD = "JIT_CPP_STANDARD", "20"
#: Each generation's prefixes, first choice first.
_PREFIXES: dict[Generation, tuple[str, ...]] = {"deepjit": ("DG", "DJ"), "legacy": ("DG",)}


def get(generation: Generation, environment: Mapping[str, str], suffix: str) -> tuple[str, str] | None:
    """The variable that DeepGEMM takes for ``suffix``, as ``JIT_DEBUG``, and its value; None where none is set."""
    for prefix in _PREFIXES[generation]:
        if (value := environment.get(name := f"{prefix}_{suffix}")) is not None:
            return name, value
    return None


def key_variables(generation: Generation, environment: Mapping[str, str]) -> dict[str, str]:
    """The variables of ``environment`` that make keys differ from those of an empty one."""
    found = {}
    for suffix in _FLAGS[generation]:
        variable = get(generation, environment, suffix)
        if variable and variable[1].lower() not in ("", "0", "false", "no"):
            found[variable[0]] = variable[1]
    standard = get(generation, environment, _CPP_STANDARD)
    if standard and standard[1] != _DEFAULT_CPP_STANDARD:
        found[standard[0]] = standard[1]
    return found


def cache_roots(generation: Generation, environment: Mapping[str, str], home: Path) -> tuple[str, list[Path]]:
    """Which variable (or default) names the cache roots, and the roots, the writable one first."""
    variable = get(generation, environment, "JIT_CACHE_DIR")
    if generation == "legacy":
        if variable and variable[1]:
            return variable[0], [Path(variable[1])]
        return "default", [home / ".deep_gemm"]
    if variable:
        return variable[0], [Path(part) for part in variable[1].split(":") if part]
    return "default", [home / ".dj"]
