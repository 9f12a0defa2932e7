"""Run an engine on a virtual GPU, and make a manifest of every call that it makes of DeepGEMM.

The engine decides which shapes, formats and SM counts it asks for; this package only writes them down. A kernel that
the engine's DeepGEMM asked for, and that no written op plans, goes into the manifest as a source.
"""

from __future__ import annotations

import os
import re
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cachebuilder.authoring import sources
from cachebuilder.authoring.observe import calls, engines, program
from cachebuilder.authoring.observe.calls import Observed
from cachebuilder.authoring.observe.command import Change
from cachebuilder.authoring.observe.flashinfer import flashinfer_needs, missing_needs
from cachebuilder.authoring.observe.manifest import About, manifest_text
from cachebuilder.common.cache import scratch_folder
from cachebuilder.common.progress import Progress, no_progress
from cachebuilder.cuda import toolchain as toolchains
from cachebuilder.cuda.gpus import Gpu
from cachebuilder.deepgemm import installation as installations
from cachebuilder.deepgemm.environment import kernel_variables
from cachebuilder.deepgemm.installation import Installation, package_folder
from cachebuilder.errors import RecordingError
from cachebuilder.flashinfer.schema import FlashInferNeeds
from cachebuilder.manifest import schema as manifests
from cachebuilder.manifest.inputs import Inputs
from cachebuilder.planning import make as planning
from cachebuilder.sweep.recorder import read_entries, recording_compiler


@dataclass(frozen=True)
class Observation:
    """A finished observation.

    Attributes:
        manifest: what was observed, as a manifest's text.
        installation: the DeepGEMM that was called.
        requested: the source of each kernel that the engine's DeepGEMM asked for → DeepGEMM's name for it.
        planned: the same for each kernel that the manifest asks for, those included.
        sources: how many of the engine's kernels no op asks for.
        changes: what was changed in the user's command and environment.
        flashinfer: what the engine took from FlashInfer.
        with_flashinfer: the engine took what it would while it serves, and the manifest has that.
    """

    manifest: str
    run: program.Run
    installation: Installation
    requested: Mapping[str, str]
    planned: Mapping[str, str]
    sources: int
    changes: tuple[Change, ...]
    flashinfer: FlashInferNeeds | None
    with_flashinfer: bool

    @property
    def observed(self) -> Observed:
        """What the engine's processes wrote down."""
        return self.run.observed


@dataclass(frozen=True)
class Host:
    """What a command finds where it is observed.

    Attributes:
        gpu: the virtual GPU.
        environment: the user's variables.
        nvcc: the compiler whose version DeepGEMM is told; None: the one that is found.
    """

    gpu: Gpu
    environment: Mapping[str, str]
    nvcc: Path | None = None


@dataclass(frozen=True)
class Lack:
    """What a manifest lacks.

    Attributes:
        names: DeepGEMM's names of the kernels → how many of that name.
        kernels: how many in all.
        requested: how many of them this very run asked for.
        flashinfer: modules and shapes of GEMMs for FlashInfer; empty for an engine that was observed without it.
    """

    names: Mapping[str, int]
    kernels: int
    requested: int
    flashinfer: FlashInferNeeds

    def __bool__(self) -> bool:
        return bool(self.kernels or self.flashinfer.modules or self.flashinfer.gemms)


