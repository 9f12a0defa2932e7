"""Translation units: many kernels that include the same headers share one pass of the compiler's front end.

Two thirds of the CPU time that a kernel costs alone go into parsing CUTLASS (`benchmarks/compile.py`). A unit includes
the headers once and holds each kernel's instantiation in a namespace of its own. A kernel's mangled name comes from its
template, so the namespace does not change it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from cachebuilder.deepgemm.source import kernel_template
from cachebuilder.planning.plan import Kernel

#: The cost model, in CPU seconds on one core of the machine that `benchmarks/compile.py` was first run on: a unit's
#: front end, a kernel's share of it, and ptxas for each 100 kB of PTX (kernels have 4 kB to 500 kB). Only their ratios
#: matter.
UNIT_SECONDS, KERNEL_SECONDS, PTXAS_SECONDS = 2.0, 0.4, 0.35

#: cicc's peak memory is about 450 MB, plus 3 MB for each kernel (60 kernels: 613 MB). This many stay under 1 GB.
MAX_KERNELS = 128

#: Kernels with one of these in their name are compiled alone. They declare their shared memory with an alignment that
#: depends on template arguments (``extern __shared__ __align__(kSwizzleAlignment)``), and nvcc keeps only one of all
#: such declarations in a unit: an FP8 kernel beside an FP4 kernel got 512 bytes where it relies on 1024. A test reads
#: DeepGEMM's headers and checks that this list is complete.
ALONE = ("mqa_logits", "mega_")

#: Part of the source of every kernel with FP4 operands. NVVM orders the address arithmetic of such a kernel differently
#: beside FP8 kernels than alone, so FP4 kernels get units of their own. In the legacy generation (sgl-deep-gemm 0.1.7,
#: SM100, nvcc 13.0) it does so even beside another FP4 kernel, so these are compiled alone.
_FP4 = "float_e2m1"

_INCLUDE = re.compile(r"^\s*#\s*include\b.*$", re.MULTILINE)
_KERNEL = re.compile(r"&\s*[\w:]+<")
_ARGUMENT = re.compile(r"\b(?:\d+|true|false)\b")


@dataclass(frozen=True)
class Unit:
    """Kernels to be compiled together, in this order."""

    kernels: tuple[Kernel, ...]

    @property
    def flags(self) -> tuple[str, ...]:
        """The flags for nvcc; all kernels have the same."""
        return self.kernels[0].flags

    @property
    def seconds(self) -> float:
        """What the front end costs, from the unit's source to its PTX."""
        return UNIT_SECONDS + KERNEL_SECONDS * len(self.kernels)

    @property
    def ptxas_guess(self) -> float:
        """What the kernels will cost in ptxas, while their PTX is unknown: about their share of the front end."""
        return KERNEL_SECONDS * len(self.kernels)

    @property
    def source(self) -> str:
        """The unit's C++ text. A unit of one kernel has that kernel's text, unchanged."""
        return self.head + self.body

    @property
    def head(self) -> str:
        """The text up to and including the last ``#include``."""
        return split_source(self.kernels[0].source)[0]

    @property
    def body(self) -> str:
        """The text after the includes."""
        parts = [split_source(kernel.source)[1] for kernel in self.kernels]
        if len(parts) == 1:
            return parts[0]
        return "\n" + "".join(f"namespace cachebuilder_{index} {{\n{part}\n}}\n" for index, part in enumerate(parts))

    def halves(self) -> tuple[Unit, Unit]:
        """Two units, each with half of the kernels."""
        middle = len(self.kernels) // 2
        return Unit(self.kernels[:middle]), Unit(self.kernels[middle:])


def ptxas_seconds(text: str) -> float:
    """What a kernel's PTX costs in ptxas."""
    return PTXAS_SECONDS * len(text) / 1e5


def split_source(source: str) -> tuple[str, str]:
    """A kernel's source up to and including its last ``#include``, and the rest."""
    end = max((match.end() for match in _INCLUDE.finditer(source)), default=0)
    return source[:end], source[end:]


def literals(source: str) -> tuple[str, ...]:
    """The integer and boolean template arguments in a kernel's source, in order, written as in mangled names."""
    _, body = split_source(source)
    instantiation = _KERNEL.search(body)  # a static_assert with template arguments may stand before it
    start = instantiation.end() if instantiation else body.find("<")
    arguments = _ARGUMENT.findall(body[start:])
    return tuple({"true": "1", "false": "0"}.get(argument, argument) for argument in arguments)


def separate(kernels: Sequence[Kernel]) -> list[Unit]:
    """Each kernel in a unit of its own."""
    return [Unit((kernel,)) for kernel in kernels]


def group(kernels: Sequence[Kernel], jobs: int) -> list[Unit]:
    """Units that keep ``jobs`` compilers busy, the costliest first.

    Kernels share a unit if they include the same headers, have the same flags and are of the same template: two
    templates of ``smxx_layout.cuh`` declare the same shared memory with different types, so no unit with both compiles.
    There is about one unit for each job and no more, because every unit pays for a front end of its own. The kernels
    are sorted by their block sizes and dealt to the units in turn, so that every unit gets its share of the large ones.
    """
    families: dict[tuple[str, tuple[str, ...], bool, str | None], list[Kernel]] = {}
    for kernel in kernels:
        # A legacy source begins with a comment that holds the headers' digest. The comment is part of the head, so
        # kernels of different headers do not share a unit.
        key = split_source(kernel.source)[0], kernel.flags, _FP4 in kernel.source, kernel_template(kernel.source)
        families.setdefault(key, []).append(kernel)
    work: list[Unit] = []
    for members in families.values():
        if _must_stay_alone(members[0]):
            work += separate(members)
            continue
        share_of_jobs = round(jobs * len(members) / len(kernels))
        count = min(max(share_of_jobs, math.ceil(len(members) / MAX_KERNELS), 1), len(members))
        ordered = sorted(members, key=lambda kernel: (literals(kernel.source)[3:], kernel.source, kernel.entry))
        work += [Unit(tuple(ordered[first::count])) for first in range(count)]
    return sorted(work, key=lambda unit: -len(unit.kernels))


def _must_stay_alone(kernel: Kernel) -> bool:
    """Whether a shared unit would change the kernel's code.

    `ALONE` and `_FP4` say why for two kinds of kernels. The third kind has line numbers in its debug sections, and a
    shared unit's line numbers are not those of the kernel's own source.
    """
    line_numbers = any(
        "lineinfo" in flag or "line-info" in flag or flag in ("-G", "--device-debug") for flag in kernel.flags
    )
    legacy = kernel.metadata is None
    return line_numbers or any(part in kernel.name for part in ALONE) or (legacy and _FP4 in kernel.source)
