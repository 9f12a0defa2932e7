"""Why DeepGEMM fails at its import or at a call, as far as its words, torch's or the linker's show it.

The words are from sgl-deep-gemm 0.2.3.post2 (``deep_jit/backend/cuda/backend.hpp``, ``deep_jit/utils/env.hpp``), from
DeepGEMM 2.6.1 (``csrc/jit/compiler.hpp``), and from glibc's linker. What matches nothing here has no known cause.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from dataclasses import dataclass

from cachebuilder.errors import (
    CacheBuilderError,
    DeviceError,
    InstallationError,
    ManifestError,
    PlanError,
    ToolchainError,
)

OTHER_TORCH = "install the torch that this DeepGEMM was built for; the README lists pairs that work"
_DOCTOR = "cachebuilder doctor prints what is installed here"

#: Modules whose package on PyPI has another name.
_PACKAGES = {"tvm_ffi": "apache-tvm-ffi", "cuda": "cuda-python", "yaml": "pyyaml"}
#: The beginning of a library's name → the package on PyPI that has it.
_LIBRARIES = {
    "libcudart": "nvidia-cuda-runtime",
    "libnvrtc": "nvidia-cuda-nvrtc",
    "libcublas": "nvidia-cublas",
    "libnvJitLink": "nvidia-nvjitlink",
    "libnccl": "nvidia-nccl",
    "libtvm_ffi": "apache-tvm-ffi",
}


@dataclass(frozen=True)
class _Cause:
    """One cause.

    Attributes:
        words: what shows it.
        error: makes the error that names it.
        of_calls: whether the words show it in a call of an op as well, where DeepGEMM may only refuse a shape.
    """

    words: re.Pattern[str]
    error: Callable[[re.Match[str], str], CacheBuilderError]
    of_calls: bool


def find(reason: str, where: str, *, of_call: bool = False) -> CacheBuilderError | None:
    """The error that names the cause; None where the words show no cause that is known.

    Args:
        reason: what DeepGEMM, torch or the linker said.
        where: what failed, the beginning of the error's sentence.
        of_call: whether a call of an op failed. Otherwise the import failed, or the check before all ops.
    """
    for cause in _CAUSES:
        if (cause.of_calls or not of_call) and (match := cause.words.search(reason)):
            return cause.error(match, where)
    return None


def _module(match: re.Match[str], where: str) -> CacheBuilderError:
    module = match[1].partition(".")[0]
    if module in ("torch", "deep_gemm", "deep_gemm_cpp"):
        hint = "pip install torch; the README lists the pairs of torch and DeepGEMM that work"
        if module != "torch":
            hint = f"install a DeepGEMM that was built for Python {sys.version_info[0]}.{sys.version_info[1]}"
    elif module in _PACKAGES:
        hint = f"pip install {_PACKAGES[module]}, which brings it"
    else:
        hint = f"install what brings it into the environment of {sys.executable}"
    return InstallationError(f"{where}: wanted the Python module {match[1]}, found none", hint=hint)


def _nvcc(match: re.Match[str], where: str) -> CacheBuilderError:
    return ToolchainError(
        f"{where}: wanted nvcc {match[1]} or later, found an older one",
        hint="name a newer one with --nvcc, or pip install 'cachebuilder[nvcc]'",
    )


def _value(match: re.Match[str], where: str) -> CacheBuilderError:
    return ManifestError(
        f"{where}: DeepGEMM does not take the value {match[2]!r} of {match[1]}",
        hint=f"correct {match[1]} under environment: in the manifest, or remove it",
    )


def _symbol(match: re.Match[str], where: str) -> CacheBuilderError:
    symbol = match[1]
    if re.search(r"c10|torch|caffe2|2at\d|N2at", symbol):
        return InstallationError(
            f"{where}: it was built for another torch, since this one has no {symbol}", hint=OTHER_TORCH
        )
    return InstallationError(
        f"{where}: it was built for another version of a library, since the one here has no {symbol}",
        hint=f"install a DeepGEMM that was built for what is installed here: {_DOCTOR}",
    )


def _library(match: re.Match[str], where: str) -> CacheBuilderError:
    library = match[1].rpartition("/")[2]
    text = f"{where}: wanted the library {library}, found none"
    if library.startswith(("libtorch", "libc10")):
        return InstallationError(f"{text}: it was built for another torch, or for one with CUDA", hint=OTHER_TORCH)
    if library.startswith("libcuda.so"):
        return InstallationError(
            text, hint="it comes with the GPU's driver: install that, or mount it into the container"
        )
    package = next((name for start, name in _LIBRARIES.items() if library.startswith(start)), None)
    if package is None:
        return InstallationError(text, hint="install the system package that has it")
    major = library.rpartition(".so.")[2].partition(".")[0]
    if package.startswith("nvidia-"):
        suffix = "" if major.isdigit() and int(major) >= 13 else f"-cu{major}"
        return InstallationError(
            text,
            hint=f"pip install {package}{suffix}, or install a DeepGEMM that was built for the CUDA of this torch",
        )
    return InstallationError(text, hint=f"pip install {package}, which brings it")


def _system(match: re.Match[str], where: str) -> CacheBuilderError:
    return InstallationError(
        f"{where}: wanted {match[1]} in this system's libraries, found older ones",
        hint="install a DeepGEMM that was built for this system, or run in the image that serves",
    )


def _damaged(match: re.Match[str], where: str) -> CacheBuilderError:
    return InstallationError(f"{where}: its extension is damaged: {match[0]}", hint="install it again")


def _no_room(match: re.Match[str], where: str) -> CacheBuilderError:
    return InstallationError(
        f"{where}: its working folder cannot be written: {match[0]}",
        hint="make room, or name a folder on another disk in TMPDIR",
    )


def _killed(match: re.Match[str], where: str) -> CacheBuilderError:
    return InstallationError(
        f"{where}: {match[0]}: something killed the process",
        hint="the system does so when memory runs out: give it more, or stop what else runs",
    )


def _gpu(match: re.Match[str], where: str) -> CacheBuilderError:
    return DeviceError(
        f"{where}: the CUDA libraries or the driver refused: {match[0].strip()}",
        hint="compare the driver's CUDA version (nvidia-smi) with torch's; --device virtual asks no GPU",
    )


def _misreads(match: re.Match[str], where: str) -> CacheBuilderError:
    return PlanError(
        f"this DeepGEMM misreads tensors under this torch, so a plan would be wrong: {match[0].strip()}",
        hint=OTHER_TORCH,
    )


_CAUSES = tuple(
    _Cause(re.compile(words), error, of_calls)
    for words, error, of_calls in (
        (r"No module named '([\w.]{1,200})'", _module, True),
        (r"NVCC version (?:must be at least|should be >=) ([\d.]+\d)", _nvcc, True),
        (r"invalid value for (D[GJ]_\w{1,100}): (.*)", _value, True),
        (r"undefined symbol: ([\w@.]+)", _symbol, True),
        (r"([\w./+-]+\.so[\w.]*): cannot open shared object file", _library, True),
        (r"version `((?:GLIBC|GLIBCXX|CXXABI)_[\w.]+)' not found", _system, True),
        (r"invalid ELF header|file too short|wrong ELF class\S*|cannot read file data", _damaged, False),
        (r"No space left on device|File too large|Disk quota exceeded", _no_room, True),
        (r"ended with signal 9\b", _killed, True),
        (r"CUDA driver version is insufficient.*|CUDA_ERROR_\w+|[^\n]*CUDA error: .*", _gpu, False),
        # A tensor of two dimensions seems to have another number of them, another size or another type.
        (r".*Assertion error \(.*\b(?:dim|stride|size|scalar_type|is_cuda|numel)\b.*", _misreads, False),
    )
)
