"""Known GPUs: what DeepGEMM asks the CUDA runtime about a device, for each card by name.

DeepGEMM reads five properties (``deep_jit/backend/cuda/device.hpp`` in sgl-deep-gemm 0.2.3.post2;
``csrc/jit/device_runtime.hpp`` in DeepGEMM 2.6.1): compute capability, SM count, L2 size, the shared memory that
a block may opt into, and the clock rate.
"""

from __future__ import annotations

import difflib
import re
from typing import Annotated, Literal

from pydantic import Field

from cachebuilder.common.records import Record

KIB = 1024
MIB = 1024 * KIB

Capability = Literal["9.0", "10.0", "10.3", "12.0", "12.1"]

#: ``cudaDevAttrMaxSharedMemoryPerBlockOptin`` by compute capability: 227 KiB on 9.0, 10.0 and 10.3, 99 KiB on 12.x.
#: CUDA C++ Programming Guide 13.0, table "Technical Specifications per Compute Capability".
_SHARED_MEMORY: dict[Capability, int] = {
    "9.0": 227 * KIB,
    "10.0": 227 * KIB,
    "10.3": 227 * KIB,
    "12.0": 99 * KIB,
    "12.1": 99 * KIB,
}


class Memory(Record):
    """A card's memory, which engines and their compilers ask for; DeepGEMM does not.

    Attributes:
        bytes: as the driver reports it.
        clock_khz: the peak memory clock, kHz.
        bus_bits: the width of the bus.
    """

    bytes: int
    clock_khz: int
    bus_bits: int


class Gpu(Record):
    """One kind of GPU, as the CUDA runtime would describe it."""

    name: Annotated[str, Field(min_length=1, max_length=80, description="the card's name")]
    capability: Annotated[Capability, Field(description="compute capability, major.minor")]
    sm_count: Annotated[int, Field(ge=1, le=1024, description="streaming multiprocessors")]
    l2_bytes: Annotated[int, Field(ge=1 * MIB, le=1024 * MIB, description="L2 cache, bytes")]
    shared_memory_bytes: Annotated[
        int, Field(ge=48 * KIB, le=1 * MIB, description="shared memory a block may opt into, bytes")
    ]
    clock_khz: Annotated[int, Field(ge=100_000, le=10_000_000, description="peak SM clock, kHz")]
    memory: Memory | None = Field(default=None, description="the card's memory; only engines ask for it")
    source: str = Field(default="given in the manifest", description="where the figures come from")
    verified: bool = Field(default=False, description="read from a real card, not from a data sheet")

    @property
    def major(self) -> int:
        """Major compute capability: 9 for Hopper, 10 and 12 for Blackwell."""
        return int(self.capability.split(".")[0])

    @property
    def minor(self) -> int:
        """Minor compute capability."""
        return int(self.capability.split(".")[1])

    def is_called(self, card: str) -> bool:
        """Whether ``card``, a driver's name (NVIDIA H100 80GB HBM3, NVIDIA H100 PCIe), is this GPU's."""
        card_words = frozenset(re.split(r"[\s-]+", card.upper()))
        gpu_words = frozenset(self.name.upper().split("-")) - {"SXM"}
        return gpu_words <= card_words and gpu_words & _FORMS == card_words & _FORMS


_HOPPER = "NVIDIA H100 Tensor Core GPU Architecture whitepaper v1.04"
_SAME_DIE = "the H100 SXM5's or the H200's figures, whose die it shares; clock from the card's data sheet"
_BLACKWELL = "SM count and L2 as a device query printed them (github.com/pytorch/ao, pull request 4002)"
_BLACKWELL_KIN = "the same die as the B200; SM count and clock from the card's data sheet"
_RTX = "NVIDIA RTX Blackwell GPU Architecture whitepaper v1.1"

