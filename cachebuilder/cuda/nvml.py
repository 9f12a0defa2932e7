"""The GPU that this process could use, as NVIDIA's management library (NVML) has it: no CUDA context, no torch."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pynvml

#: FP32 cores of an SM by major compute capability; NVML counts cores and not SMs. CUDA C++ Programming Guide 13.0,
#: "Compute Capabilities": 128 on 9.0, 10.x and 12.x.
_CORES_PER_SM = {9: 128, 10: 128, 12: 128}


@dataclass(frozen=True)
class VisibleGpu:
    """A GPU: its name, compute capability, SM count and driver version; the last two None where NVML has no answer."""

    name: str
    capability: tuple[int, int]
    sm_count: int | None
    driver: str | None = None


def first_gpu() -> VisibleGpu | None:
    """The GPU that CUDA would take first; None without a driver, a card, a visible card or an answer.

    ``CUDA_VISIBLE_DEVICES`` names it by number, by UUID or by the beginning of one. NVML numbers cards by bus, as CUDA
    does with ``CUDA_DEVICE_ORDER=PCI_BUS_ID``. Otherwise CUDA begins with the fastest card; equal cards keep the order
    of the bus. Of a card in MIG mode CUDA takes an instance, which has fewer SMs (nvml.h of CUDA 13.0; never run on
    such a card).
    """
    try:
        pynvml.nvmlInit()
        try:
            return _read(os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip())
        finally:
            pynvml.nvmlShutdown()
    except pynvml.NVMLError:  # among others: no library, no driver
        return None


def _read(visible: str) -> VisibleGpu | None:
    """The GPU that ``visible`` names. Raises `NVMLError` where NVML does not know it, or does not describe it."""
    if visible.startswith("MIG-"):
        instance = pynvml.nvmlDeviceGetHandleByUUID(visible)
        card = pynvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(instance)
    else:
        card = _card(visible)
        if card is None:
            return None
        mig_mode, _ = _answer(pynvml.nvmlDeviceGetMigMode, card) or (0, 0)
        instance = pynvml.nvmlDeviceGetMigDeviceHandleByIndex(card, 0) if mig_mode else None
    major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(card)
    return VisibleGpu(
        name=pynvml.nvmlDeviceGetName(card),
        capability=(major, minor),
        sm_count=_sms_of_card(card, major) if instance is None else _sms_of_instance(instance),
        driver=_answer(pynvml.nvmlSystemGetDriverVersion),
    )


def _card(visible: str) -> Any | None:
    """The handle of the card with this number, or whose UUID begins so."""
    if visible.isdecimal():
        return pynvml.nvmlDeviceGetHandleByIndex(int(visible))
    if not visible.startswith("GPU-"):
        return None
    for index in range(pynvml.nvmlDeviceGetCount()):
        card = _answer(pynvml.nvmlDeviceGetHandleByIndex, index)  # a card may be out of this container's reach
        if card and (_answer(pynvml.nvmlDeviceGetUUID, card) or "").startswith(visible):
            return card
    return None


def _sms_of_card(card: Any, major: int) -> int | None:
    cores = _answer(pynvml.nvmlDeviceGetNumGpuCores, card)
    cores_per_sm = _CORES_PER_SM.get(major)
    return cores // cores_per_sm if cores and cores_per_sm else None


def _sms_of_instance(instance: Any) -> int | None:
    attributes = _answer(pynvml.nvmlDeviceGetAttributes, instance)
    return attributes.multiprocessorCount if attributes else None


def _answer(question: Callable[..., Any], *arguments: Any) -> Any | None:
    """NVML's answer to ``question``; None where it answers with an error."""
    try:
        return question(*arguments)
    except pynvml.NVMLError:
        return None
