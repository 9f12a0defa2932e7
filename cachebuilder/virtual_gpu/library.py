"""The virtual GPU's library, and the environment in which a process sees that GPU and no other."""

from __future__ import annotations

import os
import re
from functools import partial
from pathlib import Path
from typing import Any

from cachebuilder.common import native
from cachebuilder.cuda.gpus import GPUS, Gpu
from cachebuilder.deepgemm.installation import package_folder
from cachebuilder.errors import InstallationError

_HERE = Path(__file__).parent
#: The file of an engine's run with the names of the CUDA calls that have no answer, one a line.
UNANSWERED = "unanswered.txt"
_SOURCES = ("virtual_gpu.c", "streams.c", "driver.c", "cublas.c")


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


def engine_environment(gpu: Gpu, count: int, folder: Path, memories: int = 1) -> dict[str, str]:
    """The variables by which all processes of an engine see ``count`` of ``gpu`` and no other.

    Args:
        folder: gets a folder with links to the library, which Triton and linkers want by the name ``libcuda.so``, and
            `UNANSWERED`, the names of the calls without an answer.
        memories: how many GPUs' memory each has.

    Raises:
        InstallationError: as `environment` does, or nothing is known of the GPU's memory.
    """
    if gpu.memory is None:
        raise InstallationError(
            f"wanted a GPU whose memory is known, found {gpu.name}",
            hint=f"engines can be observed on {', '.join(name for name, one in GPUS.items() if one.memory)}",
        )
    own = environment(gpu)
    links = folder / "libcuda"
    links.mkdir()
    for name in ("libcuda.so", "libcuda.so.1"):
        (links / name).symlink_to(own["VIRTUAL_GPU_LIBRARY"])
    nccl = {}
    if count > 1:  # one rank loads no NCCL, and vLLM's caches hash the variable
        path = str(_beside("nccl.c", "libnccl.so.2", "virtual NCCL"))
        nccl = {"VLLM_NCCL_SO_PATH": path, "SGLANG_NCCL_SO_PATH": path}
    return (
        own
        | nccl
        | {
            "LD_PRELOAD": f"{own['LD_PRELOAD']} {_beside('nvml.c', 'libnvidia-ml.so.1', 'virtual NVML')}",
            "LIBRARY_PATH": os.pathsep.join(filter(None, [str(links), os.environ.get("LIBRARY_PATH")])),
            "TRITON_LIBCUDA_PATH": str(links),
            "VIRTUAL_GPU_NAME": f"NVIDIA {gpu.name}",
            "VIRTUAL_GPU_COUNT": str(count),
            "VIRTUAL_GPU_MEMORY_BYTES": str(memories * gpu.memory.bytes),
            "VIRTUAL_GPU_MEMORY_CLOCK_KHZ": str(gpu.memory.clock_khz),
            "VIRTUAL_GPU_MEMORY_BUS_BITS": str(gpu.memory.bus_bits),
            "VIRTUAL_GPU_UNANSWERED_FILE": str(folder / UNANSWERED),
        }
    )


def build() -> Path:
    """Compile the library, unless it was compiled from this source for this CUDA runtime before; returns its path.

    Raises: as `environment` does.
    """
    runtime = find_cuda_runtime()
    headers = runtime.parent.parent / "include"
    major = runtime.name.rpartition(".so.")[2].split(".")[0]
    return native.shared_library(
        "libcuda.so.1",
        "virtual GPU",
        [*(_HERE / name for name in _SOURCES), partial(_stubs, runtime), partial(_cublas, runtime)],
        ["-Wl,-soname,libcuda.so.1", f"-DCUDART_MAJOR={major}", f"-I{_HERE}", f"-I{headers}"],
        [
            *((_HERE / name).read_bytes() for name in ("library.py", "virtual_gpu.h", "crt/host_defines.h")),
            *((headers / name).read_bytes() for name in ("driver_types.h", "cuda.h")),
            # Every sweep waits for this, so the functions of the libraries are listed for a compilation only.
            *(_identity(library) for library in (runtime, *_cublas_libraries(runtime))),
        ],
    )


def _identity(library: Path) -> bytes:
    """What changes when a library is replaced: its path, size and time."""
    status = library.stat()
    return f"{library} {status.st_size} {status.st_mtime_ns}".encode()


def _stubs(runtime: Path) -> str:
    """C source: for each function that the CUDA runtime exports, a weak one that notes its name and fails."""
    lines = ["int virtual_gpu_note_unanswered(const char *name);"]
    driver = re.findall(r"CUDAAPI (cu\w+)\(", (runtime.parent.parent / "include" / "cuda.h").read_text())
    for name in [*_exported(runtime), *sorted(set(driver))]:
        if name.startswith(("cu", "__cuda")):
            lines.append(
                f'__attribute__((weak, visibility("default"))) int {name}(void)'
                f' {{ return virtual_gpu_note_unanswered("{name}"); }}'
            )
    return "\n".join(lines) + "\n"


#: Functions of cuBLAS that write a value into the caller's memory, of which `cublas.c` answers those that torch calls.
_CUBLAS_ANSWERS = ("Get", "Create", "Query", "Destroy")


def _cublas_libraries(runtime: Path) -> list[Path]:
    """The cuBLAS beside ``runtime``, as a list of one; empty if there is none."""
    return sorted(runtime.parent.glob("libcublas.so.*"))[:1]


def _cublas(runtime: Path) -> str:
    """C source: for each function of the cuBLAS beside ``runtime``, a weak one: a product is done, a question fails."""
    lines = ["int virtual_gpu_note_unanswered(const char *name);"]
    for name in (name for library in _cublas_libraries(runtime) for name in _exported(library)):
        if name.startswith("cublas"):
            asked = any(word in name for word in _CUBLAS_ANSWERS)
            answer = f'virtual_gpu_note_unanswered("{name}")' if asked else "0"
            lines.append(f'__attribute__((weak, visibility("default"))) int {name}(void) {{ return {answer}; }}')
    return "\n".join(lines) + "\n"


def _beside(source: str, name: str, what: str) -> Path:
    """Compile a library of its own, unless it was compiled before; returns its path. Raises as `environment` does."""
    return native.shared_library(name, what, [_HERE / source], [f"-Wl,-soname,{name}", f"-I{_HERE}"])


def _exported(library: Path) -> list[str]:
    """The names of a library's functions, sorted."""
    from elftools.elf.elffile import ELFFile

    with library.open("rb") as file:
        symbols: Any = ELFFile(file).get_section_by_name(".dynsym")
        return sorted({s.name for s in symbols.iter_symbols() if s["st_info"]["type"] == "STT_FUNC" and s["st_value"]})


def find_cuda_runtime() -> Path:
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
