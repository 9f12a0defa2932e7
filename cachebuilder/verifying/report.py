"""What `verify` finds, as ``verify --json`` prints it and as ``verify --device cuda`` writes it beside an artifact."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, PlainSerializer, ValidationError, WithJsonSchema

from cachebuilder.artifact.index import MAX_REPORT_BYTES, REPORT_SUFFIX
from cachebuilder.common.folders import read_regular
from cachebuilder.common.records import Record
from cachebuilder.errors import ArtifactError, DeviceError, VerifyError
from cachebuilder.ops.catalog import OpBase
from cachebuilder.planning.selection import Selection
from cachebuilder.restoring.compatibility import Difference
from cachebuilder.restoring.damage import Damage
from cachebuilder.sweep.protocol import Device, Refusal, TrialResult


def _fields(op: OpBase) -> dict[str, Any]:
    return op.model_dump(mode="json", exclude_none=True)


#: An op; in JSON its fields, without those that are none.
ShownOp = Annotated[OpBase, PlainSerializer(_fields), WithJsonSchema({"type": "object", "additionalProperties": True})]


class _Document(Record):
    """A whole JSON document: NaN is the text "NaN", and every field that was set is printed, even where it is none."""

    model_config = ConfigDict(ser_json_inf_nan="strings")

    def to_json(self) -> str:
        """The document as indented JSON."""
        return self.model_dump_json(indent=1, exclude_unset=True)


class Identity(Record):
    """What was verified: an artifact by its bytes, or a restored folder by its name."""

    name: str | None = None
    sha256: str | None = None
    fingerprint_digest: str | None = None
    folder: str | None = None


class KernelCall(Record):
    """One call of an op.

    Attributes:
        variable, value: the point, as ``m`` and 128.
        kernels: the entries that the call launches.
    """

    op: str
    shape: str
    sm_count: int
    variable: str
    value: int
    kernels: tuple[str, ...]

    @property
    def place(self) -> str:
        """The call, for a person."""
        return f"{self.op} {self.shape} at {self.variable} {self.value}"


class Trial(TrialResult, KernelCall):  # in this order, the fields of the call come first
    """One call on random inputs. Errors are relative to a reference in float32."""


class GpuReplay(Record):
    """One manifest on the real GPU: every call made from the cache with the compiler that refuses, then the trials.

    Attributes:
        calls: how many times DeepGEMM was called.
        missed: kernels that the compiler was asked for, by name.
        refusals: calls that failed.
        trials: every kernel's results on random inputs; empty where a call was not served.
    """

    manifest: str
    calls: int
    missed: tuple[str, ...]
    refusals: tuple[Refusal, ...]
    trials: tuple[Trial, ...]

    @property
    def wrong(self) -> list[Trial]:
        """Trials with a problem."""
        return [trial for trial in self.trials if trial.problems]

    @property
    def worst(self) -> Trial | None:
        """The trial with the largest relative error; None where nothing was compared."""
        compared = [trial for trial in self.trials if trial.relative_error is not None]
        return max(compared, key=lambda trial: trial.relative_error or 0, default=None)

    @property
    def right(self) -> bool:
        """Whether every call was served from the cache and every result is right."""
        return not (self.missed or self.refusals or self.wrong)

    def require_right(self, target: str, ops: Sequence[OpBase]) -> None:
        """Raise `DeviceError` for the first thing that is not right.

        Args:
            target: what was served from.
            ops: the manifest's.
        """
        if self.missed:
            raise DeviceError(
                f"{target}: the GPU missed {len(self.missed)} kernels that the virtual GPU did not miss: "
                + ", ".join(self.missed[:3])
            )
        for refusal in self.refusals:
            op = ops[refusal.op]
            raise DeviceError(f"{op.op} {op.shape()} at {op.variable} {refusal.value} failed: {refusal.text}")
        for trial in self.wrong:
            raise DeviceError(
                f"{trial.place}: {trial.problems[0]} ({', '.join(trial.kernels)})",
                hint="do not serve from this artifact; build with --separate, verify again, and report the kernel",
            )


class GpuReport(_Document):
    """What a real GPU showed of an artifact: the file beside it.

    Attributes:
        right: every call was served from the cache, and every result is right.
        torch, deep_gemm, cachebuilder: versions.
    """

    schema_version: Literal[1] = 1
    artifact: Identity
    right: bool
    device: Device
    torch: str | None
    deep_gemm: str
    cachebuilder: str
    replays: tuple[GpuReplay, ...]


class DeepGemmCopy(Record):
    """A DeepGEMM: its folder and its own version."""

    path: str
    version: str


class MissingKernel(Record):
    """A kernel that serving would compile.

    Attributes:
        entry: its folder in the cache; ``sources[i]`` for a source of the manifest whose entry is not known.
        damaged: the cache has the entry, but not with the bytes that its index lists.
        selected_by: every op, SM count and range of points that launches it; empty for a source of the manifest.
    """

    entry: str
    name: str
    damaged: bool
    selected_by: tuple[Selection, ...]


class FlashInferReplay(Record):
    """What a manifest needs of FlashInfer, replayed on the virtual GPU by FlashInfer itself.

    Attributes:
        calls: how many times FlashInfer's GEMM was called with the compiler that refuses.
        hits: entries of the GEMM that are whole; with ``calls``, each was launched where it is planned.
        missing: kernels that the GEMM would compile, and modules that FlashInfer would build.
        modules: modules that FlashInfer loaded.
        problems: what else is wrong, a sentence each.
    """

    calls: int
    hits: tuple[str, ...]
    missing: tuple[str, ...]
    modules: tuple[str, ...]
    problems: tuple[str, ...]


class Replay(Record):
    """One manifest, replayed on the virtual GPU.

    Attributes:
        calls: how many times DeepGEMM was called.
        hits: entries that were launched and are whole.
        unlisted: those of ``hits`` that no artifact's index lists, so that their bytes could not be compared.
        missing: kernels that serving would compile, sorted by name.
        refusals: calls that failed for another reason than a missing kernel.
        differences: how the artifact's fingerprint differs from what is here; of several artifacts, the nearest one's.
    """

    manifest: str
    ops: tuple[ShownOp, ...]
    calls: int
    hits: tuple[str, ...]
    unlisted: tuple[str, ...]
    missing: tuple[MissingKernel, ...]
    refusals: tuple[Refusal, ...]
    differences: tuple[Difference, ...]
    flashinfer: FlashInferReplay | None = None

    @property
    def complete(self) -> bool:
        """Whether serving would compile nothing."""
        for_flashinfer = self.flashinfer is None or not (self.flashinfer.missing or self.flashinfer.problems)
        return for_flashinfer and not (self.missing or self.refusals)


class Report(_Document):
    """Everything that `verify` found.

    Attributes:
        complete: serving would compile nothing: no missing kernel, no refused call, no damaged file.
        target: the artifact or the folder.
        entries: how many entries the artifacts list, FlashInfer's kernels and modules among them.
        uncovered: what the engine here would compile all the same, in a sentence each.
        on_gpu: what the real GPU showed; None where it was not asked, or the cache is not complete.
    """

    complete: bool
    target: str
    deep_gemm: DeepGemmCopy
    entries: int
    damage: tuple[Damage, ...]
    replays: tuple[Replay, ...]
    uncovered: tuple[str, ...]
    on_gpu: GpuReport | None

    def write_gpu_report(self, path: Path | None = None) -> None:
        """Write what the real GPU showed; without ``path`` beside the artifact, and for a folder nowhere.

        Raises:
            ArtifactError: the file cannot be written.
        """
        target = Path(self.target)
        if self.on_gpu and (path or not target.is_dir()):
            self.on_gpu.write(path or path_for(target), ArtifactError)

    @property
    def _for_flashinfer(self) -> list[FlashInferReplay]:
        return [replay.flashinfer for replay in self.replays if replay.flashinfer]

    def problem(self) -> str | None:
        """Why the cache is not complete, in one sentence; None where it is."""
        counts = {
            "missing kernels": sum(len(replay.missing) for replay in self.replays),
            "refused calls": sum(len(replay.refusals) for replay in self.replays),
            "missing for FlashInfer": sum(len(part.missing) for part in self._for_flashinfer),
            "problems of FlashInfer": sum(len(part.problems) for part in self._for_flashinfer),
            "damaged files": len(self.damage),
        }
        problems = [f"{name}: {count}" for name, count in counts.items() if count]
        return f"{self.target}: wanted a complete cache, found {', '.join(problems)}" if problems else None

    def hint(self) -> str | None:
        """What to do about the most likely cause of the problem; None where there is none."""
        if self.complete:
            return None
        if self.damage:
            return "remove what is damaged and restore the artifact again"
        incomplete = [replay for replay in self.replays if replay.missing]
        if not incomplete and any(part.missing for part in self._for_flashinfer):
            return "build an artifact from this manifest with the FlashInfer that serves"
        if not incomplete and self._for_flashinfer and not any(replay.refusals for replay in self.replays):
            return "serve with the FlashInfer that the artifact was built with; if it is that one, report it"
        if not incomplete:
            return "see the refused calls; a manifest that builds with this DeepGEMM has none"
        for difference in (item for replay in incomplete for item in replay.differences):
            if difference.field != "deep_gemm":
                return f"{difference.field} differs: {difference.remedy}"
        if not any(replay.hits for replay in incomplete):
            return "build an artifact from this manifest with the DeepGEMM that serves"
        return "the folder lost entries or never had these shapes: restore again, or build with this manifest"

    def require_right(self) -> None:
        """Raise for the first thing that is wrong.

        Raises:
            VerifyError: the cache is not complete.
            DeviceError: on the real GPU, a kernel was missed, a call failed or a result is wrong.
        """
        if problem := self.problem():
            raise VerifyError(problem, hint=self.hint())
        for replay, virtual in zip(self.on_gpu.replays if self.on_gpu else (), self.replays, strict=False):
            replay.require_right(self.target, virtual.ops)


def path_for(artifact: Path) -> Path:
    """Where the report on an artifact lies: beside it."""
    return artifact.with_name(artifact.name + REPORT_SUFFIX)


def read(path: Path, sha256: str) -> GpuReport | None:
    """The report at ``path``; None where there is none, it cannot be read, or it is about other bytes."""
    try:
        report = GpuReport.model_validate_json(read_regular(path, MAX_REPORT_BYTES))
    except (OSError, ValidationError):
        return None
    return report if report.artifact.sha256 == sha256 else None
