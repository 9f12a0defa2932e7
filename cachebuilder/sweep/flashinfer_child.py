"""The child process that imports FlashInfer: it builds modules, calls the GEMM at every M, or tries its kernels.

``python -m cachebuilder.sweep.flashinfer_child FOLDER KIND`` does the job in FOLDER: ``modules``, ``gemms`` or
``trials``. The parent has set the environment.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import inspect
import itertools
import os
import pkgutil
import platform
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from cachebuilder.flashinfer.entries import GEMM_FUNCTION
from cachebuilder.flashinfer.schema import Gemm
from cachebuilder.sweep import protocol
from cachebuilder.sweep.flashinfer_protocol import (
    PLACEHOLDER_KERNEL,
    GemmsAnswer,
    GemmsJob,
    GemmTrialsAnswer,
    GemmTrialsJob,
    ModulesAnswer,
    ModulesJob,
)
from cachebuilder.sweep.loading import JobError, import_package, text
from cachebuilder.sweep.protocol import Failure, OpSweep, Span
from cachebuilder.sweep.worker import LaunchLog

#: For the linker, in words that both nvcc and the host compiler take. The symbols left out are named after nvcc's
#: temporary files. FlashInfer finds functions by the dynamic symbols, which stay.
_LINK = "-Xlinker -s -Xlinker --build-id=none"


def import_flashinfer(path: str) -> Any:
    """Import the copy of FlashInfer in the folder ``path``. Raises `JobError`."""
    try:
        return import_package("flashinfer", path)
    except Exception as error:
        raise JobError("import", f"FlashInfer: {text(error)}") from error


def build_modules(job: ModulesJob, folder: Path) -> ModulesAnswer:
    """Have FlashInfer describe its modules for ninja, and run ninja on the descriptions, in ``folder``.

    FlashInfer's descriptions have absolute paths, and the compilers write some of them into the module. So each becomes
    a path below ``folder``, which has links. Equal inputs then give equal bytes, wherever things are installed.

    Raises:
        JobError: FlashInfer does not load, lacks a module, or a compiler fails.
    """
    flashinfer = import_flashinfer(job.flashinfer)
    import tvm_ffi

    specs = _find(job.names)
    if missing := sorted(set(job.names) - specs.keys()):
        raise JobError("missing", ", ".join(missing))
    links = {
        "flashinfer": Path(flashinfer.__file__).resolve().parent,
        "tvm_ffi": Path(tvm_ffi.__file__).resolve().parent,
        "python": Path(sysconfig.get_path("include")),
    }
    for link, target in links.items():
        (folder / link).symlink_to(target)
    lines = ["ninja_required_version = 1.3"]
    for name, spec in specs.items():
        spec.write_ninja()
        description = spec.ninja_path.read_text().replace(f"{folder}/", "")
        for link, target in links.items():
            description = description.replace(str(target), link)
        description = description.replace("ldflags = ", f"ldflags = {_LINK} $\n    ", 1)
        (folder / f"{name}.ninja").write_text(description)
        lines.append(f"subninja {name}.ninja")
    (folder / "build.ninja").write_text("\n".join([*lines, ""]))
    process = subprocess.run(
        [_ninja(job.flashinfer), "-C", str(folder), "-j", str(job.jobs)], stdout=subprocess.PIPE, check=False
    )
    if process.returncode:
        raise JobError("refused", _first_failure(process.stdout.decode(errors="replace")))
    return ModulesAnswer(built={name: str(spec.jit_library_path) for name, spec in specs.items()})


def _first_failure(output: str) -> str:
    """What ninja prints of the first command that failed: the file, and the compiler's output without the command."""
    lines = output.splitlines()
    first = next((number for number, line in enumerate(lines) if line.startswith("FAILED:")), 0)
    others = [number for number, line in enumerate(lines) if number > first and line.startswith(("[", "ninja:"))]
    return "\n".join([lines[first], *lines[first + 2 : min(others, default=len(lines))]][:60])


def _ninja(flashinfer: str) -> str:
    """The program ninja: FlashInfer's dependency of that name installs it beside Python, or beside FlashInfer."""
    folders = [os.environ.get("PATH", ""), f"{sys.prefix}/bin", f"{Path(flashinfer).parent}/bin"]
    if ninja := shutil.which("ninja", path=os.pathsep.join(folders)):
        return ninja
    raise JobError("import", "FlashInfer: wanted the program ninja, which its package ninja installs; found none")


def _find(names: tuple[str, ...]) -> dict[str, Any]:
    """FlashInfer's own descriptions of the modules ``names``, by name. A module that FlashInfer lacks is left out.

    Most are made by a function without arguments, which has the name in its text. The others, such as attention's, are
    one module for each combination of types and sizes; FlashInfer's list of what it builds for its own package has the
    usual ones. Only what can have the name is called, since some descriptions make FlashInfer download cubins.
    """
    specs: dict[str, Any] = {}
    for name in names:
        candidates = [make() for make in _makers() if f'"{name}"' in inspect.getsource(make)]
        specs |= {spec.name: spec for spec in candidates if spec.name == name}
    if specs.keys() < set(names):
        from flashinfer.aot import register_default_modules
        from flashinfer.jit.core import jit_spec_registry

        register_default_modules()
        known = jit_spec_registry.get_all_specs()
        specs |= {name: known[name] for name in names if name in known}
    return {name: spec for name, spec in sorted(specs.items()) if hasattr(spec, "write_ninja")}


