"""Write an artifact: equal inputs give equal bytes."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from cachebuilder.artifact.archive import Tar, compress
from cachebuilder.artifact.index import CACHE, INDEX, MANIFEST, Entry, File, Fingerprint, Index
from cachebuilder.common.files import write_atomically
from cachebuilder.common.version import __version__
from cachebuilder.deepgemm import entries as entry_files
from cachebuilder.errors import ArtifactError
from cachebuilder.manifest.inputs import Inputs
from cachebuilder.planning.plan import Kernel, Plan


@dataclass(frozen=True)
class Packed:
    """What was written: the file, its sha256, its size in bytes, and the bytes of all entries' files unpacked."""

    path: Path
    sha256: str
    size: int
    unpacked_size: int


def pack(output: Path, inputs: Inputs, plan: Plan, cubins: Mapping[str, bytes]) -> Packed:
    """Write the artifact of ``plan`` to ``output``, whole or not at all.

    Args:
        cubins: each entry's compiled kernel.

    Raises:
        ArtifactError: ``output`` cannot be written.
    """
    name, manifest = inputs.manifest.name, inputs.manifest_bytes
    return pack_as(output, name, manifest, plan, cubins, fingerprint_of(plan, inputs))


def pack_as(
    output: Path, name: str, manifest: bytes, plan: Plan, cubins: Mapping[str, bytes], fingerprint: Fingerprint
) -> Packed:
    """Write an artifact with this name, this manifest's bytes and this fingerprint. Raises as `pack` does."""
    contents = {kernel.entry: _files(plan, kernel, cubins[kernel.entry]) for kernel in plan.kernels}
    index = Index(
        schema_version=1,
        name=name,
        fingerprint=fingerprint,
        fingerprint_digest=fingerprint.digest(),
        manifest=hashlib.sha256(manifest).hexdigest(),
        ops=plan.ops,
        entries=tuple(
            Entry(
                name=kernel.entry,
                files=tuple(
                    File(name=file, size=len(data), sha256=hashlib.sha256(data).hexdigest())
                    for file, data in contents[kernel.entry].items()
                ),
                selected_by=kernel.selected_by,
            )
            for kernel in plan.kernels
        ),
        recorded={"cachebuilder": __version__, "torch": plan.torch, "python": plan.python, "gpu": plan.gpu.name},
    )
    tar = _tar(index, manifest, plan, contents)
    data = compress(tar)
    write_atomically(output, data, ArtifactError)
    files = sum(file.size for entry in index.entries for file in entry.files)
    return Packed(output, hashlib.sha256(data).hexdigest(), len(data), files)


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


def publish(packed: Packed, output: Path) -> Packed:
    """Put a packed artifact at ``output``, whole or not at all. Raises `ArtifactError` where it cannot be written."""
    write_atomically(output, packed.path.read_bytes(), ArtifactError)
    return replace(packed, path=output)


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
    tar = Tar(time=int(os.environ.get("SOURCE_DATE_EPOCH", "0")))
    tar.add(INDEX, index.model_dump_json(indent=1, exclude_none=True).encode() + b"\n")
    tar.add(MANIFEST, manifest)
    # By file name first, then by source: like stands next to like, which is what the compressor needs.
    by_source = sorted(plan.kernels, key=lambda kernel: (kernel.name, kernel.source, kernel.entry))
    for file in entry_files.FILES[plan.generation]:
        for kernel in by_source:
            tar.add(f"{CACHE}/{kernel.entry}/{file}", contents[kernel.entry][file])
    return tar.bytes()