def observe(
    command: Sequence[str],
    host: Host,
    *,
    name: str | None = None,
    with_flashinfer: bool = False,
    progress: Progress = no_progress,
) -> Observation:
    """Run ``command`` on a virtual GPU, and make a manifest of what it asks DeepGEMM for.

    Args:
        command: the user's serve command, or a program that calls DeepGEMM and ends. Its Python must have the torch
            that this one has, since the virtual GPU is made for that.
        name: the manifest's; default: from the model and the GPU.
        with_flashinfer: let the engine take from FlashInfer what it would take while it serves, and write that too.
        progress: the steps are "start", "requests" and "plan".

    Raises:
        RecordingError: the command cannot be observed, fails, or calls no DeepGEMM.
        PlanError: it made a CUDA call that the virtual GPU does not answer, or the ops cannot be planned.
        ManifestError: what was observed makes no manifest.
        InstallationError, ToolchainError: something is missing on this machine.
    """
    gpu, environment = host.gpu, host.environment
    toolchain = toolchains.find(host.nvcc)
    launch = engines.launch(command, environment, gpu, with_flashinfer)
    with scratch_folder() as folder:
        compiler = recording_compiler(folder, toolchain.version_text)
        setting = program.Setting(gpu, compiler, folder, environment)
        run = program.run(launch, setting, progress)
        installation = _installation(run.observed, command)
        entries = read_entries(setting.root, installation.generation).values()
        requested = {entry.source: entry.kernel_name for entry in entries}
        needs = flashinfer_needs(run.observed)
        about = About(
            gpu,
            name or _name(launch.server.model if launch.server else "", gpu),
            shlex.join(command),
            run.requests,
            needs if with_flashinfer else None,
        )
        text = manifest_text(run.observed, about, kernel_variables(installation.generation, environment))
        draft = folder / "manifest.yaml"
        draft.write_text(text)
        planned: dict[str, str] = {}
        if run.observed.ops:
            manifest, data = manifests.load(draft)
            planned = _plan(Inputs(manifest, data, toolchain, installation), progress)
        missing = {source: kernel for source, kernel in requested.items() if source not in planned}
        new = [
            sources.NewSource(source, f"{kernel}: asked for by the engine, and planned by no op", kernel)
            for source, kernel in missing.items()
        ]
        if run.observed.ops:
            sources.add(draft, new)
        else:
            sources.create(draft, {"name": about.name, "target": {"gpu": gpu.name}}, about.command, new)
        return Observation(
            manifest=draft.read_text(),
            run=run,
            installation=installation,
            requested=requested,
            planned=planned | missing,
            sources=len(missing),
            changes=launch.changes,
            flashinfer=needs,
            with_flashinfer=with_flashinfer,
        )


def check(observation: Observation, path: Path, nvcc: Path | None = None, progress: Progress = no_progress) -> Lack:
    """What the manifest at ``path`` lacks of what was observed.

    Raises:
        ManifestError, PlanError: it cannot be read or planned.
    """
    manifest, data = manifests.load(path)
    toolchain = toolchains.find(nvcc, at_least=observation.installation.oldest_nvcc)
    inputs = Inputs(manifest, data, toolchain, observation.installation)
    known = _plan(inputs, progress)
    lacking = {source: kernel for source, kernel in observation.planned.items() if source not in known}
    requested = sum(source in observation.requested for source in lacking)
    needs = missing_needs(observation.flashinfer if observation.with_flashinfer else None, manifest.flashinfer)
    return Lack(dict(Counter(lacking.values())), len(lacking), requested, needs)


def _plan(inputs: Inputs, progress: Progress) -> dict[str, str]:
    """The source of each kernel that a manifest asks for → its name."""
    return {kernel.source: kernel.name for kernel in planning.make(inputs, progress=progress).kernels}


def _installation(observed: calls.Observed, command: Sequence[str]) -> Installation:
    """The one DeepGEMM that was called."""
    if not observed.copies:
        raise RecordingError(
            f"{command[0]} called no function of DeepGEMM",
            hint="does the engine choose DeepGEMM for this model and GPU? Its log says which kernels it takes",
        )
    own, used = package_folder("torch"), observed.facts.torch
    if own is None or used is None or not os.path.samefile(own, used):
        raise RecordingError(
            f"wanted a program with this Python's torch, {own}, which the virtual GPU is made for, found {used}",
            hint="install cachebuilder into the engine's own environment, and run it there",
        )
    first, *others = observed.copies
    if others:
        raise RecordingError(f"wanted one copy of DeepGEMM, found calls of {first} and {others[0]}")
    return installations.find(first)


def _name(model: str, gpu: Gpu) -> str:
    text = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(model).name or "observed").strip("-._") or "observed"
    return f"{text}-{gpu.name}".lower()[:100]