@functools.cache
def _makers() -> list[Callable[[], Any]]:
    """FlashInfer's functions that describe a module and need no argument."""
    import flashinfer.jit

    makers = {}
    for submodule in pkgutil.walk_packages(flashinfer.jit.__path__, "flashinfer.jit."):
        try:
            module = importlib.import_module(submodule.name)
        except ImportError:  # it needs a package that is not installed, such as CuTe-DSL
            continue
        for name, make in inspect.getmembers(module, inspect.isfunction):
            needed = [one for one in inspect.signature(make).parameters.values() if one.default is one.empty]
            if name.startswith("gen_") and name.endswith("_module") and not needed:
                makers[name] = make
    return list(makers.values())


def call_gemms(job: GemmsJob) -> GemmsAnswer:
    """Call the GEMM at every M of every shape, as vLLM does: BF16 activations, FP8 weight with a scale a block.

    First the job's modules are loaded, by FlashInfer's own means.

    Raises:
        JobError: FlashInfer does not load, does not load a module, or refuses a call; or the virtual GPU does not
            answer a CUDA call.
    """
    _load(job.flashinfer, job.modules)
    import torch

    gemm = getattr(importlib.import_module("flashinfer.gemm"), GEMM_FUNCTION)
    log = LaunchLog(ctypes.CDLL(os.environ["VIRTUAL_GPU_LIBRARY"]))
    sweeps = []
    try:
        for index, shape in enumerate(job.gemms):
            sweeps.append(OpSweep(op=index, sm_count=job.gpu.sm_count, spans=tuple(_spans(gemm, shape, torch, log))))
    finally:
        if names := log.take_unanswered():
            raise JobError("unanswered", ", ".join(names))
    return GemmsAnswer(
        sweeps=tuple(sweeps),
        calls=sum(shape.max_m for shape in job.gemms),
        torch=torch.__version__,
        python=platform.python_version(),
    )


def _load(flashinfer: str, modules: tuple[str, ...]) -> None:
    """Import FlashInfer, and load these modules by its own means. Raises `JobError`."""
    import_flashinfer(flashinfer)
    for name, spec in _find(modules).items():
        try:
            spec.build_and_load()
        except Exception as error:
            raise JobError("missing", f"{name}: {error}") from error


def try_gemms(job: GemmTrialsJob) -> GemmTrialsAnswer:
    """Call the GEMM on random inputs. Raises `JobError`."""
    _load(job.flashinfer, job.modules)
    from cachebuilder.sweep import flashinfer_trials

    return flashinfer_trials.try_gemms(job)


def _spans(gemm: Any, shape: Gemm, torch: Any, log: LaunchLog) -> Iterator[Span]:
    """Each span of M that launched the same kernels."""
    activations = torch.empty(shape.max_m, shape.k, device="cuda", dtype=torch.bfloat16)
    weight = torch.empty(shape.n, shape.k, device="cuda", dtype=torch.float8_e4m3fn)
    scales = torch.empty(-(-shape.n // 128), shape.k // 128, device="cuda", dtype=torch.float32)

    def launched_at(m: int) -> tuple[str, ...]:
        log.take()
        try:
            gemm(activations[:m], weight, None, scales, out_dtype=torch.bfloat16)
        except Exception as error:
            raise JobError("refused", f"{shape} at m {m}: {error}") from error
        return tuple(log.path(number).removeprefix(PLACEHOLDER_KERNEL) for number in log.take())

    for entries, group in itertools.groupby(range(1, shape.max_m + 1), launched_at):
        values = list(group)
        yield Span(first=values[0], last=values[-1], step=1, entries=entries)


def main(folder: Path, kind: str) -> None:
    """Do the job in ``folder`` and leave its answer or a failure there."""
    data = (folder / protocol.JOB).read_bytes()
    try:
        answer: ModulesAnswer | GemmsAnswer | GemmTrialsAnswer
        if kind == "modules":
            answer = build_modules(ModulesJob.model_validate_json(data), folder)
        elif kind == "gemms":
            answer = call_gemms(GemmsJob.model_validate_json(data))
        else:
            answer = try_gemms(GemmTrialsJob.model_validate_json(data))
        (folder / protocol.ANSWER).write_text(answer.model_dump_json())
    except JobError as error:
        (folder / protocol.FAILURE).write_text(error.failure.model_dump_json())
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        (folder / protocol.FAILURE).write_text(Failure(kind="refused", reason=reason).model_dump_json())
    sys.stdout.flush()
    os._exit(0)  # as of `child.main`


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
