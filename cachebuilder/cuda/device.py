"""Which device DeepGEMM runs on: the virtual GPU, or this machine's own."""

from __future__ import annotations

from typing import Literal

from cachebuilder.cuda import nvml
from cachebuilder.cuda.gpus import Gpu

DeviceName = Literal["virtual", "cuda"]
#: What a user may ask for.
DeviceChoice = Literal["virtual", "cuda", "auto"]


def choose(choice: DeviceChoice, target: Gpu) -> DeviceName:
    """The device to use: ``auto`` is cuda where the first GPU of this machine is ``target``, else virtual."""
    if choice != "auto":
        return choice
    gpu = nvml.first_gpu()
    is_target = (
        gpu is not None
        and gpu.capability == (target.major, target.minor)
        and gpu.sm_count in (None, target.sm_count)
        and target.is_called(gpu.name)
    )
    return "cuda" if is_target else "virtual"
