"""What FlashInfer's child processes and their parent hand to each other, beside what `protocol` has."""

from __future__ import annotations

from cachebuilder.common.records import Record
from cachebuilder.cuda.gpus import Gpu
from cachebuilder.flashinfer.schema import Gemm
from cachebuilder.sweep.protocol import OpSweep, TrialResult

#: What the sweep's compiler calls the kernel in a placeholder, up to the entry's name. FlashInfer takes a kernel with
#: this part in its name, and the virtual GPU reads the name in the placeholder.
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
        sweeps: one for each shape, in order. ``entries`` has the mangled names of the launched kernels, but the entry's
            name where a placeholder was launched.
        calls: how often FlashInfer was called.
    """

    sweeps: tuple[OpSweep, ...]
    calls: int
    torch: str
    python: str


class GemmTrialsJob(Record):
    """Load modules, and call FlashInfer's GEMM on random inputs, on the real GPU.

    Attributes:
        points: the position of a shape, and M.
    """

    flashinfer: str
    gemms: tuple[Gemm, ...]
    modules: tuple[str, ...]
    points: tuple[tuple[int, int], ...]


class GemmTrialsAnswer(Record):
    """The results at the job's points, in their order."""

    results: tuple[TrialResult, ...]
