"""Translation units: many kernels that include the same headers share one pass of the compiler's front end.

Of the CPU that a kernel costs alone, two thirds go into parsing CUTLASS again (`benchmarks/compile.py`). A unit holds
the headers once and each kernel's instantiation in a namespace of its own; the kernels' names are the templates' and
do not change.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from cachebuilder.planning.plan import Kernel

#: The cost model, CPU seconds on one core of the machine that `benchmarks/compile.py` was first run on: a unit's front
#: end, a kernel's share of it, ptxas for each 100 kB of PTX (kernels have 4 kB to 500 kB). Only their ratios matter.
UNIT_SECONDS, KERNEL_SECONDS, PTXAS_SECONDS = 2.0, 0.4, 0.35

#: cicc's peak memory is about 450 MB and 3 MB for each kernel (60 kernels: 613 MB); this many stay under 1 GB.
MAX_KERNELS = 128

#: Parts of the names of kernels that are compiled alone: they declare their shared memory with an alignment that
#: depends on template arguments (``extern __shared__ __align__(kSwizzleAlignment)``), and of all such declarations in a
#: unit nvcc keeps one: an FP8 kernel beside an FP4 one got 512 bytes where it counts on 1024. A test reads the headers.
ALONE = ("mqa_logits", "mega_")

#: In the sources of kernels with FP4 operands. Beside FP8 kernels NVVM orders their address arithmetic otherwise than
#: alone, so they get units of their own; those of the legacy generation (sgl-deep-gemm 0.1.7, SM100, nvcc 13.0) even
#: beside each other, so they are compiled alone.
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
        """Nvcc's flags, the same for all."""
        return self.kernels[0].flags

    @property
    def seconds(self) -> float:
        """What it costs until its kernels' PTX is there."""
        return UNIT_SECONDS + KERNEL_SECONDS * len(self.kernels)

    @property
    def ptxas_guess(self) -> float:
        """What its kernels will cost in ptxas, before their PTX is there: about as much as in the front end."""
        return KERNEL_SECONDS * len(self.kernels)

    @property
    def source(self) -> str:
        """The unit's C++ text; a kernel alone is compiled from its own, unchanged."""
        return self.head + self.body

    @property
    def head(self) -> str:
        """The text up to and with the last include."""
        return split_source(self.kernels[0].source)[0]

    @property
    def body(self) -> str:
        """The text behind the includes."""
        parts = [split_source(kernel.source)[1] for kernel in self.kernels]
        if len(parts) == 1:
            return parts[0]
        return "\n" + "".join(f"namespace cachebuilder_{index} {{\n{part}\n}}\n" for index, part in enumerate(parts))

    def halves(self) -> tuple[Unit, Unit]:
        """Two units of half the kernels each."""
        middle = len(self.kernels) // 2
        return Unit(self.kernels[:middle]), Unit(self.kernels[middle:])


def ptxas_seconds(text: str) -> float:
    """What a kernel's PTX costs in ptxas."""
    return PTXAS_SECONDS * len(text) / 1e5


def split_source(source: str) -> tuple[str, str]:
    """A kernel's source up to and with its last ``#include``, and the rest."""
    end = max((match.end() for match in _INCLUDE.finditer(source)), default=0)
    return source[:end], source[end:]


def literals(source: str) -> tuple[str, ...]:
    """The integer and boolean template arguments that a kernel's source names, in order, as mangled names have them."""
    _, body = split_source(source)
    kernel = _KERNEL.search(body)  # a static_assert with arguments of its own may stand before it
    found = _ARGUMENT.findall(body[kernel.end() if kernel else body.find("<") :])
    return tuple({"true": "1", "false": "0"}.get(argument, argument) for argument in found)


def separate(kernels: Sequence[Kernel]) -> list[Unit]:
    """Each kernel in a unit of its own."""
    return [Unit((kernel,)) for kernel in kernels]


def group(kernels: Sequence[Kernel], jobs: int) -> list[Unit]:
    """Units that keep ``jobs`` compilers busy, the costliest first.

    Kernels share a unit if they include the same headers and have the same flags. There is a unit for each job, no
    more: each unit costs its front end again. Kernels are dealt round by round in the order of their block sizes, so
    that every unit gets its share of the large ones.
    """
    families: dict[tuple[str, tuple[str, ...], bool], list[Kernel]] = {}
    for kernel in kernels:
        # A legacy source begins with a comment that holds the headers' digest: part of the head, as it should be.
        key = split_source(kernel.source)[0], kernel.flags, _FP4 in kernel.source
        families.setdefault(key, []).append(kernel)
    found: list[Unit] = []
    for members in families.values():
        count = max(round(jobs * len(members) / len(kernels)), -(-len(members) // MAX_KERNELS), 1)
        if _must_stay_alone(members[0]):
            count = len(members)
        ordered = sorted(members, key=lambda kernel: (literals(kernel.source)[3:], kernel.source, kernel.entry))
        found += [Unit(tuple(ordered[first::count])) for first in range(min(count, len(members)))]
    return sorted(found, key=lambda unit: -len(unit.kernels))


def _must_stay_alone(kernel: Kernel) -> bool:
    """Whether a unit's code would differ from the kernel's own: see `ALONE`, `_FP4`, and flags for line numbers.

    Those write the lines into the code's debug sections, and a shared unit's lines are not a kernel's own.
    """
    lines = any("lineinfo" in flag or "line-info" in flag or flag in ("-G", "--device-debug") for flag in kernel.flags)
    legacy = kernel.metadata is None
    return lines or any(part in kernel.name for part in ALONE) or (legacy and _FP4 in kernel.source)
