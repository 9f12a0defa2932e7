"""The record of a build, beside the artifact: when which compiler ran on what. Binds nothing; the report draws it.

It lies outside of the artifact, whose bytes say nothing of the machine and the hour.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from cachebuilder.common.files import write_atomically
from cachebuilder.common.records import Record
from cachebuilder.errors import ArtifactError

#: It lies beside the artifact, under its name and this.
RECORD_SUFFIX = ".build.json"


Step = Literal["headers", "ptx", "cubin", "check"]


class Phase(Record):
    """One step inside a compiler, as nvcc's ``--time`` names it."""

    name: str
    seconds: float


class CompilerCall(Record):
    """One call of a compiler: what it was for, in which of the parallel jobs, and when.

    Attributes:
        step: ``headers``: a front end reads them, for all that follow; ``ptx``: sources to PTX, many kernels at once;
            ``cubin``: one kernel's PTX to its cubin; ``check``: one kernel in an nvcc call of its own, to compare.
        job: from 0; as many as compilers were run at once.
        start: seconds since compiling began.
        phases: in their order; none where nvcc does not tell.
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
        artifact: sha256 of its bytes: a record of another artifact tells nothing about this one.
        finished: UTC, ISO 8601.
        jobs: compilers at once.
        compiled, reused: kernels compiled now, and taken from the store.
        cpu_seconds: of all compilers together.
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


def path_for(artifact: Path) -> Path:
    """Where the record of an artifact lies: beside it."""
    return artifact.with_name(artifact.name + RECORD_SUFFIX)


def write(artifact: Path, record: BuildRecord) -> None:
    """Write the record beside ``artifact``. Raises `ArtifactError` where it cannot be."""
    path = path_for(artifact)
    write_atomically(path, record.model_dump_json(indent=1).encode() + b"\n", ArtifactError)


def read(artifact: Path, sha256: str) -> BuildRecord | None:
    """The record beside ``artifact``; None where there is none, it cannot be read, or it is of other bytes."""
    try:
        record = BuildRecord.model_validate_json(path_for(artifact).read_bytes())
    except (OSError, ValidationError):
        return None
    return record if record.artifact == sha256 else None
