"""What a GPU showed of an artifact: the file that ``verify --device cuda`` writes beside it (`REPORT_SUFFIX`)."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from cachebuilder.artifact.index import REPORT_SUFFIX


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True)


class Identity(_Frozen):
    """What was verified: an artifact by its bytes, or a restored folder by its name."""

    name: str | None = None
    sha256: str | None = None
    fingerprint_digest: str | None = None
    folder: str | None = None


class Device(_Frozen):
    """The GPU; of a cache that could not be served from only the driver is known."""

    name: str | None = None
    capability: str | None = None
    sm_count: int | None = None
    l2_bytes: int | None = None
    shared_memory_bytes: int | None = None
    memory_bytes: int | None = None
    driver: str | None = None


class Trial(_Frozen):
    """The kernels of one point of an op, run on random data.

    Attributes:
        variable, value: the point, as ``m`` and 128.
        kernels: the entries it launches.
        relative_error: ‖D − reference‖ / ‖reference‖, the reference in float32; None for an op without one.
        worst_row_error: the largest of the same over single rows.
        microseconds: of one call, the median.
        reference_microseconds: of the same product by torch in BF16; None for an op that torch has no call for, and in
            reports of before it was measured.
    """

    op: str
    shape: str
    sm_count: int
    variable: str
    value: int
    kernels: tuple[str, ...]
    relative_error: float | None
    worst_row_error: float | None
    microseconds: float
    reference_microseconds: float | None = None
    problems: tuple[str, ...]


class Refusal(_Frozen):
    """A call that failed: the op by its place in the manifest, the point, and DeepGEMM's words."""

    op: int
    sm_count: int
    value: int
    text: str


class Replay(_Frozen):
    """One manifest: every call made from the cache, then every kernel tried."""

    manifest: str
    calls: int
    missed: tuple[str, ...]
    refusals: tuple[Refusal, ...]
    trials: tuple[Trial, ...]


class Verified(_Frozen):
    """The whole report; ``right``: every call was served from the cache and every result is right."""

    schema_version: int = 1
    artifact: Identity
    right: bool
    device: Device
    torch: str | None
    deep_gemm: str
    cachebuilder: str
    replays: tuple[Replay, ...]


def path_for(artifact: Path) -> Path:
    """Where the report on an artifact lies: beside it."""
    return artifact.with_name(artifact.name + REPORT_SUFFIX)


def read(path: Path, sha256: str) -> Verified | None:
    """The report at ``path``; None where there is none, it cannot be read, or it is of other bytes."""
    try:
        found = Verified.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return None
    return found if found.artifact.sha256 == sha256 else None
