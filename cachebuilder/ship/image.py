"""An artifact as an OCI image: its manifest, its config, its second layer.

The first layer is the artifact itself, byte for byte: it is a tar in one zstd frame, which is what ``tar+zstd`` means
(image-spec 1.1, layer.md). The second layer holds what a restore puts beside ``cache/``: the frozen nvcc and the index.
So a mounted image, or a ``COPY --from=`` of all of it, is the same folder as a restore makes. Equal artifacts make
equal images, since an image holds no time and nothing of the machine that made it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from cachebuilder.artifact.frame import unpacked
from cachebuilder.artifact.index import Index
from cachebuilder.artifact.pack import Tar, compress
from cachebuilder.artifact.read import Archive
from cachebuilder.restoring.folder import own_files
from cachebuilder.ship.description import TITLE, describe
from cachebuilder.ship.documents import MANIFEST, Descriptor, digest_of, json_bytes

CONFIG = "application/vnd.oci.image.config.v1+json"
LAYER = "application/vnd.oci.image.layer.v1.tar+zstd"
#: The config of a manifest that is no image (image-spec 1.1, manifest.md, "Guidance for an Empty Descriptor").
EMPTY_DATA = b"{}"
EMPTY = Descriptor.of("application/vnd.oci.empty.v1+json", EMPTY_DATA)

#: Cubins run on the GPU, so only container runtimes care about the host's architecture.
PLATFORMS = ("linux/amd64", "linux/arm64")


@dataclass(frozen=True)
class Image:
    """An image's blobs without the artifact, and its manifest for each platform; only the configs differ."""

    blobs: tuple[tuple[Descriptor, bytes], ...]
    manifests: tuple[tuple[Descriptor, bytes], ...]


def artifact_layer(name: str, digest: str, size: int) -> Descriptor:
    """The first layer, the artifact itself. Tools that pull files store it as ``name``."""
    return Descriptor(LAYER, digest, size, {TITLE: name})


@dataclass(frozen=True)
class Contents:
    """What an image needs of an artifact.

    Attributes:
        diff_id: digest of the artifact's tar.
        second_tar: the tar of the second layer.
    """

    index: Index
    diff_id: str
    second_tar: bytes


def read(path: Path, file: BinaryIO) -> Contents:
    """Read an artifact. Its index and its checksum are checked here, every single file at a restore.

    Args:
        path: what errors call ``file``.

    Raises:
        ArtifactError: the artifact is damaged.
    """
    archive = Archive(file, path)
    next(archive.files(), None)  # reads the manifest, and checks the index
    tar_digest = hashlib.sha256()
    for part in unpacked(file, path):  # checks the frame's checksum
        tar_digest.update(part)
    index = archive.index
    second = Tar()
    for name, (content, mode) in own_files(index, archive.index_bytes, archive.manifest).items():
        second.add(name, content, mode)
    if index.fingerprint.generation == "legacy":
        # Legacy DeepGEMM makes this folder at its first call, and dies if it cannot (sgl-deep-gemm 0.1.7,
        # csrc/utils/system.hpp). With the folder in the image, the root may be read-only.
        second.add_folder("tmp")
    return Contents(index, f"sha256:{tar_digest.hexdigest()}", second.bytes())


def make(contents: Contents, artifact: Descriptor, platforms: Sequence[str]) -> Image:
    """Make the image of an artifact.

    Args:
        artifact: the first layer, from `artifact_layer`.
        platforms: each ``os/architecture``, as in `PLATFORMS`.
    """
    second_layer = compress(contents.second_tar)
    layers = artifact, Descriptor.of(LAYER, second_layer)
    diff_ids = [contents.diff_id, digest_of(contents.second_tar)]
    annotations = describe(contents.index, artifact.digest)
    blobs = [(layers[1], second_layer)]
    manifests = []
    for platform in platforms:
        config = json_bytes(
            dict(zip(("os", "architecture"), platform.split("/"), strict=True))
            | {
                "config": {},
                "rootfs": {"type": "layers", "diff_ids": diff_ids},
                "history": [{"created_by": "cachebuilder build"}, {"created_by": "cachebuilder push"}],
            }
        )
        blobs.append((Descriptor.of(CONFIG, config), config))
        manifest = json_bytes(
            {
                "schemaVersion": 2,
                "mediaType": MANIFEST,
                "config": blobs[-1][0].document(),
                "layers": [layer.document() for layer in layers],
                "annotations": annotations,
            }
        )
        manifests.append((Descriptor.of(MANIFEST, manifest, annotations=annotations, platform=platform), manifest))
    return Image(tuple(blobs), tuple(manifests))


def attachment(kind: str, subject: Descriptor, layers: Sequence[Descriptor]) -> tuple[Descriptor, bytes]:
    """A manifest of ``layers`` that refers to another manifest (image-spec 1.1, manifest.md, ``subject``).

    Args:
        kind: its ``artifactType``.
    """
    data = json_bytes(
        {
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "artifactType": kind,
            "config": EMPTY.document(),
            "layers": [layer.document() for layer in layers],
            "subject": subject.document(),
        }
    )
    return Descriptor.of(MANIFEST, data, artifact_type=kind), data
