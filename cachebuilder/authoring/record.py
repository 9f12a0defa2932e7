"""Records a program into a manifest: a new one, or one that gets the kernels that its ops do not ask for.

A recording may take an hour of somebody's GPU, so whatever could go wrong afterwards is checked before it starts; if
writing fails nevertheless, the recording is kept.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cachebuilder.authoring import recording as recordings
from cachebuilder.authoring import sources
from cachebuilder.authoring.recording import RecordedKernel, Recording
from cachebuilder.common.cache import own_folder
from cachebuilder.common.locks import lock
from cachebuilder.common.progress import Progress, no_progress
from cachebuilder.common.version import __version__
from cachebuilder.cuda import gpus, nvml
from cachebuilder.cuda.gpus import Gpu
from cachebuilder.cuda.toolchain import Toolchain
from cachebuilder.deepgemm import installation
from cachebuilder.deepgemm.environment import kernel_variables
from cachebuilder.deepgemm.generation import Generation
from cachebuilder.deepgemm.source import read_shape
from cachebuilder.errors import CacheBuilderError, ManifestError, RecordingError
from cachebuilder.manifest import schema as manifests
from cachebuilder.manifest.inputs import Inputs
from cachebuilder.manifest.schema import Manifest
from cachebuilder.planning import make as planning
from cachebuilder.restoring import misses


@dataclass(frozen=True)
class NewManifest:
    """A manifest to write, as `new_manifest` checked it."""

    path: Path
    name: str
    gpu: Gpu


@dataclass(frozen=True)
class KnownManifest:
    """A manifest to add to, as `known_manifest` read it.

    Attributes:
        deep_gemm: the package to plan its ops with; None: the one that a build takes.
    """

    path: Path
    manifest: Manifest
    data: bytes
    deep_gemm: Path | None
    gpu: Gpu


@dataclass(frozen=True)
class Written:
    """What was written into a manifest.

    Attributes:
        sources: how many kernels were written.
        covered: how many were not, because the manifest's own ops ask for them.
        ops: lines for a manifest that ask for such kernels at every M, as far as the sources name them.
        remarks: what the user should know, a sentence each.
    """

    sources: int
    covered: int
    ops: tuple[str, ...]
    remarks: tuple[str, ...]


def new_manifest(path: Path, name: str, gpu: str | None) -> NewManifest:
    """A manifest to write to ``path``, for the GPU called ``gpu`` or, for None, the one of this machine.

    Raises `ManifestError` where ``path`` cannot be written or exists, `RecordingError` where no such GPU is known.
    """
    target = _find_gpu(gpu)
    if path.exists():
        raise ManifestError(f"{path}: exists already", hint=f"add to it with --add-to {path}, or name another file")
    check_writable(path)
    tree = {"name": name, "target": {"gpu": target.name}, "sources": [{"source": "x"}]}
    manifests.parse(json.dumps(tree).encode())
    return NewManifest(path, name, target)


def known_manifest(path: Path, deep_gemm: Path | None = None) -> KnownManifest:
    """The manifest at ``path``. Raises `ManifestError` where it cannot be read or written."""
    manifest, data = manifests.load(path)
    check_writable(path)
    return KnownManifest(path, manifest, data, deep_gemm, manifest.target.gpu)


@dataclass(frozen=True)
class Recorder:
    """Records one program into one manifest; ``folder`` holds the recording until the manifest is written."""

    manifest: NewManifest | KnownManifest
    toolchain: Toolchain
    environment: Mapping[str, str]
    folder: Path

    def run(self, command: Sequence[str]) -> Recording:
        """Run ``command``. Raises `RecordingError` where it fails to start, or asks for nothing or for another GPU."""
        recording = recordings.record(self.folder, command, self.toolchain, self.environment)
        recording.check_kernels()
        recording.check_target(self.manifest.gpu.name, self.manifest.gpu.major)
        return recording

    def write(self, recording: Recording, progress: Progress = no_progress) -> Written:
        """Write the recorded kernels into the manifest.

        Raises `RecordingError` where they are of another generation than the DeepGEMM that plans the manifest.
        """
        if isinstance(self.manifest, NewManifest):
            return self._create(self.manifest, recording)
        return self._add(self.manifest, recording, progress)

    def _create(self, new: NewManifest, recording: Recording) -> Written:
        generation = recording.check_kernels()
        fields: dict[str, object] = {"name": new.name, "target": {"gpu": new.gpu.name}}
        if variables := kernel_variables(generation, self.environment):
            fields["environment"] = variables
        comment = (
            f"What {recording.program} asked DeepGEMM for ({generation} cache), recorded by cachebuilder "
            f"{__version__}.\nA source is one kernel. Where a comment names an op, that op asks for all such kernels, "
            "for every M."
        )
        sources.create(new.path, fields, comment, _new_sources(recording.kernels, recording.program))
        return Written(len(recording.kernels), 0, _ops(recording.kernels), ())

    def _add(self, known: KnownManifest, recording: Recording, progress: Progress) -> Written:
        """Add what the manifest's own ops do not ask for; everything, where the manifest cannot be planned here."""
        generation = recording.check_kernels()
        remarks = []
        planned: frozenset[str] = frozenset()
        try:
            planned = self._planned_sources(known, generation, progress)
        except RecordingError:
            raise
        except CacheBuilderError as error:
            remarks.append(f"the manifest cannot be planned here, so every kernel is added: {error}")
        if (variables := kernel_variables(generation, self.environment)) != known.manifest.environment:
            remarks.append(f"the manifest's environment is {known.manifest.environment}, the program's was {variables}")
        kernels = [kernel for kernel in recording.kernels if kernel.source not in planned]
        return Written(
            sources=sources.add(known.path, _new_sources(kernels, recording.program)),
            covered=len(recording.kernels) - len(kernels),
            ops=_ops(recording.kernels),
            remarks=tuple(remarks),
        )

    def _planned_sources(self, known: KnownManifest, generation: Generation, progress: Progress) -> frozenset[str]:
        """The sources of all kernels that the manifest asks for."""
        copy = installation.find(known.deep_gemm)
        if copy.generation != generation:
            raise RecordingError(
                f"wanted kernels of the {copy.generation} generation, for {copy}, found {generation} ones",
                hint="name the DeepGEMM that the program uses with --deep-gemm",
            )
        plan = planning.make(Inputs(known.manifest, known.data, self.toolchain, copy), progress=progress)
        return frozenset(kernel.source for kernel in plan.kernels)


