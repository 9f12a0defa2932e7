"""What DeepGEMM reads from its environment: where its caches are, and which variables change its kernels.

Facts are from ``deep_jit/utils/env.hpp``, ``deep_jit/cache/disk.hpp`` and ``deep_jit/backend/cuda/options.hpp`` in
sgl-deep-gemm 0.2.3.post2 (DeepJIT), and from ``csrc/jit/compiler.hpp`` of DeepGEMM 2.6.1 (legacy).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field

from cachebuilder.deepgemm.generation import Generation

#: Variables, without their prefix, that add a flag to every key if they are on.
FLAGS: dict[Generation, tuple[str, ...]] = {
    "deepjit": (
        "JIT_DEBUG",
        "JIT_PTXAS_VERBOSE",
        "JIT_CHECK_NO_SPILLS",
        "JIT_CHECK_NO_LOCAL_MEMORY",
        "JIT_WITH_LINEINFO",
    ),
    "legacy": ("JIT_DEBUG", "JIT_PTXAS_VERBOSE", "JIT_PTXAS_CHECK", "JIT_WITH_LINEINFO", "JIT_USE_NVRTC"),
}
#: The flags of nvcc that these variables add.
ADDED_FLAGS: dict[Generation, dict[str, tuple[str, ...]]] = {
    "deepjit": {
        "JIT_DEBUG": ("--ptxas-options=--verbose", "--generate-line-info"),
        "JIT_PTXAS_VERBOSE": ("--ptxas-options=--verbose",),
        "JIT_CHECK_NO_SPILLS": ("--ptxas-options=--warn-on-spills",),
        "JIT_CHECK_NO_LOCAL_MEMORY": ("--ptxas-options=--warn-on-local-memory-usage",),
        "JIT_WITH_LINEINFO": ("--generate-line-info",),
    },
    "legacy": {
        "JIT_DEBUG": ("--ptxas-options=--verbose,--warn-on-local-memory-usage",),
        "JIT_PTXAS_VERBOSE": ("--ptxas-options=--verbose,--warn-on-local-memory-usage",),
        "JIT_PTXAS_CHECK": ("--ptxas-options=--verbose,--warn-on-local-memory-usage",),
        "JIT_WITH_LINEINFO": ("-Xcompiler", "-rdynamic", "-lineinfo"),
    },
}
_ALL_FLAGS = frozenset(FLAGS["deepjit"] + FLAGS["legacy"])
#: Variables that change no kernel: where to look, what to print or dump, how cuBLASLt is used.
_HARMLESS = re.compile(
    r"JIT_CACHE_DIR|JIT_NVCC_COMPILER|JIT_PRINT_\w+|JIT_DUMP_\w+|PRINT_CONFIGS|USE_(PYTORCH|TEMP)_\w*CUBLASLT\w*"
)
_OFF = ("", "0", "false", "no")
#: The variable that changes a flag, and the value that it has by default.
CPP_STANDARD, _DEFAULT_CPP_STANDARD = "JIT_CPP_STANDARD", "20"
#: Each generation's prefixes; a variable with an earlier one is preferred.
PREFIXES: dict[Generation, tuple[str, ...]] = {"deepjit": ("DG", "DJ"), "legacy": ("DG",)}

#: What a variable of DeepGEMM is called. Shells, container files and compilers take such a name for nothing else.
_NAME = re.compile(r"(DG|DJ)_([A-Z0-9_]{1,96})")
#: Variables, without their prefix, that only cachebuilder sets: where kernels come from, and which compiler is asked.
_RESERVED = ("JIT_CACHE_DIR", "JIT_NVCC_COMPILER", "JIT_USE_NVRTC")
_MAX_VARIABLES, _MAX_VALUE_LENGTH = 64, 1024


def _check(environment: dict[str, str]) -> dict[str, str]:
    if len(environment) > _MAX_VARIABLES:
        raise ValueError(f"wanted at most {_MAX_VARIABLES} variables, found {len(environment)}")
    for name, value in environment.items():
        match = _NAME.fullmatch(name)
        if match is None:
            raise ValueError(f"wanted variables that DeepGEMM reads (DG_… or DJ_…, in capitals), found {name[:100]!r}")
        if match[2] in _RESERVED:
            raise ValueError(f"cachebuilder sets {name} itself: leave it out of the manifest")
        if not value.isprintable() or len(value) > _MAX_VALUE_LENGTH:
            raise ValueError(f"{name}: wanted up to {_MAX_VALUE_LENGTH} printable characters, found {value[:60]!r}")
    return environment


#: Variables of DeepGEMM that a manifest, an artifact or a registry names. They become shell code, container files and
#: the environment of processes, so this is the one rule for all three.
KernelEnvironment = Annotated[
    dict[str, str],
    AfterValidator(_check),
    Field(
        json_schema_extra={
            "additionalProperties": {"type": "string", "maxLength": _MAX_VALUE_LENGTH},
            "maxProperties": _MAX_VARIABLES,
            "propertyNames": {"pattern": f"^{_NAME.pattern}$", "not": {"pattern": f"^D[GJ]_({'|'.join(_RESERVED)})$"}},
        }
    ),
]


def get(generation: Generation, environment: Mapping[str, str], suffix: str) -> tuple[str, str] | None:
    """Name and value of the variable that DeepGEMM reads for ``suffix`` (``JIT_DEBUG``); None where none is set."""
    for prefix in PREFIXES[generation]:
        if (value := environment.get(name := f"{prefix}_{suffix}")) is not None:
            return name, value
    return None


def kernel_variables(generation: Generation, environment: Mapping[str, str]) -> dict[str, str]:
    """The variables of ``environment`` that change DeepGEMM's kernels or their keys, with their values.

    An unknown ``DG_…`` variable counts as one: every version reads some of its own (``DG_SM90_FP8_SWAP_AB`` in
    sgl-deep-gemm 0.2.3.post2, ``DG_NVFP4_MOE_BLOCK_M`` in vLLM 0.33.0's copy), and most of them choose a kernel.
    """
    changing = {}
    for name in environment:
        prefix, _, suffix = name.partition("_")
        of_other_generation = suffix in _ALL_FLAGS and suffix not in FLAGS[generation]
        if prefix not in PREFIXES[generation] or _HARMLESS.fullmatch(suffix) or of_other_generation:
            continue
        taken, value = get(generation, environment, suffix) or (name, "")
        off = value.lower() in _OFF if suffix in FLAGS[generation] else not value
        if taken == name and not off and (suffix, value) != (CPP_STANDARD, _DEFAULT_CPP_STANDARD):
            changing[name] = value
    return changing


def value_problem(generation: Generation, environment: Mapping[str, str]) -> str | None:
    """Why DeepGEMM does not take the value of one of its variables; None where it takes all of them.

    DeepJIT raises for another value than these. Legacy then goes on with whatever number is in memory
    (``get_env``, ``csrc/utils/system.hpp``), so each process may look for other keys.
    """
    for name, value in environment.items():
        suffix = name.partition("_")[2]
        if suffix == CPP_STANDARD and not (value.isascii() and value.isdecimal()):
            return f"{name}: wanted a C++ standard, as 20, found {value!r}"
        is_number = re.fullmatch(r"-?[0-9]{1,9}", value) is not None
        is_word = generation == "deepjit" and value.lower() in ("true", "yes", "false", "no")
        if suffix in FLAGS[generation] and not (is_number or is_word):
            words = "a number, true, yes, false or no" if generation == "deepjit" else "a number"
            return f"{name}: wanted {words}, found {value!r}"
    return None


def cache_roots(generation: Generation, environment: Mapping[str, str]) -> tuple[str, list[Path]]:
    """What names the cache roots, a variable or ``default``, and the roots, the writable one first.

    Without the variable and without ``HOME`` there is no root, and DeepGEMM does not start.
    """
    home = environment.get("HOME")
    variable = get(generation, environment, "JIT_CACHE_DIR")
    if generation == "legacy":
        if variable and variable[1]:
            return variable[0], [Path(variable[1])]
        return "default", [Path(home) / ".deep_gemm"] if home else []
    if variable:
        return variable[0], [Path(part) for part in variable[1].split(":") if part]
    return "default", [Path(home) / ".dj"] if home else []
