"""Write an artifact: equal inputs give equal bytes."""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import zstandard

from cachebuilder.artifact.baked import MEMBERS, BakedPart
from cachebuilder.artifact.index import (
    INDEX,
    MANIFEST,
    Entry,
    File,
    Fingerprint,
    FlashInferFingerprint,
    FlashInferPart,
    Index,
)
from cachebuilder.artifact.read import open_archive
from cachebuilder.artifact.whole import open_file
from cachebuilder.common.files import write_atomically
from cachebuilder.common.version import __version__
from cachebuilder.deepgemm import entries as entry_files
from cachebuilder.errors import ArtifactError
from cachebuilder.flashinfer import entries as flashinfer_files
from cachebuilder.flashinfer.elf import newest_glibc
from cachebuilder.manifest.inputs import Inputs
from cachebuilder.planning.plan import FlashInferPlan, Kernel, Plan
from cachebuilder.planning.selection import Selection

#: The tar of DeepSeek-V3's cache has 9.2 MB. Level 17 leaves 591 kB of it, level 19 571 kB, and level 22, with a window
#: of 16 MiB, 568 kB.
_LEVEL = 19


@dataclass(frozen=True)
class Packed:
    """An artifact that was written: its file, its sha256, its size, and the size of all its entries' files; bytes."""

    path: Path
    sha256: str
    size: int
    unpacked_size: int


@dataclass(frozen=True)
class PackedBytes:
    """An artifact in memory, and the size of all its entries' files."""

    data: bytes = field(repr=False)
    unpacked_size: int

    def write(self, path: Path) -> Packed:
        """Write the artifact, whole or not at all. Raises `ArtifactError` where it cannot be written."""
        write_atomically(path, self.data, ArtifactError)
        return Packed(path, hashlib.sha256(self.data).hexdigest(), len(self.data), self.unpacked_size)


@dataclass(frozen=True)
class FlashInferFiles:
    """What was compiled for FlashInfer: modules by name, the GEMM's cubins by entry; and their fingerprint."""

    modules: Mapping[str, bytes]
    cubins: Mapping[str, bytes]
    fingerprint: FlashInferFingerprint


def pack(
    inputs: Inputs, plan: Plan, cubins: Mapping[str, bytes], flashinfer: FlashInferFiles | None = None
) -> PackedBytes:
    """Pack the artifact of ``plan``; ``cubins`` are by entry."""
    name, manifest = inputs.manifest.name, inputs.manifest_bytes
    return pack_as(name, manifest, plan, cubins, fingerprint_of(plan, inputs), flashinfer)


def pack_as(
    name: str,
    manifest: bytes,
    plan: Plan,
    cubins: Mapping[str, bytes],
    fingerprint: Fingerprint,
    flashinfer: FlashInferFiles | None = None,
) -> PackedBytes:
    """Pack an artifact with this name, these bytes of a manifest and this fingerprint."""
    contents = {kernel.entry: _files(plan, kernel, cubins[kernel.entry]) for kernel in plan.kernels}
    part = None
    if plan.flashinfer and flashinfer:
        contents |= {name: {flashinfer_files.module_file(name): data} for name, data in flashinfer.modules.items()}
        for kernel in plan.flashinfer.kernels:
            files = {
                flashinfer_files.SOURCE: kernel.source.encode(),
                flashinfer_files.CUBIN: flashinfer.cubins[kernel.entry],
            }
            contents[kernel.entry] = files
        part = _flashinfer_part(plan.flashinfer, flashinfer, contents)
    index = Index(
        schema_version=2 if part else 1,
        name=name,
        fingerprint=fingerprint,
        fingerprint_digest=fingerprint.digest(),
        manifest=hashlib.sha256(manifest).hexdigest(),
        ops=plan.ops,
        entries=tuple(_entry(kernel.entry, contents, kernel.selected_by) for kernel in plan.kernels),
        recorded={"cachebuilder": __version__, "torch": plan.torch, "python": plan.python, "gpu": plan.gpu.name},
        flashinfer=part,
    )
    return PackedBytes(compress(_tar(index, manifest, plan, contents)), index.unpacked_size)


def pack_with_baked(artifact: Path, part: BakedPart, root: Path) -> PackedBytes:
    """The artifact with baked caches beside what it holds, in place of those that it may have.

    Args:
        root: the folder of the files of ``part``.

    Raises:
        ArtifactError: the artifact cannot be read, or is damaged; or a file is not as ``part`` says.
    """
    with open_archive(artifact) as archive:
        index = archive.index.model_copy(update={"schema_version": 3, "baked": part})
        members = [(member.path, data) for member, data in archive.files()]
        archive.drain()
    tar = _begin_tar(index, archive.manifest)
    for path, data in members:
        tar.add(path, data)
    paths = {file.sha256: file.path for file in part.files}
    for sha256, _ in part.members():
        with open_file(root / paths[sha256]) as file:
            data = file.read()
        if hashlib.sha256(data).hexdigest() != sha256:
            raise ArtifactError(f"{root / paths[sha256]}: changed while it was packed", hint="stop what writes there")
        tar.add(f"{MEMBERS}/{sha256}", data)
    return PackedBytes(compress(tar.bytes()), index.unpacked_size)


