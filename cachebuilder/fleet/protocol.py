"""What a fleet's driver and its workers say to each other: a line of JSON for each job, and for each answer."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, TypeAdapter

from cachebuilder.common.records import Record
from cachebuilder.planning.plan import Kernel


class Tools(Record):
    """The paths that a fleet names for an engine; None for the environment's own."""

    nvcc: str | None = None
    deep_gemm: str | None = None
    flashinfer: str | None = None


class Shared(Record):
    """The store of a fleet, and the name of the fleet there."""

    url: str
    read_only: bool
    fleet: str


class ProbeJob(Record):
    """Find out, in an engine's environment, the keys of manifests' plans and what the keys of kernels are made of."""

    kind: Literal["probe"] = "probe"
    tools: Tools
    manifests: tuple[str, ...]


class PlanJob(Record):
    """Plan a manifest into the store."""

    kind: Literal["plan"] = "plan"
    tools: Tools
    shared: Shared
    manifest: str
    name: str


class CompileJob(Record):
    """Compile kernels into the store.

    Attributes:
        manifest: of any cell of the same engine.
        jobs: how many compilers run at once; None for one on each core.
        again: compile them although the store has them, and compare the results.
        flashinfer: also what FlashInfer would compile for the manifest.
    """

    kind: Literal["compile"] = "compile"
    tools: Tools
    shared: Shared
    manifest: str
    name: str
    kernels: tuple[Kernel, ...]
    jobs: int | None
    again: bool = False
    flashinfer: bool = False


class PackJob(Record):
    """Pack a manifest's artifact from what the store has."""

    kind: Literal["pack"] = "pack"
    tools: Tools
    shared: Shared
    manifest: str
    name: str
    output: str


Job = ProbeJob | PlanJob | CompileJob | PackJob


class Probed(Record):
    """What a `ProbeJob` found.

    Attributes:
        installation: DeepGEMM and the compiler, in words.
        key_parts: as of `compiling.compiler.key_parts`.
        plans: the key of each manifest's plan; None for a manifest that this environment refuses.
        refusals: why, for each manifest; empty where there is a key.
    """

    kind: Literal["probed"] = "probed"
    installation: str
    key_parts: tuple[str, ...]
    plans: tuple[str | None, ...]
    refusals: tuple[str, ...]


class Planned(Record):
    """A plan is in the store."""

    kind: Literal["planned"] = "planned"
    key: str
    seconds: float


class Done(Record):
    """Kernels are in the store: how many were compiled now, and how many it had; wall and CPU seconds."""

    kind: Literal["done"] = "done"
    compiled: int
    reused: int
    seconds: float
    cpu_seconds: float


class Artifact(Record):
    """A packed artifact."""

    kind: Literal["artifact"] = "artifact"
    path: str
    sha256: str
    size: int
    compiled: int


class Failed(Record):
    """A job's error: the name of its class in `errors`, its text and its hint."""

    kind: Literal["failed"] = "failed"
    error: str
    message: str
    hint: str | None


class Step(Record):
    """How far a job is, as `Progress` says it; more lines follow."""

    kind: Literal["step"] = "step"
    step: str
    done: int
    total: int
    share: float | None


class Notice(Record):
    """A remark for the user; more lines follow."""

    kind: Literal["notice"] = "notice"
    text: str


Answer = Probed | Planned | Done | Artifact | Failed

JOB: TypeAdapter[Job] = TypeAdapter(Annotated[Job, Field(discriminator="kind")])
LINE: TypeAdapter[Answer | Step | Notice] = TypeAdapter(Annotated[Answer | Step | Notice, Field(discriminator="kind")])


class JobRecord(Record):
    """One finished job, kept in the store under ``records/FLEET/`` for `fleet status`.

    Attributes:
        builder: the machine.
        finished: UTC, ISO 8601.
    """

    kind: Literal["plan", "compile"]
    name: str
    builder: str
    finished: str
    compiled: int
    reused: int
    seconds: float
    cpu_seconds: float
