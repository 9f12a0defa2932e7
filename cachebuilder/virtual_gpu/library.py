"""The virtual GPU's library, and the environment in which a process sees that GPU and no other."""

from __future__ import annotations

import mmap
import os
import re
import struct
from pathlib import Path

from cachebuilder.common import native
from cachebuilder.cuda.gpus import GPUS, Gpu
from cachebuilder.deepgemm.installation import package_folder
from cachebuilder.errors import InstallationError

_HERE = Path(__file__).parent
#: The file of an engine's run with the names of the CUDA calls that have no answer, one a line.
UNANSWERED = "unanswered.txt"
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


def engine_environment(gpu: Gpu, count: int, folder: Path, memories: int = 1) -> dict[str, str]:
    """The variables by which all processes of an engine see ``count`` of ``gpu`` and no other.

    Args:
        folder: gets a folder with links to the library, which Triton wants by the name ``libcuda.so``, and
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
    return own | {
        "LD_PRELOAD": f"{own['LD_PRELOAD']} {_beside('nvml.c', 'libnvidia-ml.so.1', 'virtual NVML')}",
        "VLLM_NCCL_SO_PATH": str(_beside("nccl.c", "libnccl.so.2", "virtual NCCL")),
        "TRITON_LIBCUDA_PATH": str(links),
        "VIRTUAL_GPU_NAME": f"NVIDIA {gpu.name}",
        "VIRTUAL_GPU_COUNT": str(count),
        "VIRTUAL_GPU_MEMORY_BYTES": str(memories * gpu.memory.bytes),
        "VIRTUAL_GPU_MEMORY_CLOCK_KHZ": str(gpu.memory.clock_khz),
        "VIRTUAL_GPU_MEMORY_BUS_BITS": str(gpu.memory.bus_bits),
        "VIRTUAL_GPU_UNANSWERED_FILE": str(folder / UNANSWERED),
    }


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
        [_SOURCE, _HERE / "driver.c", _HERE / "cublas.c", _stubs(runtime), *_cublas(runtime)],
        ["-Wl,-soname,libcuda.so.1", f"-DCUDART_MAJOR={major}", f"-I{_HERE}", f"-I{headers}"],
        [(_HERE / "crt" / "host_defines.h").read_bytes(), (headers / "driver_types.h").read_bytes()],
    )


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


def _cublas(runtime: Path) -> list[str]:
    """C source: for each function of the cuBLAS beside ``runtime``, a weak one: a product is done, a question fails."""
    libraries = sorted(runtime.parent.glob("libcublas.so.*"))
    if not libraries:
        return []
    lines = ["int virtual_gpu_note_unanswered(const char *name);"]
    for name in _exported(libraries[0]):
        if name.startswith("cublas"):
            asked = any(word in name for word in _CUBLAS_ANSWERS)
            answer = f'virtual_gpu_note_unanswered("{name}")' if asked else "0"
            lines.append(f'__attribute__((weak, visibility("default"))) int {name}(void) {{ return {answer}; }}')
    return ["\n".join(lines) + "\n"]


def _beside(source: str, name: str, what: str) -> Path:
    """Compile a library of its own, unless it was compiled before; returns its path. Raises as `environment` does."""
    return native.shared_library(name, what, [_HERE / source], [f"-Wl,-soname,{name}", f"-I{_HERE}"])


#: ELF-64 (the System V ABI, chapter 4): one section's header, and one symbol: name, type, section, address.
_SECTION, _SYMBOL = struct.Struct("<II8x8xQQII16x"), struct.Struct("<IB1xHQ8x")
_DYNSYM, _FUNCTION = 11, 2


def _exported(library: Path) -> list[str]:
    """The names of a library's functions, sorted. Every sweep waits for it; pyelftools would take 0.1 s."""
    with library.open("rb") as file:
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    [first], (size, count) = struct.unpack_from("<Q", data, 0x28), struct.unpack_from("<HH", data, 0x3A)
    sections = [_SECTION.unpack_from(data, first + number * size) for number in range(count)]
    names = set()
    for _, kind, start, length, link, _ in sections:
        if kind == _DYNSYM:
            strings = sections[link][2]
            for name, info, _, address in _SYMBOL.iter_unpack(data[start : start + length]):
                if info & 0xF == _FUNCTION and address:
                    names.add(data[strings + name : data.find(b"\0", strings + name)].decode())
    return sorted(names)


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