#: name → compute capability, SMs, L2 in MiB, clock in MHz, where these come from.
_FIGURES: dict[str, tuple[Capability, int, float, int, str]] = {
    "H100-SXM": ("9.0", 132, 50, 1980, f"{_HOPPER}; SM count and L2 as torch 2.11.0 read them from a card"),
    "H100-PCIE": ("9.0", 114, 50, 1755, _HOPPER),
    "H100-NVL": ("9.0", 132, 60, 1785, _SAME_DIE),
    "H800": ("9.0", 132, 50, 1980, _SAME_DIE),
    "H200": ("9.0", 132, 60, 1980, "read from the card by torch 2.11.0, driver 580.159.04"),
    "H20": ("9.0", 78, 60, 1980, "SM count and L2 as torch reports them in public logs"),
    "GH200": ("9.0", 132, 60, 1980, _SAME_DIE),
    "B200": ("10.0", 148, 126.5, 1965, _BLACKWELL),
    "GB200": ("10.0", 152, 126.5, 2062, _BLACKWELL_KIN),
    "B300": ("10.3", 148, 126.5, 2032, _BLACKWELL_KIN),
    "GB300": ("10.3", 152, 126.5, 2062, _BLACKWELL_KIN),
    "RTX-PRO-6000": ("12.0", 188, 128, 2617, _RTX),
    "RTX-5090": ("12.0", 170, 96, 2407, _RTX),
    "GB10": ("12.1", 48, 24, 2418, "NVIDIA DGX Spark documentation; L2 as torch reports it in public logs"),
}
#: Those whose figures were all read from a real card. The others' may be corrected by explicit fields in the manifest.
_VERIFIED = {"H200"}


def _memory(name: str) -> Memory | None:
    if name not in _MEMORY:
        return None
    size, clock_mhz, bus_bits = _MEMORY[name]
    return Memory(bytes=size, clock_khz=clock_mhz * 1000, bus_bits=bus_bits)


#: name → memory in bytes, memory clock in MHz, bus in bits. Size and clock as nvidia-smi prints them in public logs;
#: the bus from the cards' data sheets (H100 and H200: 5 and 6 stacks of HBM, B200: 8 stacks, 1024 bits each).
_MEMORY = {
    "H100-SXM": (81_559 * MIB, 2619, 5120),
    "H200": (150_109_880_320, 3201, 6016),  # size and bus as torch 2.11.0 read them from a card
    "B200": (183_359 * MIB, 3996, 8192),
}

#: name → GPU.
GPUS: dict[str, Gpu] = {
    name: Gpu(
        name=name,
        capability=capability,
        sm_count=sm_count,
        l2_bytes=int(l2 * MIB),
        shared_memory_bytes=_SHARED_MEMORY[capability],
        clock_khz=clock * 1000,
        memory=_memory(name),
        source=source,
        verified=name in _VERIFIED,
    )
    for name, (capability, sm_count, l2, clock, source) in _FIGURES.items()
}

#: Words by which the driver's names tell one form of a card from another; the SXM module's name has neither.
_FORMS = frozenset(("PCIE", "NVL"))

#: Other names that people write.
_ALIASES = {"H100": "H100-SXM", "H100-SXM5": "H100-SXM", "RTXPRO6000": "RTX-PRO-6000", "H200-SXM": "H200"}


def find(name: str) -> Gpu:
    """The GPU called ``name``, in upper or lower case, with spaces, ``_`` or ``-`` between its words.

    Raises:
        ValueError: there is no GPU of that name; the text lists the known names and guesses the one that was meant.
    """
    key = name.strip().upper().replace("_", "-").replace(" ", "-").removeprefix("NVIDIA-")
    key = _ALIASES.get(key, key)
    if key in GPUS:
        return GPUS[key]
    nearest = difflib.get_close_matches(key, [*GPUS, *_ALIASES], n=1)
    guess = f"; did you mean {nearest[0]}?" if nearest else ""
    raise ValueError(f"wanted one of {', '.join(GPUS)} or explicit fields, found {name!r}{guess}")
