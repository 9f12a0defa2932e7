"""What the verbs print with ``--json``, field by field: their schemas are made from these records.

Fields are added; none is renamed or taken away without a line in the changelog. Nothing here is slow to import.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from cachebuilder.cuda.cubin import Resources
from cachebuilder.deepgemm.generation import Generation
from cachebuilder.deepgemm.source import Shape
from cachebuilder.planning.selection import Range
from cachebuilder.restoring.compatibility import Difference


class Document:
    """Base of what one verb prints."""

    def text(self) -> str:
        """As JSON."""
        return json.dumps(asdict(self), indent=1)  # type: ignore[call-overload]


@dataclass(frozen=True)
class FieldDifference:
    """A field of the fingerprint that differs."""

    field: str
    a: object
    b: object


@dataclass(frozen=True)
class ChangedEntry:
    """An entry of both, and those of its files that differ."""

    entry: str
    files: tuple[str, ...]


@dataclass(frozen=True)
class Diff(Document):
    """``diff --json``; lists are sorted."""

    same: bool
    fingerprint: tuple[FieldDifference, ...]
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    equal: tuple[str, ...]
    changed: tuple[ChangedEntry, ...]


@dataclass(frozen=True)
class Installed:
    """The DeepGEMM that serves here.

    Attributes:
        distribution: what it was installed with, name and version.
        headers: sha256 of its headers, as in a fingerprint.
    """

    path: str
    version: str
    distribution: str | None
    generation: Generation | None
    headers: str
    cutlass: str


@dataclass(frozen=True)
class Compiler:
    """An nvcc; ``origin`` says what named it."""

    path: str
    release: str
    origin: str


@dataclass(frozen=True)
class Card:
    """The first GPU; its compute capability as major and minor."""

    name: str
    capability: tuple[int, int]
    driver: str | None


@dataclass(frozen=True)
class CacheRoot:
    """A cache root.

    Attributes:
        entries: how many, by generation.
        damaged: a sentence for each.
        artifacts: names of those restored into it.
    """

    path: str
    exists: bool
    writable: bool
    entries: dict[str, int]
    damaged: tuple[str, ...]
    artifacts: tuple[str, ...]


@dataclass(frozen=True)
class ArtifactHere:
    """What an artifact would say here; ``fits``: there is no difference."""

    name: str
    fits: bool
    differences: tuple[Difference, ...]


@dataclass(frozen=True)
class Doctor(Document):
    """``doctor --json``; what is not here is null, with the reason among the problems.

    Attributes:
        roots_from: the variable that names the roots, or ``default``.
        roots: those that DeepGEMM would take here, in its order.
        folder: the folder that was asked about.
        kernel_variables: those set that change kernels.
    """

    deep_gemm: Installed | None
    torch: str | None
    nvcc: Compiler | None
    c_compiler: str | None
    gpu: Card | None
    roots_from: str
    roots: tuple[CacheRoot, ...]
    folder: CacheRoot | None
    kernel_variables: dict[str, str]
    artifacts: tuple[ArtifactHere, ...]
    problems: tuple[str, ...]


@dataclass(frozen=True)
class TemplateArgument:
    """An argument of the kernel's template; its name and its meaning where they are known."""

    name: str | None
    value: str
    words: str | None


@dataclass(frozen=True)
class AskingOp:
    """An op that asks for the kernel: ``position`` in the artifact's ops, and the points of ``variable``."""

    artifact: str
    op: str
    position: int
    shape: str
    variable: str
    sm_count: int
    ranges: tuple[Range, ...]


@dataclass(frozen=True)
class Explain(Document):
    """``explain --json``; ``made_for``: what the source says it was generated for."""

    entry: str
    name: str
    generation: Generation
    where: str
    template: str | None
    parameters: tuple[TemplateArgument, ...]
    made_for: Shape | None
    cubin_bytes: int | None
    resources: Resources | None
    asked_by: tuple[AskingOp, ...]
