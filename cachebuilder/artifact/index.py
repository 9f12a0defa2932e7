"""``artifact.json``, the first member of an artifact: what is inside, and what must agree for a hit."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import FailFast, Field

from cachebuilder.artifact.baked import BakedPart
from cachebuilder.common.records import Count, Line, Record, Sha256, Text
from cachebuilder.deepgemm.environment import KernelEnvironment
from cachebuilder.deepgemm.generation import Generation
from cachebuilder.planning.selection import Selection

#: The members of an artifact: the index, the manifest as given, and the folder of entries.
INDEX, MANIFEST, CACHE = "artifact.json", "manifest.yaml", "cache"
#: The folder of all that is FlashInfer's, and in it those of the GEMM's entries and of the modules.
FLASHINFER = "flashinfer"
FLASHINFER_CACHE, FLASHINFER_MODULES = f"{FLASHINFER}/cache", f"{FLASHINFER}/modules"

#: Files beside an artifact have its name and a suffix: the report of what a GPU did with it,
REPORT_SUFFIX = ".verified.json"
#: the record of its build,
RECORD_SUFFIX = ".build.json"
#: its signature, and the signed statement of where it comes from.
SIGNATURE_SUFFIX, PROVENANCE_SUFFIX = ".sig", ".intoto.json"
#: A report has a few hundred bytes for each point that was tried; a record a few hundred for each kernel.
MAX_REPORT_BYTES = 256 << 20

#: Far more than the cache of any real model.
MAX_ENTRIES = 20_000
_MAX_FILES = 8


class Fingerprint(Record):
    """Every fact that must agree between build and serving for DeepGEMM to find its kernels.

    Attributes:
        deep_gemm: DeepGEMM's own version; its code decides which kernel a shape needs.
        headers: `Installation.headers_digest`, part of every key.
        compiler: the whole text of ``nvcc --version``.
        environment: DeepGEMM's variables that change kernels.
        distribution: the name and version of the package that installed it; None for a bare folder.
        install_include: the include path inside every legacy key; a restore for another path renames the entries.
        legacy_flags: the compiler's flags inside every legacy key.
    """

    generation: Generation
    deep_gemm: Line
    headers: Sha256
    cutlass: Line
    compiler: Text
    arch: Line
    sm_counts: Annotated[tuple[Count, ...], FailFast()]
    environment: KernelEnvironment
    distribution: Line | None = None
    install_include: Line | None = None
    legacy_flags: Line | None = None

    def digest(self) -> str:
        """sha256 of the fingerprint's canonical JSON."""
        canonical = json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()


class File(Record):
    """One file of an entry: its name, its size in bytes, its sha256."""

    name: str
    size: Count
    sha256: Sha256


class Entry(Record):
    """One kernel: its folder under ``cache/``, its files, and where it is asked for."""

    name: str
    files: Annotated[tuple[File, ...], Field(max_length=_MAX_FILES), FailFast()]
    selected_by: Annotated[tuple[Selection, ...], FailFast()]


class FlashInferFingerprint(Record):
    """What must agree between build and serving for FlashInfer to take what was built, and for that to be right.

    FlashInfer's names hold no version and no header, so it would load what another FlashInfer's code was built into.
    The compiler is the artifact's, as are the GPU and its SM count.

    Attributes:
        version: FlashInfer's.
        headers: `flashinfer.installation.FlashInfer.headers_digest`.
        tvm_ffi: the version of ``apache-tvm-ffi``, whose ABI the modules use.
        arch: that the modules are compiled for, as nvcc names it.
        glibc: the newest version of glibc's functions that a module calls, as ``2.34``.
    """

    version: Line
    headers: Sha256
    tvm_ffi: Line
    arch: Line
    glibc: Line


class FlashInferPart(Record):
    """What FlashInfer would compile at run time.

    Attributes:
        modules: each in a folder of its name, with one file.
        gemms: the shapes, as the manifest's models dump them, not validated here.
        entries: the GEMM's kernels, named as FlashInfer names them.
    """

    fingerprint: FlashInferFingerprint
    modules: Annotated[tuple[Entry, ...], Field(max_length=MAX_ENTRIES), FailFast()]
    gemms: Annotated[tuple[dict[str, object], ...], FailFast()]
    entries: Annotated[tuple[Entry, ...], Field(max_length=MAX_ENTRIES), FailFast()]


@dataclass(frozen=True)
class Member:
    """One file of an artifact beside its index and its manifest: ``folder/entry/file``."""

    folder: str
    entry: Entry
    file: File

    @property
    def path(self) -> str:
        """The member's name in the tar."""
        return f"{self.folder}/{self.entry.name}/{self.file.name}"


class Index(Record):
    """All of ``artifact.json``.

    Attributes:
        schema_version: 3 in an artifact with baked caches; else 2 with something for FlashInfer; else 1.
        manifest: sha256 of the manifest's bytes.
        ops: as the manifest's models dump them, not validated here.
        recorded: facts for a person that bind nothing: torch, Python and the GPU's name.
        flashinfer: None in an artifact without anything for FlashInfer.
        baked: caches of the engine's other compilers; None where there are none.
    """

    schema_version: Literal[1, 2, 3]
    name: str
    fingerprint: Fingerprint
    fingerprint_digest: Sha256
    manifest: Sha256
    ops: Annotated[tuple[dict[str, object], ...], FailFast()]
    entries: Annotated[tuple[Entry, ...], Field(max_length=MAX_ENTRIES), FailFast()]
    recorded: dict[Line, Line]
    flashinfer: FlashInferPart | None = None
    baked: BakedPart | None = None

    @property
    def folders(self) -> dict[str, tuple[Entry, ...]]:
        """The entries of each folder of the artifact, in the folders' order."""
        folders = {CACHE: self.entries}
        if self.flashinfer:
            folders |= {FLASHINFER_MODULES: self.flashinfer.modules, FLASHINFER_CACHE: self.flashinfer.entries}
        return folders

    def members(self) -> Iterator[tuple[str, list[Member]]]:
        """The files of all entries in groups, in the order of the tar; each with what its files are called.

        In each folder all entries' first files come first, then all second ones, and so on.
        """
        for folder, entries in self.folders.items():
            for position in range(max((len(entry.files) for entry in entries), default=0)):
                members = [Member(folder, entry, entry.files[position]) for entry in entries]
                yield members[0].file.name, members

    @property
    def unpacked_size(self) -> int:
        """The size of all files but the index and the manifest, in bytes."""
        entries = sum(member.file.size for _, members in self.members() for member in members)
        return entries + sum(size for _, size in self.baked.members()) if self.baked else entries

    @property
    def gpu(self) -> str:
        """The name of the GPU that was planned for; empty where it was not recorded."""
        return self.recorded.get("gpu", "")
