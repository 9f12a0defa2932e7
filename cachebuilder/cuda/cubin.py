"""What a cubin says about its kernel: the registers, shared memory and threads that it takes.

A cubin is an ELF file of machine EM_CUDA. NVIDIA publishes no specification of its notes. This reads the part that
``cuobjdump -res-usage`` prints, and a test compares the two. An attribute in ``.nv.info`` is a format, a name, and two
bytes: a small value or, for format 4, the size of the value that follows. The names are those of LLVM's and CUDA's own
dumps: ``EIATTR_REGCOUNT``, ``EIATTR_FRAME_SIZE``, ``EIATTR_MAX_THREADS``.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator

from cachebuilder.common.records import Record
from cachebuilder.errors import InstallationError

_REGCOUNT, _FRAME_SIZE, _MAX_THREADS = 0x2F, 0x11, 0x05
#: The format of an attribute whose value has a size of its own (``EIFMT_SVAL``); all others hold two bytes.
_SIZED = 4
_INFO, _SHARED, _TEXT = ".nv.info", ".nv.shared.", ".text."


class Resources(Record):
    """What one kernel takes.

    Attributes:
        function: its mangled name.
        registers: of each thread.
        shared_bytes: shared memory that the code declares. A launch asks for more, as for a GEMM's pipeline stages;
            no cubin says how much.
        stack_bytes: of each thread; 0 where no register is spilled.
        threads: the most in a block; None where the code sets no bound.
        code_bytes: of machine code.
    """

    function: str
    registers: int
    shared_bytes: int
    stack_bytes: int
    threads: int | None
    code_bytes: int


#: FlashInfer's sources have it to refer to the template; nothing launches it.
_DUMMY = "_Z12dummy_kernelv"


class CubinError(ValueError):
    """The bytes are not a cubin with one kernel."""


def resources(cubin: bytes) -> Resources:
    """What the kernel in ``cubin`` takes.

    Raises:
        CubinError: ``cubin`` is not a cubin with one kernel.
        InstallationError: pyelftools is missing.
    """
    try:
        from elftools.common.exceptions import ELFError
        from elftools.construct import ConstructError
        from elftools.elf.elffile import ELFFile
        from elftools.elf.sections import SymbolTableSection
    except ModuleNotFoundError:
        raise InstallationError(
            "reading a cubin needs pyelftools, which is not installed", hint="pip install 'cachebuilder[report]'"
        ) from None
    try:
        elf = ELFFile(io.BytesIO(cubin))
        sections = {section.name: section for section in elf.iter_sections()}
        functions = [name.removeprefix(_TEXT) for name in sections if name.startswith(_TEXT)]
        functions = [name for name in functions if name != _DUMMY]
        if elf["e_machine"] != "EM_CUDA" or len(functions) != 1:
            raise CubinError(f"wanted a cubin with one kernel, found {elf['e_machine']} with {len(functions)}")
        function = functions[0]
        # One section has attributes of all functions: each value follows its function's place in the symbol table.
        table = sections[".symtab"]
        symbols = (
            (symbol.name for symbol in table.iter_symbols()) if isinstance(table, SymbolTableSection) else iter(())
        )
        place = struct.pack("<I", next(number for number, name in enumerate(symbols) if name == function))
        all_functions = {
            key: value[4:] for key, value in _attributes(sections[_INFO].data()) if value.startswith(place)
        }
        this_function = dict(_attributes(sections[f"{_INFO}.{function}"].data()))
        registers, stack = (struct.unpack("<I", all_functions[key])[0] for key in (_REGCOUNT, _FRAME_SIZE))
        shared = sections.get(_SHARED + function)
        return Resources(
            function=function,
            registers=registers,
            shared_bytes=shared["sh_size"] if shared else 0,
            stack_bytes=stack,
            threads=_product(this_function[_MAX_THREADS]) if _MAX_THREADS in this_function else None,
            code_bytes=sections[_TEXT + function]["sh_size"],
        )
    except (ELFError, ConstructError, struct.error, KeyError, IndexError, UnicodeDecodeError, StopIteration) as error:
        raise CubinError(f"wanted a cubin, found {len(cubin)} bytes of something else: {error}") from error


def _attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    """(name, value) of each attribute whose value has a size of its own."""
    position = 0
    while position + 4 <= len(data):
        form, name, size = struct.unpack_from("<BBH", data, position)
        position += 4
        if form == _SIZED:
            yield name, data[position : position + size]
            position += size


def _product(dimensions: bytes) -> int:
    x, y, z = struct.unpack("<III", dimensions)
    return int(x * y * z)
