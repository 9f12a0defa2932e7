"""What a module's ELF file says: the version of glibc that it needs."""

from __future__ import annotations

import io
from collections.abc import Iterable
from typing import Any

_PREFIX = "GLIBC_2."


def newest_glibc(modules: Iterable[bytes]) -> str:
    """The newest version of glibc's functions that the modules call, as ``2.34``; ``2.0`` where there is none."""
    from elftools.elf.elffile import ELFFile

    newest = 0
    for data in modules:
        section: Any = ELFFile(io.BytesIO(data)).get_section_by_name(".gnu.version_r")
        names = [need.name for _, needs in (section.iter_versions() if section else ()) for need in needs]
        minors = [name.removeprefix(_PREFIX) for name in names if name.startswith(_PREFIX)]
        newest = max([newest, *(int(minor.partition(".")[0]) for minor in minors)])
    return f"2.{newest}"


def kernel_name(cubin: bytes) -> str:
    """The mangled name of the GEMM's kernel in a cubin; empty where it has none.

    FlashInfer takes the kernel with this part in its name (``runtime.cuh``, 0.6.13).
    """
    from elftools.elf.elffile import ELFFile

    symbols: Any = ELFFile(io.BytesIO(cubin)).get_section_by_name(".symtab")
    names = (symbol.name for symbol in symbols.iter_symbols() if symbol["st_info"]["type"] == "STT_FUNC")
    return next((name for name in names if "fp8_gemm_kernel" in name), "")