def _entry(name: str, contents: Mapping[str, Mapping[str, bytes]], selected_by: tuple[Selection, ...] = ()) -> Entry:
    files = contents[name].items()
    return Entry(
        name=name,
        files=tuple(File(name=file, size=len(d), sha256=hashlib.sha256(d).hexdigest()) for file, d in files),
        selected_by=selected_by,
    )


def _flashinfer_part(
    plan: FlashInferPlan, files: FlashInferFiles, contents: Mapping[str, Mapping[str, bytes]]
) -> FlashInferPart:
    return FlashInferPart(
        fingerprint=files.fingerprint,
        modules=tuple(_entry(name, contents) for name in plan.modules),
        gemms=plan.gemms,
        entries=tuple(_entry(kernel.entry, contents, kernel.selected_by) for kernel in plan.kernels),
    )


def flashinfer_files_of(
    inputs: Inputs, plan: Plan, modules: Mapping[str, bytes], cubins: Mapping[str, bytes]
) -> FlashInferFiles:
    """What was compiled for FlashInfer, with its fingerprint."""
    flashinfer = inputs.flashinfer
    assert flashinfer is not None and plan.flashinfer is not None
    fingerprint = FlashInferFingerprint(
        version=flashinfer.version,
        headers=flashinfer.headers_digest,
        tvm_ffi=flashinfer.tvm_ffi,
        arch=plan.flashinfer.arch,
        glibc=newest_glibc(modules.values()),
    )
    return FlashInferFiles(modules, cubins, fingerprint)


def fingerprint_of(plan: Plan, inputs: Inputs) -> Fingerprint:
    """The fingerprint of what was planned."""
    installation = inputs.installation
    return Fingerprint(
        generation=plan.generation,
        deep_gemm=installation.version,
        distribution=installation.distribution,
        headers=installation.headers_digest,
        cutlass=installation.cutlass_version,
        compiler=inputs.toolchain.version_text,
        arch=plan.arch,
        sm_counts=plan.sm_counts,
        environment=inputs.manifest.environment,
        install_include=plan.include,
        legacy_flags=plan.legacy_flags,
    )


def _files(plan: Plan, kernel: Kernel, cubin: bytes) -> dict[str, bytes]:
    """An entry's files as DeepGEMM would have written them."""
    data = {
        entry_files.SOURCE: kernel.source.encode(),
        entry_files.CUBIN: cubin,
        entry_files.METADATA: (kernel.metadata or "").encode(),
        entry_files.MARKER: b"",
    }
    return {file: data[file] for file in entry_files.FILES[plan.generation]}


def _tar(index: Index, manifest: bytes, plan: Plan, contents: Mapping[str, Mapping[str, bytes]]) -> bytes:
    tar = _begin_tar(index, manifest)
    # By file name first, then by source: like stands next to like, which is what the compressor needs.
    place = {kernel.entry: (kernel.name, kernel.source) for kernel in plan.kernels}
    for _, members in index.members():
        for member in sorted(members, key=lambda member: (place.get(member.entry.name, ("", "")), member.entry.name)):
            tar.add(member.path, contents[member.entry.name][member.file.name])
    return tar.bytes()


def _begin_tar(index: Index, manifest: bytes) -> Tar:
    tar = Tar(time=int(os.environ.get("SOURCE_DATE_EPOCH", "0")))
    tar.add(INDEX, index.model_dump_json(indent=1, exclude_none=True).encode() + b"\n")
    tar.add(MANIFEST, manifest)
    return tar


class Tar:
    """A tar in memory. Every member has owner 0 and the same time, so that nothing of this machine is in its header."""

    def __init__(self, time: int = 0) -> None:
        self._time = time
        self._buffer = io.BytesIO()
        self._tar = tarfile.open(fileobj=self._buffer, mode="w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115

    def add(self, name: str, data: bytes, mode: int = 0o644) -> None:
        """Add a file."""
        member = tarfile.TarInfo(name)
        member.size, member.mode, member.mtime = len(data), mode, self._time
        self._tar.addfile(member, io.BytesIO(data))

    def add_folder(self, name: str) -> None:
        """Add an empty folder."""
        member = tarfile.TarInfo(name)
        member.type, member.mode, member.mtime = tarfile.DIRTYPE, 0o755, self._time
        self._tar.addfile(member)

    def bytes(self) -> bytes:
        """The whole tar, ended: nothing can be added afterwards."""
        self._tar.close()
        return self._buffer.getvalue()


def compress(data: bytes) -> bytes:
    """One zstd frame with content size and checksum."""
    parameters = zstandard.ZstdCompressionParameters.from_level(
        _LEVEL, source_size=len(data), write_content_size=True, write_checksum=True
    )
    return zstandard.ZstdCompressor(compression_params=parameters).compress(data)
