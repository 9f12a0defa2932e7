"""``artifact.json``, the first member of an artifact: what is inside, and what must agree for it to be of use."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cachebuilder.common.records import Record, RecordError, fields, inside, integer, several, text, texts
from cachebuilder.deepgemm.generation import Generation
from cachebuilder.planning.selection import Selection

if TYPE_CHECKING:  # a restore reads indexes in a hurry, and needs nothing of these
    from cachebuilder.cuda.toolchain import Toolchain
    from cachebuilder.deepgemm.installation import Installation
    from cachebuilder.planning.make import Plan

#: The members of an artifact: the index, the manifest as given, and the folder of entries.
INDEX, MANIFEST, CACHE = "artifact.json", "manifest.yaml", "cache"

#: What was seen on a GPU lies beside the artifact, under its name and this.
REPORT_SUFFIX = ".verified.json"
#: So does its signature, and the signed statement of where it comes from.
SIGNATURE_SUFFIX, PROVENANCE_SUFFIX = ".sig", ".intoto.json"

#: No cache of a real model comes near.
MAX_ENTRIES = 20_000
_MAX_FILES = 8

_SHA256 = re.compile(r"[0-9a-f]{64}")


def _sha256(value: object, where: str) -> str:
    if not _SHA256.fullmatch(text(value, where)):
        raise RecordError(where, "wanted 64 hexadecimal digits")
    return str(value)


@dataclass(frozen=True)
class Fingerprint(Record):
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
    headers: str
    cutlass: str
    compiler: str
    arch: str
    sm_counts: tuple[int, ...]
    environment: dict[str, str]
    distribution: str | None = None
    install_include: str | None = None
    legacy_flags: str | None = None

    @classmethod
    def model_validate(cls, value: object, where: str = "") -> Fingerprint:
        """All fields; the last three may be left out."""
        found = dict(fields(value, where, _FINGERPRINT, _OPTIONAL))
        if found["generation"] not in ("legacy", "deepjit"):
            raise RecordError(inside(where, "generation"), "wanted legacy or deepjit")
        for name in ("deep_gemm", "cutlass", "compiler", "arch"):
            text(found[name], inside(where, name))
        for name in _OPTIONAL & found.keys():
            if found[name] is not None:
                text(found[name], inside(where, name))
        found["headers"] = _sha256(found["headers"], inside(where, "headers"))
        found["sm_counts"] = several(found["sm_counts"], inside(where, "sm_counts"), integer)
        found["environment"] = texts(found["environment"], inside(where, "environment"))
        return cls(**found)

    def digest(self) -> str:
        """sha256 of the fingerprint's canonical JSON."""
        canonical = json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()


@dataclass(frozen=True)
class File(Record):
    """One file of an entry."""

    name: str
    size: int
    sha256: str

    @classmethod
    def model_validate(cls, value: object, where: str = "") -> File:
        """Name, size in bytes, sha256."""
        found = fields(value, where, _FILE)
        size = integer(found["size"], where)
        return cls(text(found["name"], where), size, _sha256(found["sha256"], where))


@dataclass(frozen=True)
class Entry(Record):
    """One kernel: its folder under ``cache/``, its files, and where it is asked for."""

    name: str
    files: tuple[File, ...]
    selected_by: tuple[Selection, ...]

    @classmethod
    def model_validate(cls, value: object, where: str = "") -> Entry:
        """Name, files, selections."""
        found = fields(value, where, _ENTRY)
        return cls(
            text(found["name"], inside(where, "name")),
            several(found["files"], inside(where, "files"), File.model_validate, _MAX_FILES),
            several(found["selected_by"], inside(where, "selected_by"), Selection.model_validate),
        )


@dataclass(frozen=True, kw_only=True)
class Index(Record):
    """The whole index.

    Attributes:
        manifest: sha256 of the manifest's bytes.
        recorded: binds nothing: torch, Python and the GPU's name, for a person who looks.
    """

    schema_version: int = 1
    name: str
    fingerprint: Fingerprint
    fingerprint_digest: str
    manifest: str
    ops: tuple[dict[str, object], ...]
    entries: tuple[Entry, ...]
    recorded: dict[str, str]

    @classmethod
    def model_validate(cls, value: object, where: str = "") -> Index:
        """All fields; of no other schema version."""
        if isinstance(value, dict) and value.get("schema_version") != 1:
            raise RecordError("schema_version", f"wanted 1, found {str(value.get('schema_version'))[:60]!r}")
        found = fields(value, where, _INDEX)
        return cls(
            name=text(found["name"], "name"),
            fingerprint=Fingerprint.model_validate(found["fingerprint"], "fingerprint"),
            fingerprint_digest=_sha256(found["fingerprint_digest"], "fingerprint_digest"),
            manifest=_sha256(found["manifest"], "manifest"),
            ops=several(found["ops"], "ops", _op),
            entries=several(found["entries"], "entries", Entry.model_validate, MAX_ENTRIES),
            recorded=texts(found["recorded"], "recorded"),
        )


def _op(value: object, where: str) -> dict[str, object]:
    """An op as the manifest's model dumped it; whoever uses it validates it."""
    if type(value) is not dict:
        raise RecordError(where, "wanted an object")
    return value


_FILE, _ENTRY, _INDEX, _FINGERPRINT = (frozenset(cls.__dataclass_fields__) for cls in (File, Entry, Index, Fingerprint))
_OPTIONAL = frozenset(("distribution", "install_include", "legacy_flags"))


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
