"""What FlashInfer's child processes and their parent hand to each other, beside what `protocol` has."""

from __future__ import annotations

from cachebuilder.common.records import Record
from cachebuilder.cuda.gpus import Gpu
from cachebuilder.flashinfer.schema import Gemm
from cachebuilder.sweep.protocol import OpSweep

#: What the sweep's compiler writes in place of a cubin, up to the entry's name. FlashInfer looks for a kernel with this
#: part in its name, and the virtual GPU takes the rest of the line for the name of the kernel.
PLACEHOLDER = "to be compiled: "
PLACEHOLDER_KERNEL = "fp8_gemm_kernel "


class ModulesJob(Record):
    """Build modules.

    Attributes:
        flashinfer: FlashInfer's package folder.
        names: the modules.
        jobs: how many compilers run at once.
    """

    flashinfer: str
    names: tuple[str, ...]
    jobs: int


class ModulesAnswer(Record):
    """The modules' files, by name."""

    built: dict[str, str]


class GemmsJob(Record):
    """Load modules, and call FlashInfer's GEMM at every M of every shape, on the virtual GPU."""

    flashinfer: str
    gpu: Gpu
    gemms: tuple[Gemm, ...]
    modules: tuple[str, ...] = ()


class GemmsAnswer(Record):
    """What the calls launched.

    Attributes:
        sweeps: one for each shape, in order. ``entries`` has the names of the launched kernels: the mangled name in a
            real cubin, for a placeholder `PLACEHOLDER_KERNEL` and the entry's name.
        calls: how often FlashInfer was called.
    """

    sweeps: tuple[OpSweep, ...]
    calls: int
    torch: str
    python: str
