"""What a sweep finds, as data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cachebuilder.deepgemm.generation import Generation


@dataclass(frozen=True)
class Entry:
    """One kernel as DeepGEMM asked for it.

    Attributes:
        name: the entry's folder in the cache, which is the kernel's key.
        source: ``kernel.cu``.
        arguments: nvcc's command line after the compiler's own name, joined by spaces, as DeepGEMM wrote it.
        metadata: ``meta.json``, in the generation that has one.
    """

    name: str
    source: str
    arguments: str
    metadata: str | None


@dataclass(frozen=True)
class Run:
    """Consecutive points of a sweep that launched the same kernels, in the same order."""

    first: int
    last: int
    step: int
    entries: tuple[str, ...]


@dataclass(frozen=True)
class Sweep:
    """One op at one SM count: which kernels each value of its variable launches."""

    op: int
    sm_count: int
    runs: tuple[Run, ...]


@dataclass(frozen=True)
class Refusal:
    """DeepGEMM raised at this point: in a sweep that goes on after a refusal, the op ended there."""

    op: int
    sm_count: int
    value: int
    text: str


@dataclass(frozen=True)
class Answer:
    """What the child saw.

    Attributes:
        checked: entries that the check of tensors launched, which comes before all ops.
        device: the real GPU's properties, None on a virtual one.
    """

    sweeps: tuple[Sweep, ...]
    refusals: tuple[Refusal, ...]
    checked: tuple[str, ...]
    calls: int
    torch: str
    python: str
    peak_bytes: int
    device: dict[str, Any] | None

    @property
    def launched(self) -> set[str]:
        """Names of all entries that were launched."""
        return {entry for swept in self.sweeps for run in swept.runs for entry in run.entries}


@dataclass(frozen=True)
class Point:
    """One call: the op's position, the SM count, the value of the op's variable."""

    op: int
    sm_count: int
    value: int


@dataclass(frozen=True)
class TrialResult:
    """One call on random inputs.

    Attributes:
        relative_error: ‖D − reference‖ / ‖reference‖, Frobenius; NaN where an element is; None where the op has no
            reference, and the kernel was only launched.
        worst_row_error: the largest of single rows.
        microseconds: of one call with inputs in place, the median of several.
        reference_microseconds: the same of torch's own product in BF16; None where torch has no such call.
        problems: what is wrong, a sentence each; none where all is right.
    """

    point: Point
    relative_error: float | None
    worst_row_error: float | None
    microseconds: float
    reference_microseconds: float | None
    problems: tuple[str, ...]


@dataclass(frozen=True)
class Trials:
    """All calls on one GPU; ``device`` holds its name, driver and properties."""

    device: dict[str, Any]
    torch: str
    results: tuple[TrialResult, ...]


@dataclass(frozen=True)
class Result:
    """All that a sweep found.

    Attributes:
        entries: those that the ops launch.
        checked: those of the check that comes before all ops; some may be among the others.
    """

    generation: Generation
    entries: dict[str, Entry]
    checked: dict[str, Entry]
    sweeps: tuple[Sweep, ...]
    calls: int
    torch: str
    python: str
    peak_bytes: int
    cache_root: str
