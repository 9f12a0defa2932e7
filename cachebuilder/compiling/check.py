"""A kernel as DeepGEMM's own nvcc call makes it, and whether ours has the same code."""

from __future__ import annotations

import io
from pathlib import Path

from cachebuilder.cuda.processes import Processes
from cachebuilder.deepgemm.entries import SOURCE
from cachebuilder.errors import CompileError
from cachebuilder.manifest.inputs import Inputs
from cachebuilder.planning.plan import Kernel


def compile_alone(kernel: Kernel, inputs: Inputs, processes: Processes, folder: Path) -> bytes:
    """The cubin that DeepGEMM would make of ``kernel`` at run time: one nvcc call with DeepGEMM's own flags.

    Raises:
        CompileError: with the compiler's output.
    """
    (folder / SOURCE).write_text(kernel.source)
    include = str(inputs.installation.include)
    processes.run(inputs.toolchain.own_command(SOURCE, "own.cubin", kernel.flags, include), folder)
    return (folder / "own.cubin").read_bytes()


def require_equal(kernel: Kernel, own: bytes, ours: bytes) -> None:
    """Raises `CompileError`, with the sections' names, where the GPU would read something else."""
    wanted, found = sections(own), sections(ours)
    if different := sorted(name for name in wanted | found if wanted.get(name) != found.get(name)):
        raise CompileError(
            f"{kernel.entry}: the code is not what nvcc makes of it alone, in {', '.join(different)}",
            hint="build with --separate, and report the kernel",
        )


def sections(cubin: bytes) -> dict[str, bytes]:
    """What the GPU executes and the constants it reads: the ELF sections ``.text…`` and ``.nv.constant…``."""
    from elftools.elf.elffile import ELFFile

    found = ELFFile(io.BytesIO(cubin)).iter_sections()
    return {s.name: s.data() for s in found if s.name.startswith((".text", ".nv.constant"))}
