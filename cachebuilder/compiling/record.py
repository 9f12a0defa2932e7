"""The record of a build, a file beside the artifact: which compiler ran when, and on what. The report draws it.

It is not part of the artifact, because the artifact's bytes must not depend on the machine and the time. Nothing else
reads it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from cachebuilder.common.folders import read_regular
from cachebuilder.common.packages import Material
from cachebuilder.common.records import Record
from cachebuilder.errors import ArtifactError

#: The record's file name is the artifact's with this suffix.
RECORD_SUFFIX = ".build.json"
#: 20,000 kernels make about 20 MB.
_MAX_BYTES = 256 << 20


Step = Literal["headers", "ptx", "cubin", "check"]


class Phase(Record):
    """One step inside a compiler, as nvcc's ``--time`` names it."""

    name: str
    seconds: float


class CompilerCall(Record):
    """One call of a compiler: what it was for, in which of the parallel jobs, and when.

    Attributes:
        step: ``headers``: a front end parses the headers for several kernels; ``ptx``: kernels' sources to PTX, many
            kernels at once; ``cubin``: one kernel's PTX to its cubin; ``check``: one kernel in an nvcc call of its own,
            to compare.
        job: 0 to one less than the number of compilers at once.
        start: seconds since compiling began.
        phases: in the order in which they ran; empty for calls that nvcc does not time.
    """

    step: Step
    job: int
    start: float
    seconds: float
    entries: tuple[str, ...]
    phases: tuple[Phase, ...] = ()


class BuildRecord(Record):
    """How one artifact was built.

    Attributes:
        artifact: sha256 of its bytes; the record is about no other artifact.
        finished: UTC, ISO 8601.
        jobs: how many compilers ran at once.
        compiled, reused: how many kernels were compiled now, and how many came from the store.
        cpu_seconds: of all compilers together.
        materials: the packages and compilers that the build used; the provenance lists them.
    """

    schema_version: Literal[1] = 1
    artifact: str
    cachebuilder: str
    finished: str
    jobs: int
    compiled: int
    reused: int
    plan_seconds: float
    compile_seconds: float
    pack_seconds: float
    cpu_seconds: float
    runs: tuple[CompilerCall, ...] = ()
    materials: tuple[Material, ...] = ()


def path_for(artifact: Path) -> Path:
    """The path of an artifact's record, beside it."""
    return artifact.with_name(artifact.name + RECORD_SUFFIX)


def write(artifact: Path, record: BuildRecord) -> None:
    """Write the record beside ``artifact``. Raises `ArtifactError` if it cannot be written."""
    record.write(path_for(artifact), ArtifactError)


def read(artifact: Path, sha256: str) -> BuildRecord | None:
    """The record beside ``artifact``; None if there is none, it cannot be read, or it is about other bytes."""
    try:
        record = BuildRecord.model_validate_json(read_regular(path_for(artifact), _MAX_BYTES))
    except (OSError, ValidationError):
        return None
    return record if record.artifact == sha256 else None
