"""The whole build in order: plan a manifest, compile its kernels, pack them. A target GPU can confirm each step."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from cachebuilder.artifact.pack import FlashInferFiles, Packed, flashinfer_files_of, pack
from cachebuilder.common import packages
from cachebuilder.common.cache import scratch_folder
from cachebuilder.common.packages import Material
from cachebuilder.common.progress import Progress, no_progress
from cachebuilder.common.results import Results
from cachebuilder.common.version import __version__
from cachebuilder.compiling import flashinfer, record
from cachebuilder.compiling.compiler import Compiled, CompileOptions, Compiler
from cachebuilder.cuda.device import DeviceChoice, DeviceName
from cachebuilder.cuda.toolchain import Toolchain
from cachebuilder.manifest.inputs import Inputs
from cachebuilder.planning import make as planning
from cachebuilder.planning.kept import KeptPlans
from cachebuilder.planning.plan import Plan
from cachebuilder.verifying.real import Confirmation


@dataclass(frozen=True)
class Built:
    """A finished build.

    Attributes:
        packed: the artifact.
        device: where the build ran: ``virtual``, or ``cuda`` if this machine's GPU confirmed it.
        flashinfer_seconds: how long FlashInfer's modules and the kernels of its GEMM took; 0 where there are none.
        plan_seconds, pack_seconds, launch_seconds: how long these steps took; ``compiled`` says it of compiling.
    """

    inputs: Inputs
    plan: Plan
    compiled: Compiled
    packed: Packed
    device: DeviceName
    flashinfer_seconds: float
    plan_seconds: float
    pack_seconds: float
    launch_seconds: float


def plan(
    inputs: Inputs, *, reuse: bool = True, shared: Results | None = None, progress: Progress = no_progress
) -> Plan:
    """Find every kernel that DeepGEMM will ask for, by calling DeepGEMM itself on a virtual GPU.

    Args:
        inputs: from `load_manifest`.
        reuse: take the plan from the user's cache folder if nothing that it depends on has changed; otherwise keep the
            new plan there.
        shared: where other builders keep their plans (`open_store`); None for no such place.
        progress: the step is "plan", the units are calls of DeepGEMM.

    Raises:
        PlanError: DeepGEMM refuses a shape, or the sweep shows something that no cache may be built from.
        InstallationError: torch or DeepGEMM does not load, or the user's cache folder cannot be written.
    """
    options = CompileOptions(use_store=reuse, shared=shared)
    return planning.make(
        inputs,
        plans=_plans(options),
        progress=progress,
        modules=lambda: flashinfer.build_modules(inputs, options, progress),
    )


def build(
    inputs: Inputs,
    output: str | Path,
    *,
    options: CompileOptions = CompileOptions(),
    device: DeviceChoice = "virtual",
    progress: Progress = no_progress,
) -> Built:
    """Plan a manifest, compile every kernel, and pack them into one artifact.

    Also writes the record of the build, ``OUTPUT.build.json``. Equal inputs give an artifact of equal bytes, regardless
    of the options and the device.

    Args:
        inputs: from `load_manifest`.
        output: the artifact's file; it is written whole or not at all.
        options: how to compile.
        device: ``virtual`` needs no GPU. ``cuda`` lets the GPU of this machine confirm each step: DeepGEMM must ask for
            exactly the planned kernels on it, and then every call must be served from the finished artifact. ``auto``
            is ``cuda`` if that GPU is the manifest's target.
        progress: the steps are "FlashInfer's modules" (commands), "plan" (calls), "compile" (kernels), and on a GPU
            "plan on the GPU" and "launch".

    Raises:
        PlanError: DeepGEMM refuses a shape, or asks for other kernels on the GPU than on the virtual one.
        CompileError: nvcc refuses a kernel, or a kernel's code differs from what nvcc makes of it alone.
        ArtifactError: the artifact cannot be written.
        DeviceError: the GPU is not the target, or a call on it is not served from the artifact.
        InstallationError, ToolchainError: something that is needed is missing on this machine.
    """
    chosen = inputs.manifest.target.choose(device)
    on_gpu = Confirmation(inputs, progress) if chosen == "cuda" else None
    modules_started = time.monotonic()
    modules = flashinfer.build_modules(inputs, options, progress)
    started = time.monotonic()
    with Compiler(inputs, options) as compiler:
        made = planning.make(
            inputs,
            plans=_plans(options),
            progress=progress,
            on_sweep=compiler.prepare,
            on_kernel=compiler.expect,
            modules=lambda: modules,
        )
        if on_gpu:
            on_gpu.require_same_plan(made)
        planned = time.monotonic()
        compiled = compiler.compile(made.kernels, progress)
    gemms_started = time.monotonic()
    files = _for_flashinfer(inputs, made, modules, options)
    packing = time.monotonic()
    artifact = pack(inputs, made, compiled.cubins, files)
    launching = time.monotonic()
    if on_gpu:
        with scratch_folder() as scratch:
            unproven = scratch / "artifact.tar.zst"  # the artifact gets its name only when the GPU has served from it
            artifact.write(unproven)
            on_gpu.require_served(unproven)
    packed = artifact.write(Path(output))
    built = Built(
        inputs,
        made,
        compiled,
        packed,
        chosen,
        flashinfer_seconds=started - modules_started + packing - gemms_started,
        plan_seconds=planned - started,
        pack_seconds=launching - packing,
        launch_seconds=time.monotonic() - launching,
    )
    record.write(packed.path, _record_of(built))
    return built


def _plans(options: CompileOptions) -> KeptPlans:
    return KeptPlans(own=options.use_store, shared=options.shared)


def _for_flashinfer(
    inputs: Inputs, made: Plan, modules: Mapping[str, bytes], options: CompileOptions
) -> FlashInferFiles | None:
    if made.flashinfer is None:
        return None
    cubins = flashinfer.compile_gemms(inputs, made.flashinfer.kernels, options)
    return flashinfer_files_of(inputs, made, modules, cubins)


def _record_of(built: Built) -> record.BuildRecord:
    compiled = built.compiled
    return record.BuildRecord(
        schema_version=1,
        artifact=built.packed.sha256,
        cachebuilder=__version__,
        finished=datetime.now(UTC).isoformat(timespec="seconds"),
        jobs=compiled.jobs,
        compiled=len(compiled.compiled),
        reused=compiled.reused,
        plan_seconds=round(built.plan_seconds, 3),
        compile_seconds=round(compiled.wall_seconds, 3),
        pack_seconds=round(built.pack_seconds, 3),
        cpu_seconds=round(compiled.cpu_seconds, 3),
        runs=tuple(compiled.calls),
        materials=_materials(built.inputs.toolchain),
    )


def _materials(toolchain: Toolchain) -> tuple[Material, ...]:
    bin_folder, release = toolchain.nvcc.parent, toolchain.release
    programs = {"nvcc": toolchain.nvcc, "ptxas": bin_folder / "ptxas", "cicc": bin_folder.parent / "nvvm/bin/cicc"}
    tools = (packages.tool(path, name, release) for name, path in programs.items() if path.exists())
    return (packages.own(), *tools, *packages.installed())
