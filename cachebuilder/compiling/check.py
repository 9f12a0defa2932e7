"""Compile a kernel as DeepGEMM's own nvcc call does, and compare its code with the code that we made."""

from __future__ import annotations

import io
from pathlib import Path

from cachebuilder.cuda.processes import Processes
from cachebuilder.deepgemm.entries import SOURCE
from cachebuilder.errors import CompileError
from cachebuilder.manifest.inputs import Inputs
from cachebuilder.planning.plan import Kernel


def compile_alone(kernel: Kernel, inputs: Inputs, processes: Processes, folder: Path) -> bytes:
    """Make the cubin that DeepGEMM would make of ``kernel`` at run time: one nvcc call with DeepGEMM's own flags.

    Raises:
        CompileError: nvcc refuses the kernel; the text is the compiler's output.
    """
    (folder / SOURCE).write_text(kernel.source)
    include = str(inputs.installation.include)
    processes.run(inputs.toolchain.own_command(SOURCE, "own.cubin", kernel.flags, include), folder)
    return (folder / "own.cubin").read_bytes()


def require_equal(kernel: Kernel, own: bytes, ours: bytes) -> None:
    """Raise `CompileError`, which names the sections, if the GPU would execute or read something else.

    Args:
        own: the cubin that `compile_alone` made.
        ours: the cubin to check.
    """
    own_sections, our_sections = sections(own), sections(ours)
    names = sorted(own_sections.keys() | our_sections.keys())
    different = [name for name in names if own_sections.get(name) != our_sections.get(name)]
    if different:
        raise CompileError(
            f"{kernel.entry}: the code differs from what nvcc makes of this kernel alone, in {', '.join(different)}",
            hint="build with --separate, and report the kernel",
        )


def sections(cubin: bytes) -> dict[str, bytes]:
    """What the GPU executes and the constants it reads: the ELF sections ``.text…`` and ``.nv.constant…``."""
    from elftools.elf.elffile import ELFFile

    return {
        section.name: section.data()
        for section in ELFFile(io.BytesIO(cubin)).iter_sections()
        if section.name.startswith((".text", ".nv.constant"))
    }
