"""The GPU that this process could use, asked of NVIDIA's management library: no CUDA context, no torch."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

#: FP32 cores of an SM, which NVML does not tell: 128 on compute capability 9.0, 10.x and 12.x (CUDA C++ Programming
#: Guide 13.0, "Compute Capabilities").
_CORES_PER_SM = {9: 128, 10: 128, 12: 128}


@dataclass(frozen=True)
class VisibleGpu:
    """A GPU: its name, compute capability, SM count and its driver's version (None where NVML does not say)."""

    name: str
    capability: tuple[int, int]
    sm_count: int | None
    driver: str | None = None


def first_gpu() -> VisibleGpu | None:
    """The first GPU, or None: no driver here, no card, or one that does not answer."""
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
        if nvml.nvmlInit_v2() != 0:
            return None
    except (OSError, AttributeError):
        return None
    try:
        return _ask(nvml)
    except AttributeError:  # a driver too old to have the call
        return None
    finally:
        nvml.nvmlShutdown()


def _ask(nvml: ctypes.CDLL) -> VisibleGpu | None:
    device = ctypes.c_void_p()
    name = ctypes.create_string_buffer(96)  # NVML_DEVICE_NAME_V2_BUFFER_SIZE
    major, minor, cores = ctypes.c_int(), ctypes.c_int(), ctypes.c_uint()
    if (
        nvml.nvmlDeviceGetHandleByIndex_v2(0, ctypes.byref(device))
        or nvml.nvmlDeviceGetName(device, name, len(name))
        or nvml.nvmlDeviceGetCudaComputeCapability(device, ctypes.byref(major), ctypes.byref(minor))
    ):
        return None
    driver = ctypes.create_string_buffer(80)  # NVML_SYSTEM_DRIVER_VERSION_BUFFER_SIZE
    version = None if nvml.nvmlSystemGetDriverVersion(driver, len(driver)) else driver.value.decode(errors="replace")
    known = nvml.nvmlDeviceGetNumGpuCores(device, ctypes.byref(cores)) == 0
    each = _CORES_PER_SM.get(major.value)
    count = cores.value // each if known and each else None
    return VisibleGpu(name.value.decode(errors="replace"), (major.value, minor.value), count, version)
