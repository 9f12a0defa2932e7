"""How each generation names a cache entry, and which files an entry holds.

Facts from DeepGEMM 2.6.1 ``csrc/jit/compiler.hpp`` and ``csrc/utils/hash.hpp`` (legacy), and from
``deep_jit/cache/disk.hpp`` in sgl-deep-gemm 0.2.3.post2 (DeepJIT).
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from cachebuilder.deepgemm.generation import Generation

SOURCE, CUBIN, METADATA, MARKER = "kernel.cu", "kernel.cubin", "meta.json", ".committed"

#: The files of an entry that DeepGEMM reads, in the order in which it writes them.
FILES: dict[Generation, tuple[str, ...]] = {
    "legacy": (SOURCE, CUBIN),
    "deepjit": (SOURCE, CUBIN, METADATA, MARKER),
}

#: The most bytes of each file. The largest cubin seen has 200 kB, the largest generated source and meta.json 2 kB; a
#: manifest's own source may have 65,536 characters.
MAX_BYTES: dict[str, int] = {SOURCE: 256 << 10, CUBIN: 64 << 20, METADATA: 64 << 10, MARKER: 0}

#: FNV-1a's 64-bit prime.
_PRIME = 0x100000001B3
_MASK = (1 << 64) - 1
#: The start of each of a key's two streams; DeepJIT's second one also has a prime of its own.
_LEGACY_SEEDS = (0xC6A4A7935BD1E995, 0x9E3779B97F4A7C15)
_DEEPJIT_SEEDS = (0xC6A4A7935BD1E995, 0xFF51AFD7ED558CCD)
_DEEPJIT_SECOND_PRIME = 0x9E3779B97F4A7C15

_NAMES: dict[Generation, re.Pattern[str]] = {
    "legacy": re.compile(r"kernel\.([A-Za-z0-9_]{1,120})\.([0-9a-f]{32})"),
    "deepjit": re.compile(r"([A-Za-z0-9_]{1,120})\.([0-9a-f]{32})"),
}


def kernel_name(generation: Generation, entry: str) -> str | None:
    """The kernel's name in the name of an entry's folder; None where the generation has no such names."""
    match = _NAMES[generation].fullmatch(entry)
    return match[1] if match else None


def hook_refusal(entry: str, metadata: str) -> str | None:
    """Why a DeepJIT kernel cannot be built: DeepGEMM runs a program of its own on nvcc's cubin. None where it does not.

    The program's text is part of the key (``deep_jit/backend/cuda/options.hpp``), and cachebuilder runs no program.
    No DeepGEMM has one yet: tokenspeed-deepgemm 2.8.2 has an empty folder for them, ``jit_hooks``.

    Args:
        metadata: ``meta.json``, as DeepJIT writes it.
    """
    try:
        hook = json.loads(metadata)["compiler_options"]["post_hook"]
    except (ValueError, LookupError, TypeError, RecursionError):
        return None  # not DeepJIT's file
    if hook is None:
        return None
    return f"{entry}: wanted a kernel that nvcc alone makes, found one that DeepGEMM changes after nvcc, by {hook}"


def legacy_entry(kernel: str, nvcc_release: str, flags: str, source: bytes) -> str:
    """The folder name that legacy DeepGEMM gives a kernel.

    Args:
        kernel: DeepGEMM's name for it, for example ``sm90_fp8_gemm_1d2d``.
        nvcc_release: major.minor of the compiler.
        flags: the compiler's flags as DeepGEMM joins them; they hold the absolute include path.
        source: ``kernel.cu``; its first line holds the hash of the headers.
    """
    key = f"{kernel}$$NVCC{nvcc_release}$${flags}$$".encode() + source
    first, second = (_fnv1a(key, seed) for seed in _LEGACY_SEEDS)
    return f"kernel.{kernel}.{_mix(first):016x}{_mix(second):016x}"


def deepjit_entry(kernel: str, nvcc_text: str, cutlass: str, flags: Sequence[str], source: str, include: Path) -> str:
    """The folder name that DeepJIT gives a kernel that is compiled without a post-hook.

    Facts are from ``deep_jit/runtime/runtime.hpp``, ``utils/hash.hpp`` and ``utils/parser.hpp`` in sgl-deep-gemm
    0.2.3.post2, which are the same in vLLM 0.33.0's copy.

    Args:
        nvcc_text: all that ``nvcc --version`` prints.
        cutlass: CUTLASS's version, as ``4.5.0``.
        flags: nvcc's, without include paths.
        include: the folder whose ``deep_gemm/`` headers the source includes.

    Raises:
        OSError: a header cannot be read.
    """
    hasher = _DeepJitHash()
    major, minor, patch = (int(part) for part in cutlass.split("."))
    hasher.update(f"cutlass-{100 * major + 10 * minor + patch}".encode())
    hasher.update(_DeepJitHash().update(nvcc_text.encode()).digest())
    hasher.update(" ".join(flags).encode()).update(b"")
    hasher.update(_hash_with_includes(source.encode(), include))
    return f"{kernel}.{hasher.digest().decode()}"


_DEEP_GEMM_INCLUDE = re.compile(rb"^[ \t\f\v]*#[ \t\f\v]*include[ \t\f\v]*<(deep_gemm/[^>\"]*)>", re.MULTILINE)


def _hash_with_includes(code: bytes, include: Path) -> bytes:
    """The hash of a text and of the DeepGEMM headers that it includes, in the order of their lines."""
    hasher = _DeepJitHash().update(code)
    for match in _DEEP_GEMM_INCLUDE.finditer(code):
        hasher.update(_header_hash(include, match[1].decode()))
    return hasher.digest()


@functools.cache
def _header_hash(include: Path, name: str) -> bytes:
    return _hash_with_includes((include / name).read_bytes(), include)


class _DeepJitHash:
    """DeepJIT's two streams. Each update begins with its length, 8 bytes, little-endian."""

    def __init__(self) -> None:
        self._states = _DEEPJIT_SEEDS

    def update(self, data: bytes) -> Self:
        """Add ``data`` to the hash."""
        first, second = self._states
        framed = len(data).to_bytes(8, "little") + data
        self._states = (_fnv1a(framed, first), _fnv1a(framed, second, _DEEPJIT_SECOND_PRIME))
        return self

    def digest(self) -> bytes:
        """The hash so far, as 32 hexadecimal digits."""
        return b"%016x%016x" % (_mix(self._states[0]), _mix(self._states[1]))


def _fnv1a(data: bytes, state: int, prime: int = _PRIME) -> int:
    for byte in data:
        state = (state ^ byte) * prime & _MASK
    return state


def _mix(value: int) -> int:
    """SplitMix64's finisher."""
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & _MASK
    value = (value ^ value >> 27) * 0x94D049BB133111EB & _MASK
    return value ^ value >> 31
