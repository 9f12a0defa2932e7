"""Prove that a restored cache is complete: replay a manifest against it with the frozen compiler, on a virtual GPU.

The first pass is serving as it will be: the frozen nvcc refuses every request, and the virtual GPU loads only real
cubins. If anything was refused there, a second pass with the recording compiler finds out all that is missing. Both
read the cache through a folder of links, so nothing is ever written to it, whoever runs this.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cachebuilder.artifact.index import CACHE
from cachebuilder.common.cache import scratch_folder
from cachebuilder.deepgemm import entries as entry_files
from cachebuilder.deepgemm.installation import Installation
from cachebuilder.deepgemm.source import kernel_template
from cachebuilder.manifest import schema as manifests
from cachebuilder.ops.catalog import OpBase
from cachebuilder.planning.requests import selections
from cachebuilder.planning.selection import Selection
from cachebuilder.restoring import compatibility
from cachebuilder.restoring.folder import Damage, RestoredFolder, open_folder
from cachebuilder.restoring.frozen import LOG_VARIABLE, POLICY_VARIABLE, frozen_nvcc
from cachebuilder.sweep import run as sweep

#: Called with the name of a manifest, calls done and calls in all (0: not known yet).
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Missing:
    """One kernel that serving would compile.

    Attributes:
        entry: its folder in the cache; ``sources[i]`` of the manifest where that is not known.
        selected_by: every op, SM count and range of points that launches it; none for one of the manifest's sources.
        damaged: the cache has it, but not with the bytes that its index lists.
    """

    entry: str
    name: str
    selected_by: tuple[Selection, ...]
    damaged: bool


@dataclass(frozen=True)
class Replay:
    """One manifest, replayed.

    Attributes:
        calls: how many times DeepGEMM was called.
        hits: entries launched and found whole.
        unlisted: those of `hits` that are in no index, so that nothing is known of their bytes.
        missing: kernels that are not there, by name.
        refusals: calls that failed for another reason than a missing kernel.
        selected_by: each launched entry's points.
        differences: how the artifact's fingerprint, or that of the nearest artifact, differs from what is here.
    """

    manifest: str
    ops: tuple[OpBase, ...]
    calls: int
    hits: tuple[str, ...]
    unlisted: tuple[str, ...]
    missing: tuple[Missing, ...]
    refusals: tuple[sweep.Refusal, ...]
    selected_by: Mapping[str, tuple[Selection, ...]]
    differences: tuple[compatibility.Difference, ...]


@dataclass(frozen=True)
class Report:
    """Everything `check` found."""

    installation: Installation
    entries: int
    damage: tuple[Damage, ...]
    replays: tuple[Replay, ...]

    @property
    def complete(self) -> bool:
        """Whether serving compiles nothing: no miss, no refused call, no damage."""
        return not self.damage and not any(replay.missing or replay.refusals for replay in self.replays)


def check(
    folder: RestoredFolder,
    installation: Installation,
    manifest: Path | None = None,
    progress: Progress = lambda name, done, total: None,
) -> Report:
    """Check ``folder``, from `opened`, for serving with ``installation``.

    Args:
        manifest: the shapes to replay; left out, those that each artifact was built for.

    Raises:
        ArtifactError: the folder's own files are damaged.
        ManifestError: of ``manifest``.
        InstallationError, PlanError: as `sweep.call`, but for a refused call, which is part of the report.
    """
    with scratch_folder() as scratch:
        wanted = manifests_for(folder, manifest)
        return _check(folder, installation, wanted, manifest is not None, scratch, progress)


@contextmanager
def opened(target: Path, installation: Installation) -> Iterator[RestoredFolder]:
    """The restored folder ``target``; an artifact is restored aside, for as long as this lasts.

    Raises:
        ArtifactError: it is neither.
    """
    if not target.is_file():
        yield open_folder(target)
        return
    # Only an artifact needs it: checking a folder must work where nothing is to be restored.
    from cachebuilder.restoring.entries import restore

    with scratch_folder() as scratch:
        restore([target], scratch / "restored", installation, None, force=True)
        yield open_folder(scratch / "restored")


def manifests_for(folder: RestoredFolder, given: Path | None) -> list[manifests.Manifest]:
    """What to replay: the manifest ``given``, else those that each artifact in ``folder`` was built from.

    Raises:
        ManifestError: of ``given``.
    """
    if given:
        return [manifests.load(given)[0]]
    return [manifests.parse(item.manifest, item.stem) for item in folder.artifacts]


def _check(
    folder: RestoredFolder,
    installation: Installation,
    wanted: Sequence[manifests.Manifest],
    given: bool,
    scratch: Path,
    progress: Progress,
) -> Report:
    damage = folder.damage()
    compiler_text = folder.compiler_text()
    replays = []
    for index, manifest in enumerate(wanted):
        # Of several artifacts, the one nearest to what is here is the one whose differences say something.
        differences = min(
            (
                compatibility.with_environment(
                    artifact.index,
                    installation,
                    None,
                    manifest.environment,
                    compiler=compiler_text,
                    sm_counts=manifest.all_sm_counts,
                )
                for artifact in (folder.artifacts if given else [folder.artifacts[index]])
            ),
            key=len,
        )
        work = scratch / f"replay-{index}"
        work.mkdir()
        replays.append(_replay(manifest, folder, installation, compiler_text, damage, differences, work, progress))
    return Report(installation, len(folder.listed), tuple(damage), tuple(replays))


def _replay(
    manifest: manifests.Manifest,
    folder: RestoredFolder,
    installation: Installation,
    compiler_text: str,
    damage: Sequence[Damage],
    differences: Sequence[compatibility.Difference],
    work: Path,
    progress: Progress,
) -> Replay:
    def replay(
        name: str, compiler: sweep.Compiler, entries: frozenset[str], ops: Sequence[OpBase], self_check: bool
    ) -> sweep.Answer:
        (scratch := work / name).mkdir()
        return sweep.call(
            ops,
            manifest.target.gpu,
            manifest.target.all_sm_counts,
            installation,
            compiler,
            linked_roots(folder, entries, installation, scratch),
            scratch,
            manifest.environment,
            lambda done, total: progress(manifest.name, done, total),
            go_on=True,
            self_check=self_check,
        )

    recorder = sweep.recording_compiler(work, compiler_text)
    replay("self-check", recorder, frozenset(), [], self_check=True)
    frozen = frozen_compiler(folder, work)
    first = replay("frozen", frozen, folder.entries, manifest.ops, self_check=False)
    asked = Path(frozen.environment[LOG_VARIABLE])
    damaged = frozenset(item.entry for item in damage) & folder.entries
    missed = first.refusals or asked.exists() or first.launched & damaged or first.launched - folder.entries
    answer = first
    refusals: tuple[sweep.Refusal, ...] = ()
    missing: tuple[Missing, ...] = ()
    if missed:
        answer = replay("recording", recorder, folder.entries - damaged, manifest.ops, self_check=False)
        missing = _missing(answer, folder, installation, damaged)
        unexplained = [refusal for refusal in first.refusals if not _explained(refusal, missing)]
        refusals = tuple(dict.fromkeys([*answer.refusals, *unexplained]))
    missing += _missing_sources(manifest, folder, damaged)
    hits = sorted(answer.launched - {kernel.entry for kernel in missing})
    return Replay(
        manifest=manifest.name,
        ops=tuple(manifest.ops),
        calls=answer.calls,
        hits=tuple(hits),
        unlisted=tuple(entry for entry in hits if entry not in folder.listed),
        missing=missing,
        refusals=refusals,
        selected_by=selections(answer.sweeps),
        differences=tuple(differences),
    )


def linked_roots(
    folder: RestoredFolder, entries: frozenset[str], installation: Installation, scratch: Path
) -> list[Path]:
    """Cache roots through which DeepGEMM reads ``entries`` and writes to ``scratch``.

    DeepJIT takes a writable root and read-only ones behind it. Legacy has one root, where it also writes: there the
    links are in the root itself. (A link to the whole cache would let a miss write into it.)
    """
    root = scratch / "root"
    root.mkdir()
    view = root if installation.generation == "legacy" else scratch / "view"
    (view / CACHE).mkdir(parents=True)
    for entry in entries:
        (view / CACHE / entry).symlink_to(folder.cache / entry, target_is_directory=True)
    return list(dict.fromkeys([root, view]))


def frozen_compiler(folder: RestoredFolder, work: Path) -> sweep.Compiler:
    """The folder's own nvcc, refusing, with no other one in reach."""
    home = work / "no-cuda"
    home.mkdir()
    return sweep.Compiler(
        frozen_nvcc(folder.path),
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

    One that also holds ``cat``, which the frozen nvcc needs, stays: DeepGEMM looks for nvcc on PATH only where
    CUDA_HOME is not set (``find_cuda_toolkit`` in ``deep_jit/backend/cuda/backend.hpp``), and here it is.
    """
    return os.pathsep.join(
        folder
        for folder in path.split(os.pathsep)
        if shutil.which("cat", path=folder) or not shutil.which("nvcc", path=folder)
    )


def _missing(
    answer: sweep.Answer, folder: RestoredFolder, installation: Installation, damaged: frozenset[str]
) -> tuple[Missing, ...]:
    there = folder.entries - damaged
    found = [
        Missing(entry, entry_files.kernel_name(installation.generation, entry) or entry, where, entry in damaged)
        for entry, where in selections(answer.sweeps).items()
        if entry not in there
    ]
    return tuple(sorted(found, key=lambda kernel: (kernel.name, kernel.selected_by[0].op, kernel.entry)))


def _missing_sources(
    manifest: manifests.Manifest, folder: RestoredFolder, damaged: frozenset[str]
) -> tuple[Missing, ...]:
    """Kernels that the manifest gives as text, and no artifact in ``folder`` has; no op calls them."""
    there: dict[str, str] = {
        file.sha256: entry.name
        for artifact in folder.artifacts
        for entry in artifact.index.entries
        for file in entry.files
        if file.name == entry_files.SOURCE
    }
    found = []
    for number, given in enumerate(manifest.sources):
        entry = there.get(hashlib.sha256(given.source.encode()).hexdigest())
        if entry is None or entry in damaged or entry not in folder.entries:
            name = given.kernel or kernel_template(given.source) or "a kernel"
            found.append(Missing(entry or f"sources[{number}]", name, (), entry in damaged))
    return tuple(found)


def _explained(refusal: sweep.Refusal, missing: Sequence[Missing]) -> bool:
    """Whether a kernel that is missing is launched at the refused call."""
    return any(
        (selection.op, selection.sm_count) == (refusal.op, refusal.sm_count)
        and any(r.first <= refusal.value <= r.last for r in selection.ranges)
        for kernel in missing
        for selection in kernel.selected_by
    )
