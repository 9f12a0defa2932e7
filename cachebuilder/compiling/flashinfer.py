"""Compile what FlashInfer would compile at run time: modules by its own descriptions, kernels by its own nvcc calls."""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from cachebuilder.common.cache import scratch_folder
from cachebuilder.common.code import code_digest
from cachebuilder.common.cores import available_cores
from cachebuilder.common.progress import Progress, no_progress
from cachebuilder.compiling.compiler import CompileOptions
from cachebuilder.cuda.processes import Processes
from cachebuilder.cuda.toolchain import host_compiler_text
from cachebuilder.errors import CompileError
from cachebuilder.manifest.inputs import Inputs
from cachebuilder.planning.plan import Kernel
from cachebuilder.sweep import flashinfer as sweep

#: Where FlashInfer's GEMM has its headers, below FlashInfer's folder: what `get_fp8_blockscale_gemm_runner_sm90` names
#: (``flashinfer/gemm/gemm_base.py``, 0.6.13). The compiler reads the headers by this relative path, so that no path of
#: this machine is in a cubin.
_INCLUDE = "flashinfer/data/csrc/nv_internal/tensorrt_llm"
#: nvcc numbers a module's internal names by its process without it.
_REPEATABLE = "-frandom-seed=flashinfer"
#: The code that decides the bytes: the store serves only what the same code made.
CODE = ("compiling/flashinfer.py", "flashinfer", "sweep/flashinfer.py", "sweep/flashinfer_child.py")


def build_modules(inputs: Inputs, options: CompileOptions, progress: Progress = no_progress) -> dict[str, bytes]:
    """The modules that the manifest's ``flashinfer`` needs, by name: from the store, or built now.

    Arguments and errors are as `sweep.flashinfer.build_modules` does.
    """
    if inputs.flashinfer is None:
        return {}
    store, keys = options.store, module_keys(inputs)
    modules = {name: data for name, key in keys.items() if (data := store.get(key)) is not None}
    if missing := [name for name in keys if name not in modules]:
        jobs = options.jobs or available_cores()
        gpu = inputs.manifest.target.gpu
        built = sweep.build_modules(inputs.flashinfer, inputs.toolchain, gpu, missing, jobs, progress)
        for name, data in built.items():
            store.put(keys[name], data)
        modules |= built
    return dict(sorted(modules.items()))


def module_keys(inputs: Inputs) -> dict[str, str]:
    """The key in the store of each module that the manifest's ``flashinfer`` needs, by name."""
    needs, gpu = inputs.manifest.flashinfer, inputs.manifest.target.gpu
    return {name: _key(inputs, "module", gpu.capability, name) for name in (needs.all_modules if needs else [])}


def compile_gemms(inputs: Inputs, kernels: tuple[Kernel, ...], options: CompileOptions) -> dict[str, bytes]:
    """The cubin of each kernel that FlashInfer's GEMM asks for, by entry, each by an nvcc call as FlashInfer makes it.

    Raises:
        CompileError: nvcc refuses kernels; the text names each, with nvcc's output.
    """
    store = options.store
    keys = {kernel.entry: _key(inputs, "gemm", *kernel.flags, kernel.source) for kernel in kernels}
    cubins = {entry: data for entry, key in keys.items() if (data := store.get(key)) is not None}
    missing = [kernel for kernel in kernels if kernel.entry not in cubins]
    failures = []
    processes = Processes()
    with scratch_folder() as scratch, ThreadPoolExecutor(options.jobs or available_cores()) as pool:
        try:
            running = {kernel.entry: pool.submit(_compile, inputs, kernel, scratch, processes) for kernel in missing}
            for entry, future in running.items():
                try:
                    cubins[entry] = future.result()
                    store.put(keys[entry], cubins[entry])
                except CompileError as error:
                    failures.append(f"{entry}:\n{error}")
        except BaseException:
            processes.stop()
            raise
    if failures:
        raise CompileError("\n".join([f"{len(failures)} of FlashInfer's kernels did not compile", *failures]))
    return dict(sorted(cubins.items()))


def _compile(inputs: Inputs, kernel: Kernel, scratch: Path, processes: Processes) -> bytes:
    assert inputs.flashinfer is not None
    folder = scratch / kernel.entry
    folder.mkdir()
    (folder / "flashinfer").symlink_to(inputs.flashinfer.path)
    (folder / "kernel.cu").write_text(kernel.source)
    flags = [*kernel.flags, f"-I{_INCLUDE}", _REPEATABLE]
    processes.run([str(inputs.toolchain.nvcc), "kernel.cu", "-o", "kernel.cubin", *flags], folder)
    return (folder / "kernel.cubin").read_bytes()


def _key(inputs: Inputs, *parts: str) -> str:
    """A key in the store: everything that the bytes depend on."""
    assert inputs.flashinfer is not None
    flashinfer = inputs.flashinfer
    made_by = [code_digest(CODE), inputs.toolchain.version_text, host_compiler_text()]
    made_of = [flashinfer.version, flashinfer.code_digest, flashinfer.tvm_ffi, sweep.cuda_wheels_digest()]
    return hashlib.sha256(json.dumps([*made_by, *made_of, *parts]).encode()).hexdigest()
