"""The virtual GPU's library, and the environment in which a process sees that GPU and no other."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from cachebuilder.common import native
from cachebuilder.cuda.gpus import Gpu
from cachebuilder.deepgemm.installation import package_folder
from cachebuilder.errors import InstallationError

_HERE = Path(__file__).parent
_SOURCE = _HERE / "virtual_gpu.c"


def environment(gpu: Gpu) -> dict[str, str]:
    """The variables that make a process see ``gpu`` and no other. Builds the library where it is not built yet.

    Raises:
        InstallationError: torch, the CUDA runtime beside it or a C compiler is missing.
    """
    library = build()
    return {
        "LD_PRELOAD": " ".join(filter(None, [str(library), os.environ.get("LD_PRELOAD")])),
        "VIRTUAL_GPU_LIBRARY": str(library),
        "VIRTUAL_GPU_NAME": f"virtual {gpu.name}",
        "VIRTUAL_GPU_MAJOR": str(gpu.major),
        "VIRTUAL_GPU_MINOR": str(gpu.minor),
        "VIRTUAL_GPU_SM_COUNT": str(gpu.sm_count),
        "VIRTUAL_GPU_L2_BYTES": str(gpu.l2_bytes),
        "VIRTUAL_GPU_SHARED_MEMORY_BYTES": str(gpu.shared_memory_bytes),
        "VIRTUAL_GPU_CLOCK_KHZ": str(gpu.clock_khz),
    }


def build() -> Path:
    """Compile the library, unless it was compiled from this source for this CUDA runtime before; returns its path.

    Raises: as `environment` does.
    """
    runtime = _find_cuda_runtime()
    headers = runtime.parent.parent / "include"
    major = runtime.name.rpartition(".so.")[2].split(".")[0]
    return native.shared_library(
        "libcuda.so.1",
        "virtual GPU",
        [_SOURCE, _stubs(runtime)],
        ["-Wl,-soname,libcuda.so.1", f"-DCUDART_MAJOR={major}", f"-I{_HERE}", f"-I{headers}"],
        [(_HERE / "crt" / "host_defines.h").read_bytes(), (headers / "driver_types.h").read_bytes()],
    )


def _stubs(runtime: Path) -> str:
    """C source: for each function that the CUDA runtime exports, a weak one that notes its name and fails."""
    from elftools.elf.elffile import ELFFile

    with runtime.open("rb") as file:
        exported: Any = ELFFile(file).get_section_by_name(".dynsym")
        names = {s.name for s in exported.iter_symbols() if s["st_info"]["type"] == "STT_FUNC" and s["st_value"]}
    lines = ["int virtual_gpu_note_unanswered(const char *name);"]
    for name in sorted(names):
        if name.startswith(("cuda", "__cuda")):
            lines.append(
                f'__attribute__((weak, visibility("default"))) int {name}(void)'
                f' {{ return virtual_gpu_note_unanswered("{name}"); }}'
            )
    return "\n".join(lines) + "\n"


def _find_cuda_runtime() -> Path:
    """The libcudart that torch will load, from the wheels beside torch."""
    torch = package_folder("torch")
    if torch is None:
        raise InstallationError(
            "wanted torch, which DeepGEMM needs, found none",
            hint="pip install 'cachebuilder[build]'",
        )
    candidates = sorted(torch.parent.glob("nvidia/*/lib/libcudart.so.*")) + sorted(torch.glob("lib/libcudart*.so.*"))
    for runtime in candidates:
        if (runtime.parent.parent / "include" / "driver_types.h").exists():
            return runtime
    raise InstallationError(
        f"wanted a CUDA build of torch with its runtime wheel, found {torch} without libcudart and its headers",
        hint="install torch from PyPI, which brings nvidia-cuda-runtime; a CPU build does not",
    )