@contextmanager
def open_recorder(
    manifest: NewManifest | KnownManifest, nvcc: Path | None = None, environment: Mapping[str, str] = os.environ
) -> Iterator[Recorder]:
    """Check all that a recording of a program with this environment needs, and make its folder; remove it afterwards.

    After an error or Ctrl-C, a recording that holds kernels is kept; the error's hint says where.
    """
    recordings.check_environment(environment)
    toolchain = recordings.find_compiler(nvcc, environment)
    folder = Path(tempfile.mkdtemp(dir=own_folder("recordings")))
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        lock(handle)  # `cachebuilder cache clean` leaves a locked folder alone
        yield Recorder(manifest, toolchain, environment, folder)
    except CacheBuilderError as error:
        if recordings.has_entries(folder):
            error.hint = f"{f'{error.hint}; ' if error.hint else ''}what was recorded is kept in {folder}"
        else:
            shutil.rmtree(folder, ignore_errors=True)
        raise
    else:
        shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(handle)


def _find_gpu(name: str | None) -> Gpu:
    if name is None:
        card = nvml.first_gpu()
        if card is None:
            raise RecordingError("wanted --gpu, the GPU that the program runs on, since none is seen here")
        name = card.name
    try:
        return gpus.find(name)
    except ValueError as error:
        raise RecordingError(f"--gpu: {error}") from None


def check_writable(path: Path) -> None:
    """Raise `ManifestError` where a manifest could not be written to ``path``, before hours of work."""
    folder = path.absolute().parent
    if not os.access(folder, os.W_OK):
        reason = "you may not write to its folder" if folder.exists() else "its folder does not exist"
        raise ManifestError(f"{path}: cannot be written: {reason}")


def _new_sources(kernels: Sequence[RecordedKernel], program: str) -> list[sources.NewSource]:
    """For a manifest; the comment above each gives the op that asks for such kernels, where the source names one."""
    new = []
    for kernel in kernels:
        ops = _ops([kernel])
        op = f"; an op for it: {ops[0].removeprefix('- ')}" if ops else ""
        new.append(sources.NewSource(kernel.source, f"{kernel.name}, asked for by {program}{op}", kernel.name))
    return new


def _ops(kernels: Sequence[RecordedKernel]) -> tuple[str, ...]:
    shapes = [read_shape(kernel.source) for kernel in kernels]
    return tuple(dict.fromkeys(misses.advice(shape) for shape in shapes if shape and shape.op))
