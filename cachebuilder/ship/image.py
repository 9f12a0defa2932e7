"""An artifact as an OCI image: its manifest, its config, its second layer.

The first layer is the artifact itself, byte for byte: it is a tar in one zstd frame, which is what ``tar+zstd`` means
(image-spec 1.1, layer.md). The second layer holds what a restore puts beside ``cache/``: the frozen nvcc and the index.
So a mounted image, or a ``COPY --from=`` of all of it, is the same folder as a restore makes. Equal artifacts make
equal images, since an image holds no time and nothing of the machine that made it.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

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
    """An artifact's image. The manifest and the config differ for each platform.

    Attributes:
        layer: the first layer, the artifact itself.
        blobs: the second layer, then the configs.
    """

    index: Index
    layer: Descriptor
    blobs: tuple[tuple[Descriptor, bytes], ...]
    manifests: tuple[tuple[Descriptor, bytes], ...]


def make(path: Path, artifact: bytes, platforms: Sequence[str]) -> Image:
    """Make the image of an artifact. Its index and its checksum are checked here, every single file at a restore.

    Args:
        path: what errors call the artifact; tools that pull files store the first layer under its name.
        platforms: each ``os/architecture``, as in `PLATFORMS`.

    Raises:
        ArtifactError: the artifact is damaged.
    """
    archive = Archive(io.BytesIO(artifact), path)
    next(archive.files(), None)  # reads the manifest, and checks the index
    tar_digest = hashlib.sha256()
    for part in unpacked(io.BytesIO(artifact), path):  # checks the frame's checksum
        tar_digest.update(part)
    second_tar = _second_tar(archive)
    second_layer = compress(second_tar)
    layers = Descriptor.of(LAYER, artifact, annotations={TITLE: path.name}), Descriptor.of(LAYER, second_layer)
    diff_ids = [f"sha256:{tar_digest.hexdigest()}", digest_of(second_tar)]
    annotations = describe(archive.index, layers[0].digest)
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
    return Image(archive.index, layers[0], tuple(blobs), tuple(manifests))


def _second_tar(archive: Archive) -> bytes:
    index, tar = archive.index, Tar()
    for name, (content, mode) in own_files(index, archive.index_bytes, archive.manifest).items():
        tar.add(name, content, mode)
    if index.fingerprint.generation == "legacy":
        # Legacy DeepGEMM makes this folder at its first call, and dies if it cannot (sgl-deep-gemm 0.1.7,
        # csrc/utils/system.hpp). With the folder in the image, the root may be read-only.
        tar.add_folder("tmp")
    return tar.bytes()


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
