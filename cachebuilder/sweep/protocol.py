"""What the sweep's parent and its child processes hand to each other.

The parent writes a job into a folder and starts a child on that folder. The child reads the job, keeps its `Position`
up to date, and leaves an answer or a `Failure`.
"""

from __future__ import annotations

import ctypes
import mmap
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, Self

from pydantic import BeforeValidator, ConfigDict, WithJsonSchema

from cachebuilder.common.cores import available_cores
from cachebuilder.common.records import Record
from cachebuilder.cuda.device import DeviceName
from cachebuilder.cuda.gpus import Gpu
from cachebuilder.ops.catalog import Op

if TYPE_CHECKING:  # the child imports this module, and needs neither
    from cachebuilder.deepgemm.installation import Installation
    from cachebuilder.manifest.schema import Manifest

#: The files in the folder that parent and child share.
JOB, POSITION, ANSWER, FAILURE = "job.json", "position", "answer.json", "failure.json"

#: What `Position.op` holds before the first op.
CHECKING, IMPORTING = -1, -2
#: What `Position.first_failed` holds before a failure.
NONE_FAILED = (1 << 63) - 1


class Position(ctypes.Structure):
    """Where the child is. Parent and child map the same file, so the parent knows the place even of an abort.

    Attributes:
        op: the op's place in the job, or `IMPORTING` or `CHECKING`.
        value: the value of the op's variable.
        done, total: calls.
        first_failed: the place of the first part, in the manifest's order, whose failure ends the job.
    """

    op: int
    value: int
    done: int
    total: int
    first_failed: int
    _fields_: ClassVar = [(name, ctypes.c_int64) for name in ("op", "value", "done", "total", "first_failed")]

    @classmethod
    def shared(cls, path: Path, count: int) -> list[Self]:
        """The positions in the file ``path``: that of the whole job, then those of its forks."""
        size = ctypes.sizeof(cls)
        with path.open("r+b") as file:
            memory = mmap.mmap(file.fileno(), count * size)
        return [cls.from_buffer(memory, number * size) for number in range(count)]


class Job(Record):
    """What every child is told.

    Attributes:
        device: where DeepGEMM runs.
        gpu: the GPU to show; a real one must have its properties.
        deep_gemm: DeepGEMM's folder, by the path that it is imported under.
        processes: how many processes call DeepGEMM at once, at most.
    """

    device: DeviceName
    gpu: Gpu
    deep_gemm: str
    ops: tuple[Op, ...]
    processes: int = 1

    @property
    def positions(self) -> int:
        """How many positions there are: that of the whole job, and if several processes do it, theirs."""
        return 1 if self.processes == 1 else 1 + self.processes


class SweepJob(Job):
    """Call DeepGEMM at every point of every op.

    Attributes:
        sm_counts: for ops that have none of their own.
        go_on: note a refused call and take the next op, instead of failing.
        self_check: first check that DeepGEMM reads tensors right, which asks for a kernel of its own.
    """

    sm_counts: tuple[int, ...]
    go_on: bool = False
    self_check: bool = True

    @classmethod
    def of(
        cls,
        manifest: Manifest,
        installation: Installation,
        device: DeviceName = "virtual",
        go_on: bool = False,
        self_check: bool = True,
    ) -> Self:
        """All ops of ``manifest``, called on its target: on a real GPU by one process, else by one for each core."""
        return cls(
            device=device,
            gpu=manifest.target.gpu,
            deep_gemm=str(installation.imported_as),
            ops=tuple(manifest.ops),
            sm_counts=tuple(manifest.target.all_sm_counts),
            go_on=go_on,
            self_check=self_check,
            processes=available_cores() if device == "virtual" else 1,
        )


class Point(Record):
    """One call: the op's place in the job, the SM count, the value of the op's variable."""

    op: int
    sm_count: int
    value: int


class TrialsJob(Job):
    """Call DeepGEMM on random inputs at ``points`` and compare the results with a reference."""

    points: tuple[Point, ...]


class Span(Record):
    """Consecutive points first, first + step, … last that launched the same kernels, in the same order."""

    first: int
    last: int
    step: int
    entries: tuple[str, ...]


class OpSweep(Record):
    """One op at one SM count: which kernels each value of its variable launches."""

    op: int
    sm_count: int
    spans: tuple[Span, ...]


class Refusal(Point):
    """A call that failed, and what DeepGEMM said. In a job that goes on, the op ended there."""

    text: str


class Device(Record):
    """A real GPU, as the CUDA runtime describes it; ``driver`` is the version that NVML reports."""

    name: str
    capability: str
    sm_count: int
    l2_bytes: int
    shared_memory_bytes: int
    memory_bytes: int
    driver: str | None = None


class Answer(Record):
    """What a sweep saw.

    Attributes:
        sweeps: on a real GPU, where launches cannot be seen, their spans name no entries.
        checked: entries that the self-check launched, before all ops.
        calls: how many times DeepGEMM was called.
        peak_bytes: the largest resident memory of the process that imported torch, and what each fork of it had for
            itself at its end.
        device: the real GPU; None on the virtual one.
    """

    sweeps: tuple[OpSweep, ...]
    refusals: tuple[Refusal, ...]
    checked: tuple[str, ...]
    calls: int
    torch: str
    python: str
    peak_bytes: int
    device: Device | None

    @property
    def launched(self) -> set[str]:
        """Names of all entries that the ops launched."""
        return {entry for sweep in self.sweeps for span in sweep.spans for entry in span.entries}


def _from_text(value: object) -> object:
    return float(value) if isinstance(value, str) and value in _NO_NUMBERS else value


#: What JSON has no number for, as text, so that every JSON parser reads what we write.
_NO_NUMBERS = ("NaN", "Infinity", "-Infinity")
#: A relative error, which is no number where an element is none.
ErrorSize = Annotated[
    float,
    BeforeValidator(_from_text),
    WithJsonSchema({"anyOf": [{"type": "number"}, {"enum": list(_NO_NUMBERS)}]}),
]


class TrialResult(Record):
    """One call on random inputs.

    Attributes:
        relative_error: ‖D − reference‖ / ‖reference‖ (Frobenius), the reference in float32; NaN where an element is
            NaN; None for an op without a reference, whose kernel was only launched.
        worst_row_error: the largest of the same over single rows.
        microseconds: of one call with inputs in place, the median of several.
        reference_microseconds: of the same product by torch in BF16; None where torch has no such call.
        problems: what is wrong, one sentence each; empty where the result is right.
    """

    model_config = ConfigDict(ser_json_inf_nan="strings")

    relative_error: ErrorSize | None
    worst_row_error: ErrorSize | None
    microseconds: float
    reference_microseconds: float | None = None
    problems: tuple[str, ...]


class TrialsAnswer(Record):
    """The results at the job's points, in their order, and the GPU that they are from."""

    model_config = ConfigDict(ser_json_inf_nan="strings")

    results: tuple[TrialResult, ...]
    device: Device
    torch: str


FailureKind = Literal["import", "misreads", "missing", "unanswered", "device", "memory", "refused", "died"]


class Failure(Record):
    """Why there is no answer.

    Attributes:
        kind: import: torch or DeepGEMM does not load. misreads: DeepGEMM misreads tensors. missing: DeepGEMM lacks an
            op. unanswered: the virtual GPU does not answer a CUDA call. device: no GPU, or another one. memory: the
            GPU's memory is too small. refused: DeepGEMM raised. died: the child ended without a word.
    """

    kind: FailureKind
    reason: str
