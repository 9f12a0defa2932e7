"""Prove that a restored cache is complete: replay a manifest against it with the frozen compiler, on a virtual GPU.

The first pass is serving as it will be: the frozen nvcc refuses every request, and the virtual GPU loads only real
cubins. If a request was refused there, a second pass with the recording compiler finds all missing kernels. Both
passes read the cache through a folder of links, so nothing is ever written to it, whichever user runs this.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cachebuilder.artifact.index import CACHE
from cachebuilder.common.progress import Progress
from cachebuilder.cuda.device import DeviceName
from cachebuilder.cuda.nvml import VisibleGpu
from cachebuilder.deepgemm import entries as entry_files
from cachebuilder.deepgemm.environment import kernel_variables
from cachebuilder.deepgemm.installation import Installation
from cachebuilder.deepgemm.source import kernel_template
from cachebuilder.flashinfer.installation import FlashInfer
from cachebuilder.manifest.schema import Manifest
from cachebuilder.planning.requests import selections
from cachebuilder.planning.selection import Selection
from cachebuilder.restoring import frozen
from cachebuilder.restoring.damage import Damage
from cachebuilder.restoring.folder import RestoredArtifact, RestoredFolder, open_folder
from cachebuilder.restoring.frozen import LOG_VARIABLE, POLICY_VARIABLE
from cachebuilder.restoring.machine import Machine
from cachebuilder.restoring.restore import restore
from cachebuilder.sweep import run as sweep
from cachebuilder.sweep.process import Compiler, Setting
from cachebuilder.sweep.protocol import Refusal, SweepJob
from cachebuilder.sweep.recorder import recording_compiler
from cachebuilder.verifying.report import MissingKernel, Replay

#: For each launched entry, where it is launched.
Launches = dict[str, tuple[Selection, ...]]


@dataclass(frozen=True)
class Serving:
    """One manifest's calls, to be served from a restored folder.

    Attributes:
        compiler_text: what the folder's frozen nvcc answers to ``--version``.
        scratch: a folder for the child processes.
        gpu: the GPU that is visible here, for what differs; it is not used.
        flashinfer: the FlashInfer that will serve; None where the manifest needs none.
    """

    folder: RestoredFolder
    installation: Installation
    manifest: Manifest
    compiler_text: str
    scratch: Path
    gpu: VisibleGpu | None = None
    flashinfer: FlashInfer | None = None

    @property
    def environment(self) -> dict[str, str]:
        """The variables that change kernels: those of this process, which would serve with them, and the manifest's."""
        here = kernel_variables(self.installation.generation, os.environ)
        return here | self.manifest.environment

    def job(self, device: DeviceName = "virtual") -> SweepJob:
        """Every call of the manifest; a refused one does not end it."""
        return SweepJob.of(self.manifest, self.installation, device, go_on=True, self_check=False)

    def setting(
        self, name: str, step: str, compiler: Compiler | None = None, entries: frozenset[str] | None = None
    ) -> Setting:
        """The setting of the child process ``name``, whose progress is reported as ``step``.

        Args:
            compiler: left out, the folder's frozen nvcc, which refuses.
            entries: those of the folder's that the child finds; left out, all.
        """
        (scratch := self.scratch / name).mkdir()
        entries = self.folder.entries if entries is None else entries
        roots = linked_roots(self.folder, entries, self.installation, scratch)
        compiler = compiler or frozen_compiler(self.compiler_text, scratch)
        return Setting(step, compiler, roots, scratch, self.environment)


def open_target(target: Path, installation: Installation, scratch: Path) -> RestoredFolder:
    """The restored folder ``target``; an artifact is restored into ``scratch``, whatever differs here.

    Raises:
        ArtifactError: it is neither.
    """
    if not target.is_file():
        return open_folder(target)
    restore([target], scratch / "restored", machine=Machine(installation), force=True, with_baked=False)
    return open_folder(scratch / "restored")


