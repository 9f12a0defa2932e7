"""``artifact.json``, the first member of an artifact: what is inside, and what must agree for it to be of use."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from cachebuilder.deepgemm import Generation
from cachebuilder.selection import Selection

if TYPE_CHECKING:  # a restore reads indexes in a hurry, and needs nothing of these
    from cachebuilder.deepgemm.installation import Installation
    from cachebuilder.plan import Plan
    from cachebuilder.toolchain import Toolchain

#: The members of an artifact: the index, the manifest as given, and the folder of entries.
INDEX, MANIFEST, CACHE = "artifact.json", "manifest.yaml", "cache"

#: No cache of a real model comes near.
MAX_ENTRIES = 20_000
#: The largest cubin seen is under 200 kB.
MAX_FILE_BYTES = 64 << 20

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Fingerprint(_Frozen):
    """Every fact that must agree between build and serving for DeepGEMM to find its kernels.

    Attributes:
        deep_gemm: its own version: its code decides which kernel a shape needs.
        distribution: what it was installed with, name and version; None where it was a bare folder.
        headers: `Installation.headers_digest`, part of every key.
        compiler: the whole text of ``nvcc --version``.
        install_include: legacy only: the include path inside every key; restoring elsewhere renames the entries.
        legacy_flags: legacy only: the flags inside every key.
        environment: DeepGEMM's variables that change kernels.
    """

    generation: Generation
    deep_gemm: str
    headers: Sha256
    cutlass: str
    compiler: str
    arch: str
    sm_counts: tuple[int, ...]
    environment: dict[str, str]
    distribution: str | None = None
    install_include: str | None = None
    legacy_flags: str | None = None

    def digest(self) -> str:
        """sha256 of the fingerprint's canonical JSON."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()


class File(_Frozen):
    """One file of an entry."""

    name: str
    size: Annotated[int, Field(ge=0, le=MAX_FILE_BYTES)]
    sha256: Sha256


class Entry(_Frozen):
    """One kernel: its folder under ``cache/``, its files, and where it is asked for."""

    name: str
    files: Annotated[tuple[File, ...], Field(max_length=8)]
    selected_by: tuple[Selection, ...]


class Index(_Frozen):
    """The whole index.

    ``recorded`` binds nothing: torch, Python, the host's compiler and the GPU's name, for a person who looks.
    """

    schema_version: Literal[1] = 1
    name: str
    fingerprint: Fingerprint
    fingerprint_digest: Sha256
    ops: tuple[dict[str, object], ...]
    entries: Annotated[tuple[Entry, ...], Field(max_length=MAX_ENTRIES)]
    recorded: dict[str, str]


def fingerprint(
    plan: Plan, installation: Installation, toolchain: Toolchain, environment: dict[str, str]
) -> Fingerprint:
    """The fingerprint of what was planned."""
    return Fingerprint(
        generation=plan.generation,
        deep_gemm=installation.version,
        distribution=installation.distribution,
        headers=installation.headers_digest,
        cutlass=installation.cutlass_version,
        compiler=toolchain.version_text,
        arch=plan.arch,
        sm_counts=plan.sm_counts,
        environment=environment,
        install_include=plan.include,
        legacy_flags=plan.legacy_flags,
    )
