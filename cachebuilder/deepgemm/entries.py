"""How each generation names an entry and which files it holds.

Facts from DeepGEMM 2.6.1 ``csrc/jit/compiler.hpp`` and ``csrc/utils/hash.hpp`` (legacy), and from
``deep_jit/cache/disk.hpp`` in sgl-deep-gemm 0.2.3.post2 (DeepJIT).
"""

from __future__ import annotations

import re

from cachebuilder.deepgemm import Generation

SOURCE, CUBIN, METADATA, MARKER = "kernel.cu", "kernel.cubin", "meta.json", ".committed"

#: The files of an entry that DeepGEMM reads, in the order in which it writes them.
FILES: dict[Generation, tuple[str, ...]] = {
    "legacy": (SOURCE, CUBIN),
    "deepjit": (SOURCE, CUBIN, METADATA, MARKER),
}

_NAMES: dict[Generation, re.Pattern[str]] = {
    "legacy": re.compile(r"kernel\.([A-Za-z0-9_]{1,120})\.([0-9a-f]{32})"),
    "deepjit": re.compile(r"([A-Za-z0-9_]{1,120})\.([0-9a-f]{32})"),
}


def kernel_name(generation: Generation, entry: str) -> str | None:
    """The kernel's name in an entry's folder name, or None where that is not the generation's grammar."""
    match = _NAMES[generation].fullmatch(entry)
    return match[1] if match else None


def legacy_entry(kernel: str, nvcc_release: str, flags: str, source: str) -> str:
    """The folder name that legacy DeepGEMM gives a kernel.

    Args:
        kernel: DeepGEMM's name for it, for example ``sm90_fp8_gemm_1d2d``.
        nvcc_release: major.minor of the compiler.
        flags: the compiler's flags as DeepGEMM joins them, with the absolute include path in them.
        source: the text of ``kernel.cu``; its first line holds the hash of the headers.
    """
    text = f"{kernel}$$NVCC{nvcc_release}$${flags}$${source}".encode()
    high, low = _fnv1a(text, 0xC6A4A7935BD1E995), _fnv1a(text, 0x9E3779B97F4A7C15)
    return f"kernel.{kernel}.{_mix(high):016x}{_mix(low):016x}"


def _fnv1a(data: bytes, seed: int) -> int:
    state = seed
    for byte in data:
        state = (state ^ byte) * 0x100000001B3 & 0xFFFFFFFFFFFFFFFF
    return state


def _mix(value: int) -> int:
    """SplitMix64's finisher."""
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
    value = (value ^ value >> 27) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
    return value ^ value >> 31
