"""The truth on the target GPU: a restored cache served from, and every kernel's results against a reference.

`verify` proves on the virtual GPU that nothing is missing; here the same calls are made on the real one, with the same
compiler that refuses, and every kernel is then run on random data at points that select it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cachebuilder.artifact.read import read_index
from cachebuilder.common.cache import scratch_folder
from cachebuilder.common.files import write_atomically
from cachebuilder.common.version import __version__
from cachebuilder.cuda import nvml
from cachebuilder.deepgemm.installation import Installation
from cachebuilder.errors import ArtifactError, DeviceError
from cachebuilder.manifest.schema import Manifest
from cachebuilder.ops.catalog import OpBase
from cachebuilder.planning.selection import Selection
from cachebuilder.restoring import misses
from cachebuilder.restoring.folder import RestoredFolder
from cachebuilder.restoring.frozen import LOG_VARIABLE
from cachebuilder.sweep import run as sweep
from cachebuilder.verifying import virtual as verify
from cachebuilder.verifying.report import Verified


@dataclass(frozen=True)
class Replay:
    """One manifest on the GPU.

    Attributes:
        calls: how many times DeepGEMM was called, with the compiler that refuses.
        missed: kernels that were asked of the compiler, by name.
        refusals: calls that failed.
        trials: results on random data; None before they were run, or where serving failed.
        entries: the kernels that each point of the trials launches.
    """

    manifest: str
    ops: tuple[OpBase, ...]
    calls: int
    missed: tuple[str, ...]
    refusals: tuple[sweep.Refusal, ...]
    trials: sweep.Trials | None
    entries: Mapping[sweep.Point, tuple[str, ...]]

    @property
    def wrong(self) -> list[sweep.TrialResult]:
        """Trials with a problem."""
        return [result for result in self.trials.results if result.problems] if self.trials else []

    @property
    def worst(self) -> sweep.TrialResult | None:
        """The trial with the largest relative error; None where nothing was compared."""
        compared = (
            [result for result in self.trials.results if result.relative_error is not None] if self.trials else []
        )
        return max(compared, key=lambda result: result.relative_error or 0, default=None)

    @property
    def right(self) -> bool:
        """Whether every call was served from the cache and every result is right."""
        return self.trials is not None and not (self.missed or self.refusals or self.wrong)


def check(
    folder: RestoredFolder,
    installation: Installation,
    manifest: Path | None = None,
    progress: verify.Progress = lambda name, done, total: None,
) -> tuple[verify.Report, tuple[Replay, ...]]:
    """Check ``folder`` on the virtual GPU as `verify.check` does, and if it is complete, on the real one.

    Raises: what `verify.check` raises, and
        DeviceError: the GPU is not there, not the target, or too small.
    """
    report = verify.check(folder, installation, manifest, progress)
    if not report.complete:
        return report, ()
    replays = []
    with scratch_folder() as scratch:
        wanted = verify.manifests_for(folder, manifest)
        for number, (one, virtual) in enumerate(zip(wanted, report.replays, strict=True)):
            (work := scratch / str(number)).mkdir()
            replays.append(_replay(folder, one, virtual.selected_by, installation, work, progress))
    return report, tuple(replays)


def serve(
    folder: RestoredFolder,
    manifest: Manifest,
    installation: Installation,
    work: Path,
    progress: verify.Progress = lambda name, done, total: None,
) -> Replay:
    """Make every call of ``manifest`` on the real GPU from ``folder``; no trials yet.

    Raises: what `sweep.call` raises, but for refused calls, which are in the replay.
    """
    compiler = verify.frozen_compiler(folder, work)
    (scratch := work / "serve").mkdir()
    answer = sweep.call(
        manifest.ops,
        manifest.target.gpu,
        manifest.target.all_sm_counts,
        installation,
        compiler,
        verify.linked_roots(folder, folder.entries, installation, scratch),
        scratch,
        manifest.environment,
        lambda done, total: progress(f"{manifest.name} on the GPU", done, total),
        go_on=True,
        self_check=False,
        device="cuda",
    )
    log = Path(compiler.environment[LOG_VARIABLE])
    missed = tuple(miss.kernel for miss in misses.read(log).misses) if log.exists() else ()
    return Replay(manifest.name, tuple(manifest.ops), answer.calls, missed, answer.refusals, None, {})


def _replay(
    folder: RestoredFolder,
    manifest: Manifest,
    selected_by: Mapping[str, tuple[Selection, ...]],
    installation: Installation,
    work: Path,
    progress: verify.Progress,
) -> Replay:
    served = serve(folder, manifest, installation, work, progress)
    if served.missed or served.refusals:
        return served
    entries = points(selected_by)
    (scratch := work / "trials").mkdir()
    trials = sweep.try_on_gpu(
        list(entries),
        manifest.ops,
        manifest.target.gpu,
        installation,
        verify.frozen_compiler(folder, scratch),
        verify.linked_roots(folder, folder.entries, installation, scratch),
        scratch,
        manifest.environment,
        lambda done, total: progress(f"{manifest.name} against float32", done, total),
    )
    return replace(served, trials=trials, entries=entries)


def points(selected_by: Mapping[str, Sequence[Selection]]) -> dict[sweep.Point, tuple[str, ...]]:
    """Where to try the kernels: for each one, the ends of its first and last ranges, in every op that selects it.

    A range of M ends where DeepGEMM's heuristic turns to another kernel: the edges of tiles and waves.
    """
    found: dict[sweep.Point, list[str]] = {}
    for entry, selections in selected_by.items():
        for selection in selections:
            first, last = selection.ranges[0], selection.ranges[-1]
            for value in {first.first, first.last, last.first, last.last}:
                known = found.setdefault(sweep.Point(selection.op, selection.sm_count, value), [])
                if entry not in known:
                    known.append(entry)
    return {point: tuple(found[point]) for point in sorted(found, key=lambda p: (p.op, p.sm_count, p.value))}


def document(target: Path, report: verify.Report, replays: Sequence[Replay]) -> dict[str, Any]:
    """The report on an artifact or a restored folder as JSON's types: what was run, on what, with which result for
    every kernel.
    """
    trials = next((replay.trials for replay in replays if replay.trials), None)
    gpu = nvml.first_gpu()
    found = {
        "schema_version": 1,
        "artifact": _identity(target) if target.is_file() else {"folder": target.name},
        "right": bool(replays) and all(replay.right for replay in replays),
        "device": (trials.device if trials else {}) | {"driver": gpu.driver if gpu else None},
        "torch": trials.torch if trials else None,
        "deep_gemm": report.installation.version,
        "cachebuilder": __version__,
        "replays": [
            {
                "manifest": replay.manifest,
                "calls": replay.calls,
                "missed": list(replay.missed),
                "refusals": [vars(refusal) for refusal in replay.refusals],
                "trials": [
                    {
                        "op": replay.ops[result.point.op].op,
                        "shape": replay.ops[result.point.op].shape(),
                        "sm_count": result.point.sm_count,
                        "variable": replay.ops[result.point.op].variable,
                        "value": result.point.value,
                        "kernels": list(replay.entries[result.point]),
                        "relative_error": result.relative_error,
                        "worst_row_error": result.worst_row_error,
                        "microseconds": round(result.microseconds, 1),
                        "reference_microseconds": _rounded(result.reference_microseconds),
                        "problems": list(result.problems),
                    }
                    for result in (replay.trials.results if replay.trials else ())
                ],
            }
            for replay in replays
        ],
    }
    return Verified.model_validate(found).model_dump(exclude_unset=True)


def _rounded(microseconds: float | None) -> float | None:
    return None if microseconds is None else round(microseconds, 1)


def _identity(artifact: Path) -> dict[str, str]:
    index = read_index(artifact)
    with artifact.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return {"name": index.name, "sha256": sha256, "fingerprint_digest": index.fingerprint_digest}


def write(path: Path, found: Mapping[str, Any]) -> None:
    """Write a report. Raises `ArtifactError` where it cannot be."""
    write_atomically(path, json.dumps(found, indent=1).encode() + b"\n", ArtifactError)


def require_right(target: Path | str, replays: Sequence[Replay]) -> None:
    """Raises `DeviceError` for the first thing that was not right on the GPU."""
    for replay in replays:
        if replay.missed:
            raise DeviceError(
                f"{target}: {len(replay.missed)} kernels were missed on the GPU that the virtual GPU did not miss: "
                + ", ".join(replay.missed[:3])
            )
        for refusal in replay.refusals:
            op = replay.ops[refusal.op]
            raise DeviceError(f"{op.op} {op.shape()} at {op.variable} {refusal.value} failed: {refusal.text}")
        for result in replay.wrong:
            op = replay.ops[result.point.op]
            where = f"{op.op} {op.shape()} at {op.variable} {result.point.value}"
            raise DeviceError(
                f"{where}: {result.problems[0]} ({', '.join(replay.entries[result.point])})",
                hint="do not serve from this artifact; build with --separate, verify again, and report the kernel",
            )