def replay(
    serving: Serving, artifacts: Sequence[RestoredArtifact], damage: Sequence[Damage], progress: Progress
) -> tuple[Replay, Launches]:
    """Replay one manifest on the virtual GPU; returns what was found, and what was launched where.

    Args:
        artifacts: those of the folder that may be meant for the manifest.
        damage: the folder's.

    Raises: as `sweep.run.call` does; a refused call is part of the replay.
    """
    folder, manifest = serving.folder, serving.manifest
    damaged = frozenset(item.entry for item in damage) & folder.entries
    recorder = recording_compiler(serving.scratch, serving.compiler_text)
    self_check = serving.job().model_copy(update={"ops": (), "self_check": True})
    sweep.call(self_check, serving.setting("self-check", manifest.name, recorder, frozenset()), progress)
    setting = serving.setting("frozen", manifest.name)
    answer = first = sweep.call(serving.job(), setting, progress)
    missing: tuple[MissingKernel, ...] = ()
    refusals: tuple[Refusal, ...] = ()
    whole = folder.entries - damaged
    if first.refusals or Path(setting.compiler.environment[LOG_VARIABLE]).exists() or first.launched - whole:
        recording = serving.setting("recording", manifest.name, recorder, whole)
        answer = sweep.call(serving.job(), recording, progress)
        missing = _missing(selections(answer.sweeps), serving, damaged)
        unexplained = [refusal for refusal in first.refusals if not _explained(refusal, missing)]
        refusals = tuple(dict.fromkeys([*answer.refusals, *unexplained]))
    missing += _missing_sources(serving, damaged)
    hits = sorted(answer.launched - {kernel.entry for kernel in missing})
    machine = Machine(
        serving.installation,
        serving.gpu,
        serving.environment,
        serving.compiler_text,
        tuple(manifest.all_sm_counts),
        serving.flashinfer,
    )
    nearest = min((machine.differences(artifact.index) for artifact in artifacts), key=len)
    report = Replay(
        manifest=manifest.name,
        ops=tuple(manifest.ops),
        calls=answer.calls,
        hits=tuple(hits),
        unlisted=tuple(entry for entry in hits if entry not in folder.listed),
        missing=missing,
        refusals=refusals,
        differences=tuple(nearest),
    )
    return report, selections(answer.sweeps)


def linked_roots(
    folder: RestoredFolder, entries: frozenset[str], installation: Installation, scratch: Path
) -> list[Path]:
    """Cache roots through which DeepGEMM reads ``entries`` and writes to ``scratch``.

    DeepJIT takes a writable root and read-only ones behind it. Legacy has one root, where it also writes: there the
    links are in the root itself. (Through a link to the whole cache, a miss could write into it.)
    """
    root = scratch / "root"
    root.mkdir()
    view = root if installation.generation == "legacy" else scratch / "view"
    (view / CACHE).mkdir(parents=True)
    for entry in entries:
        (view / CACHE / entry).symlink_to(folder.cache / entry, target_is_directory=True)
    return list(dict.fromkeys([root, view]))


def frozen_compiler(compiler_text: str, work: Path) -> Compiler:
    """A frozen nvcc, which refuses to compile, and no other nvcc within reach.

    It is made anew: nothing in the folder is run. `RestoredFolder.damage` compares the folder's own with what it should
    be.
    """
    home = work / "no-cuda"
    home.mkdir()
    return Compiler(
        frozen.write(work / frozen.FOLDER, compiler_text, "", ""),
        home,
        {
            POLICY_VARIABLE: "refuse",
            LOG_VARIABLE: str(work / "misses.jsonl"),
            "PATH": _path_without_nvcc(os.environ.get("PATH", os.defpath)),
            "VIRTUAL_GPU_CHECK_CUBINS": "1",
        },
    )


def _path_without_nvcc(path: str) -> str:
    """``path`` without the folders that hold an nvcc.

    A folder that also holds ``cat``, which the frozen nvcc needs, stays: DeepGEMM looks for nvcc on PATH only where
    CUDA_HOME is not set (``find_cuda_toolkit`` in ``deep_jit/backend/cuda/backend.hpp``), and here it is set.
    """
    return os.pathsep.join(
        folder
        for folder in path.split(os.pathsep)
        if shutil.which("cat", path=folder) or not shutil.which("nvcc", path=folder)
    )


def _missing(launches: Launches, serving: Serving, damaged: frozenset[str]) -> tuple[MissingKernel, ...]:
    generation = serving.installation.generation
    missing = [
        MissingKernel(
            entry=entry,
            name=entry_files.kernel_name(generation, entry) or entry,
            damaged=entry in damaged,
            selected_by=selected_by,
        )
        for entry, selected_by in launches.items()
        if entry not in serving.folder.entries - damaged
    ]
    return tuple(sorted(missing, key=lambda kernel: (kernel.name, kernel.selected_by[0].op, kernel.entry)))


def _missing_sources(serving: Serving, damaged: frozenset[str]) -> tuple[MissingKernel, ...]:
    """Kernels that the manifest gives as text and no artifact in the folder has. No op launches them."""
    folder = serving.folder
    entry_of_source = {
        file.sha256: entry.name
        for artifact in folder.artifacts
        for entry in artifact.index.entries
        for file in entry.files
        if file.name == entry_files.SOURCE
    }
    missing = []
    for number, item in enumerate(serving.manifest.sources):
        entry = entry_of_source.get(hashlib.sha256(item.source.encode()).hexdigest())
        if entry is None or entry in damaged or entry not in folder.entries:
            missing.append(
                MissingKernel(
                    entry=entry or f"sources[{number}]",
                    name=item.kernel or kernel_template(item.source) or "a kernel",
                    damaged=entry in damaged,
                    selected_by=(),
                )
            )
    return tuple(missing)


def _explained(refusal: Refusal, missing: Sequence[MissingKernel]) -> bool:
    """Whether the refused call launches a missing kernel."""
    return any(
        (selection.op, selection.sm_count) == (refusal.op, refusal.sm_count)
        and any(r.first <= refusal.value <= r.last for r in selection.ranges)
        for kernel in missing
        for selection in kernel.selected_by
    )
