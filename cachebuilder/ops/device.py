"""The device that a sweep runs on, and the arithmetic of sizes that ops share. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any


def ceil_div(a: int, b: int) -> int:
    """⌈a / b⌉."""
    return -(-a // b)


def round_up(a: int, b: int) -> int:
    """The smallest multiple of b that is at least a."""
    return ceil_div(a, b) * b


@dataclass(frozen=True)
class Device:
    """The device that a sweep runs on: the loaded torch and DeepGEMM, and the allocation of tensors.

    Attributes:
        name: torch's name of the device.
        virtual: it is the virtual GPU, whose memory is address space that nothing may read or write.
    """

    torch: ModuleType
    deep_gemm: ModuleType
    name: str = "cuda"
    virtual: bool = False

    @property
    def major(self) -> int:
        """Major compute capability; 0 for a CPU."""
        return int(self.torch.cuda.get_device_capability()[0]) if self.name == "cuda" else 0

    @property
    def power_of_two_scales(self) -> bool:
        """Whether DeepGEMM keeps only the exponent of a float32 scale, as it does on Blackwell (packed UE8M0)."""
        return self.major >= 10

    def empty(self, *shape: int, dtype: str) -> Any:
        """A tensor of ``shape`` on the device; ``dtype`` is torch's own name, as ``"bfloat16"``.

        On a real GPU, integers are zero, because kernels read expert numbers and counts from them, and float32 is one,
        because DeepGEMM traps on a scale that is to be packed and is no power of two. Other types are uninitialised.
        """
        make = self.torch.empty
        if not self.virtual:
            make = self.torch.zeros if dtype.startswith("int") else make
            make = self.torch.ones if dtype == "float32" else make
        return make(shape, device=self.name, dtype=getattr(self.torch, dtype))

    def integers(self, values: Any) -> Any:
        """An int32 tensor of ``values`` on the device."""
        return self.torch.tensor(values, dtype=self.torch.int32, device=self.name)
