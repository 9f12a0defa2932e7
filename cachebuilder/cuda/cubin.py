"""What a cubin says of itself: the registers, shared memory and threads that its kernel takes.

A cubin is an ELF file of machine EM_CUDA. NVIDIA publishes no specification of its notes; what is read here is the part
that ``cuobjdump -res-usage`` prints, and a test compares the two. An attribute in ``.nv.info`` is a format, a name, two
bytes that hold a small value or, of format 4, the size of what follows (names as in LLVM's and CUDA's own dumps:
``EIATTR_REGCOUNT``, ``EIATTR_FRAME_SIZE``, ``EIATTR_MAX_THREADS``).
"""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator
from dataclasses import dataclass

from cachebuilder.errors import InstallationError

_REGCOUNT, _FRAME_SIZE, _MAX_THREADS = 0x2F, 0x11, 0x05
#: The format of an attribute whose value has a size of its own (``EIFMT_SVAL``); all others hold two bytes.
_SIZED = 4
_INFO, _SHARED, _TEXT = ".nv.info", ".nv.shared.", ".text."


@dataclass(frozen=True)
class Resources:
    """What one kernel takes.

    Attributes:
        function: its mangled name.
        registers: of each thread.
        shared_bytes: that the code declares. What a launch asks for on top, a GEMM's pipeline stages, is in no cubin.
        stack_bytes: of each thread; 0 where nothing is spilled.
        threads: the most in a block, None where the code sets no bound.
        code_bytes: of machine code.
    """

    function: str
    registers: int
    shared_bytes: int
    stack_bytes: int
    threads: int | None
    code_bytes: int


class CubinError(ValueError):
    """Bytes that are no cubin with one kernel in it."""


def resources(cubin: bytes) -> Resources:
    """What the kernel in ``cubin`` takes. Raises `CubinError`, and `InstallationError` where pyelftools is missing."""
    try:
        from elftools.common.exceptions import ELFError
        from elftools.construct import ConstructError
        from elftools.elf.elffile import ELFFile
    except ModuleNotFoundError:
        raise InstallationError(
            "reading a cubin wants pyelftools, which is not installed", hint="pip install 'cachebuilder[report]'"
        ) from None
    try:
        elf = ELFFile(io.BytesIO(cubin))
        sections = {section.name: section for section in elf.iter_sections()}
        functions = [name.removeprefix(_TEXT) for name in sections if name.startswith(_TEXT)]
        if elf["e_machine"] != "EM_CUDA" or len(functions) != 1:
            raise CubinError(f"wanted a cubin with one kernel, found {elf['e_machine']} with {len(functions)}")
        function = functions[0]
        # Attributes of all functions, each value behind the function's place in the symbol table; one function here.
        common = dict(_attributes(sections[_INFO].data()))
        own = dict(_attributes(sections[f"{_INFO}.{function}"].data()))
        (_, registers), (_, stack) = (struct.unpack("<II", common[key]) for key in (_REGCOUNT, _FRAME_SIZE))
        shared = sections.get(_SHARED + function)
        return Resources(
            function=function,
            registers=registers,
            shared_bytes=shared["sh_size"] if shared else 0,
            stack_bytes=stack,
            threads=_product(own[_MAX_THREADS]) if _MAX_THREADS in own else None,
            code_bytes=sections[_TEXT + function]["sh_size"],
        )
    except (ELFError, ConstructError, struct.error, KeyError, IndexError, UnicodeDecodeError) as error:
        raise CubinError(f"wanted a cubin, found {len(cubin)} bytes that do not read as one: {error}") from error


def _attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    """(name, value) of each attribute."""
    at = 0
    while at + 4 <= len(data):
        form, name, size = struct.unpack_from("<BBH", data, at)
        at += 4
        if form == _SIZED:
            yield name, data[at : at + size]
            at += size


def _product(dimensions: bytes) -> int:
    x, y, z = struct.unpack("<III", dimensions)
    return int(x * y * z)
