"""The GPU that this process could use, asked of NVIDIA's management library: no CUDA context, no torch."""

from __future__ import annotations

import ctypes
import os
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
    """The GPU that CUDA would take first here, or None: no driver, no card, none visible, or one that does not answer.

    ``CUDA_VISIBLE_DEVICES`` names it by number, by UUID or by the beginning of one. NVML counts cards by bus, as CUDA
    does with ``CUDA_DEVICE_ORDER=PCI_BUS_ID``; else CUDA's first is the fastest, which among equal cards is the same.
    Of a card in MIG mode it is a slice, which has fewer SMs (nvml.h of CUDA 13.0; never seen on such a card).
    """
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
        if nvml.nvmlInit_v2() != 0:
            return None
    except (OSError, AttributeError):
        return None
    try:
        return _ask(nvml, os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip())
    except AttributeError:  # a driver too old to have the call
        return None
    finally:
        nvml.nvmlShutdown()


def _ask(nvml: ctypes.CDLL, wanted: str) -> VisibleGpu | None:
    card, piece = _find(nvml, wanted)
    if card is None:
        return None
    name = ctypes.create_string_buffer(96)  # NVML_DEVICE_NAME_V2_BUFFER_SIZE
    major, minor = ctypes.c_int(), ctypes.c_int()
    if nvml.nvmlDeviceGetName(card, name, len(name)) or nvml.nvmlDeviceGetCudaComputeCapability(
        card, ctypes.byref(major), ctypes.byref(minor)
    ):
        return None
    driver = ctypes.create_string_buffer(80)  # NVML_SYSTEM_DRIVER_VERSION_BUFFER_SIZE
    version = None if nvml.nvmlSystemGetDriverVersion(driver, len(driver)) else driver.value.decode(errors="replace")
    count = _sms_of_card(nvml, card, major.value) if piece is None else _sms_of_slice(nvml, piece)
    return VisibleGpu(name.value.decode(errors="replace"), (major.value, minor.value), count, version)


def _find(nvml: ctypes.CDLL, wanted: str) -> tuple[ctypes.c_void_p | None, ctypes.c_void_p | None]:
    """The card that ``wanted`` names, and the slice of it that CUDA would take."""
    found, mode = ctypes.c_void_p(), ctypes.c_uint()
    if wanted.startswith("MIG-"):
        card = ctypes.c_void_p()
        if nvml.nvmlDeviceGetHandleByUUID(
            wanted.encode(), ctypes.byref(found)
        ) or nvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(found, ctypes.byref(card)):
            return None, None
        return card, found
    if wanted.isdigit():
        if nvml.nvmlDeviceGetHandleByIndex_v2(int(wanted), ctypes.byref(found)):
            return None, None
    elif not _by_uuid(nvml, wanted, found):
        return None, None
    if nvml.nvmlDeviceGetMigMode(found, ctypes.byref(mode), ctypes.byref(ctypes.c_uint())) or not mode.value:
        return found, None
    piece = ctypes.c_void_p()
    if nvml.nvmlDeviceGetMigDeviceHandleByIndex(found, 0, ctypes.byref(piece)):
        return None, None  # nothing of it can be used
    return found, piece


def _by_uuid(nvml: ctypes.CDLL, beginning: str, device: ctypes.c_void_p) -> bool:
    """Point ``device`` to the card whose UUID begins so; whether there is one."""
    count, uuid = ctypes.c_uint(), ctypes.create_string_buffer(96)  # NVML_DEVICE_UUID_V2_BUFFER_SIZE
    if not beginning.startswith("GPU-") or nvml.nvmlDeviceGetCount_v2(ctypes.byref(count)):
        return False
    return any(
        nvml.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(device)) == 0
        and nvml.nvmlDeviceGetUUID(device, uuid, len(uuid)) == 0
        and uuid.value.startswith(beginning.encode())
        for index in range(count.value)
    )


def _sms_of_card(nvml: ctypes.CDLL, card: ctypes.c_void_p, major: int) -> int | None:
    cores = ctypes.c_uint()
    known = nvml.nvmlDeviceGetNumGpuCores(card, ctypes.byref(cores)) == 0
    each = _CORES_PER_SM.get(major)
    return cores.value // each if known and each else None


def _sms_of_slice(nvml: ctypes.CDLL, piece: ctypes.c_void_p) -> int | None:
    attributes = (ctypes.c_uint * 10)()  # nvmlDeviceAttributes_t: multiprocessorCount is the first
    return None if nvml.nvmlDeviceGetAttributes_v2(piece, attributes) else attributes[0]
