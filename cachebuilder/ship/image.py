"""An artifact as an OCI image: its manifest, its config, its second layer.

The artifact itself is the first layer, to the byte: it is a tar in one zstd frame, which is what ``tar+zstd`` means
(image-spec 1.1, layer.md). The second layer holds what a restore puts beside ``cache/``: the frozen nvcc and the index.
So a mounted image, or a ``COPY --from=`` of all of it, is a folder like one that was restored into. Of equal artifacts
the images are equal: no time and nothing of the machine is in them.
"""

from __future__ import annotations

import hashlib
import io
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from cachebuilder.artifact.archive import add, compress
from cachebuilder.artifact.frame import unpacked
from cachebuilder.artifact.index import Index
from cachebuilder.artifact.read import Archive
from cachebuilder.restoring.folder import own_files
from cachebuilder.ship.description import TITLE, describe
from cachebuilder.ship.documents import MANIFEST, Descriptor, digest_of, json_bytes

CONFIG = "application/vnd.oci.image.config.v1+json"
LAYER = "application/vnd.oci.image.layer.v1.tar+zstd"
#: An artifact manifest's config says nothing (image-spec 1.1, manifest.md, "Guidance for an Empty Descriptor").
_EMPTY, NOTHING = "application/vnd.oci.empty.v1+json", b"{}"

#: Cubins run on the GPU: the host's architecture is what a container runtime compares, and nothing else.
PLATFORMS = ("linux/amd64", "linux/arm64")


@dataclass(frozen=True)
class Image:
    """The blobs of an image beside the artifact, and its manifest for each platform: they differ in the config only."""

    blobs: tuple[tuple[Descriptor, bytes], ...]
    manifests: tuple[tuple[Descriptor, bytes], ...]


def artifact_layer(name: str, digest: str, size: int) -> Descriptor:
    """The first layer: the artifact itself, which tools that pull files put under this name."""
    return Descriptor(LAYER, digest, size, {TITLE: name})


@dataclass(frozen=True)
class Contents:
    """What is in an artifact, as far as its image needs it: the index, the tar's digest, and the second layer's tar."""

    index: Index
    diff_id: str
    beside: bytes


def read(path: Path, file: BinaryIO) -> Contents:
    """The contents of an artifact, whose index and checksum are checked; a restore checks every file.

    Args:
        path: what ``file`` is called in errors.

    Raises:
        ArtifactError: it is damaged.
    """
    archive = Archive(file, path)
    next(archive.files(), None)  # reads the manifest
    inside = hashlib.sha256()
    for part in unpacked(file, path):
        inside.update(part)
    index = archive.index
    beside = io.BytesIO()
    with tarfile.open(fileobj=beside, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, (content, mode) in own_files(index, archive.index_bytes, archive.manifest).items():
            add(tar, name, content, mode)
        if index.fingerprint.generation == "legacy":
            # Legacy DeepGEMM makes this folder at its first call, and dies where it cannot (sgl-deep-gemm 0.1.7,
            # csrc/utils/system.hpp); where it is there, a root that is only read will do.
            folder = tarfile.TarInfo("tmp")
            folder.type, folder.mode = tarfile.DIRTYPE, 0o755
            tar.addfile(folder)
    return Contents(index, f"sha256:{inside.hexdigest()}", beside.getvalue())


def make(contents: Contents, artifact: Descriptor, platforms: Sequence[str]) -> Image:
    """The image of an artifact.

    Args:
        artifact: the first layer, from `artifact_layer`.
        platforms: ``os/architecture``, as in `PLATFORMS`.
    """
    index = contents.index
    small = compress(contents.beside)
    layers = artifact, Descriptor.of(LAYER, small)
    diff_ids = [contents.diff_id, digest_of(contents.beside)]
    annotations = describe(index, artifact.digest)
    configs, manifests = [], []
    for platform in platforms:
        config = json_bytes(
            dict(zip(("os", "architecture"), platform.split("/"), strict=True))
            | {
                "config": {},
                "rootfs": {"type": "layers", "diff_ids": diff_ids},
                "history": [{"created_by": "cachebuilder build"}, {"created_by": "cachebuilder push"}],
            }
        )
        configs.append((Descriptor.of(CONFIG, config), config))
        manifest = json_bytes(
            {
                "schemaVersion": 2,
                "mediaType": MANIFEST,
                "config": configs[-1][0].document(),
                "layers": [layer.document() for layer in layers],
                "annotations": annotations,
            }
        )
        manifests.append((Descriptor.of(MANIFEST, manifest, annotations=annotations, platform=platform), manifest))
    return Image(((layers[1], small), *configs), tuple(manifests))


def nothing() -> Descriptor:
    """The descriptor of `NOTHING`."""
    return Descriptor.of(_EMPTY, NOTHING)


def attachment(kind: str, subject: Descriptor, blobs: Sequence[tuple[Descriptor, bytes]]) -> tuple[Descriptor, bytes]:
    """A manifest that refers to another (image-spec 1.1, manifest.md: ``artifactType``, ``subject``)."""
    data = json_bytes(
        {
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "artifactType": kind,
            "config": nothing().document(),
            "layers": [blob.document() for blob, _ in blobs],
            "subject": subject.document(),
        }
    )
    return Descriptor.of(MANIFEST, data, artifact_type=kind), data
