"""Which device to check on: the virtual GPU, or this machine's own where it is the target."""

from __future__ import annotations

from typing import Literal

from cachebuilder.cuda import gpus, nvml
from cachebuilder.cuda.gpus import Gpu
from cachebuilder.sweep.process import DeviceName

#: What a caller may ask for; ``auto`` is ``cuda`` where the first GPU of this machine is the target.
DeviceChoice = Literal["virtual", "cuda", "auto"]


def choose_device(wanted: DeviceChoice, target: Gpu) -> DeviceName:
    """The device to use for a manifest whose target is ``target``."""
    if wanted != "auto":
        return wanted
    gpu = nvml.first_gpu()
    same = (
        gpu is not None
        and gpu.capability == (target.major, target.minor)
        and gpu.sm_count in (None, target.sm_count)
        and gpus.is_called(target, gpu.name)
    )
    return "cuda" if same else "virtual"
