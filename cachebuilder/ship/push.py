"""Push artifacts to a registry: one image, or an index of several, with each artifact's signature attached."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from cachebuilder.artifact.index import Index
from cachebuilder.artifact.whole import MAX_ARTIFACT_BYTES, open_file, read_beside
from cachebuilder.errors import ArtifactError, TransferError
from cachebuilder.ship import image
from cachebuilder.ship.description import BESIDE, SIGNATURE, TITLE
from cachebuilder.ship.documents import INDEX, Descriptor, digest_of, index_document
from cachebuilder.ship.locations import Reference
from cachebuilder.ship.registry import Repository
from cachebuilder.ship.retry import Retries
from cachebuilder.ship.upload import in_file, in_memory

_PART_BYTES = 1 << 20
#: The step of a push that sends everything but the artifacts, as `Progress` names it.
_REST = "push rest"


@dataclass(frozen=True)
class PushedTarget:
    """One pushed artifact.

    Attributes:
        manifests: its image for each platform.
        signed: whether a signature was attached.
    """

    path: Path
    index: Index
    manifests: tuple[Descriptor, ...]
    signed: bool


@dataclass(frozen=True)
class Pushed:
    """What a tag now stands for: the digest of an image or of an index, and the artifacts in it."""

    reference: Reference
    digest: str
    targets: tuple[PushedTarget, ...]


def push(reference: Reference, artifacts: Sequence[Path], platforms: Sequence[str], retries: Retries) -> Pushed:
    """Push artifacts under one tag. The tag is put last, so a reader of the tag finds everything it stands for.

    One artifact for one platform becomes an image; more become an index, with an entry for each.

    Args:
        platforms: each ``os/architecture``, as in `image.PLATFORMS`.

    Raises:
        ArtifactError: an artifact is damaged.
        TransferError: the registry cannot be reached or refuses, or two artifacts fit the same machines.
    """
    if reference.tag is None or reference.digest is not None:
        raise TransferError(
            f"{reference}: wanted a tag to push to, found a digest", hint="name a tag; push prints the new digest"
        )
    repository = Repository(reference, retries)
    targets: list[PushedTarget] = []
    manifests: list[tuple[Descriptor, bytes]] = []
    for path in artifacts:
        layer, contents = _push_artifact(repository, path)
        for other in targets:
            if other.index.fingerprint_digest == contents.index.fingerprint_digest:
                raise TransferError(
                    f"{reference}: wanted one artifact for each GPU and DeepGEMM, "
                    f"found two for the same: {other.path} and {path}",
                    hint="push each to a tag of its own",
                )
        made = image.make(contents, layer, platforms)
        for blob, data in made.blobs:
            repository.push_blob(in_memory(blob.digest, data), _REST)
        signed = False
        for manifest, data in made.manifests:
            repository.push_manifest(data, manifest.media_type, manifest.digest)
            signed = _attach_signature(repository, manifest, path)
        manifests += made.manifests
        descriptors = tuple(manifest for manifest, _ in made.manifests)
        targets.append(PushedTarget(path, contents.index, descriptors, signed))
    if len(manifests) == 1:
        [(manifest, document)] = manifests
        media_type = manifest.media_type
    else:
        document, media_type = index_document([manifest for manifest, _ in manifests]), INDEX
    repository.push_manifest(document, media_type, reference.tag)
    return Pushed(reference, digest_of(document), tuple(targets))


def _push_artifact(repository: Repository, path: Path) -> tuple[Descriptor, image.Contents]:
    """Send an artifact as a blob, and check it meanwhile; the check takes as long as the transfer.

    The blob of a damaged artifact is sent as well, but no manifest will refer to it.
    """
    with open_file(path) as file, ThreadPoolExecutor(1) as executor:
        reading = executor.submit(image.read, path, file)
        layer = image.artifact_layer(path.name, *_measure(path, file.fileno()))
        repository.push_blob(in_file(layer.digest, layer.size, file.fileno(), path), f"push {path.name}")
        return layer, reading.result()


def _measure(path: Path, handle: int) -> tuple[str, int]:
    """Digest and size of an open file, without moving its position."""
    size = os.fstat(handle).st_size
    if size > MAX_ARTIFACT_BYTES:
        raise ArtifactError(f"{path}: wanted at most {MAX_ARTIFACT_BYTES} bytes, found {size}")
    digest, offset = hashlib.sha256(), 0
    while part := os.pread(handle, _PART_BYTES, offset):
        digest.update(part)
        offset += len(part)
    return f"sha256:{digest.hexdigest()}", offset


def _attach_signature(repository: Repository, subject: Descriptor, path: Path) -> bool:
    """Attach an artifact's signature and what else is signed beside it; returns False if the artifact is not signed."""
    blobs: list[tuple[Descriptor, bytes]] = []
    for suffix, (media_type, most) in BESIDE.items():  # the signature is first
        beside = path.with_name(path.name + suffix)
        data = read_beside(beside, most)
        if data is None and not blobs:
            return False
        if data is not None:
            blobs.append((Descriptor.of(media_type, data, annotations={TITLE: beside.name}), data))
    for blob, data in (*blobs, (image.EMPTY, image.EMPTY_DATA)):
        repository.push_blob(in_memory(blob.digest, data), _REST)
    entry, data = image.attachment(SIGNATURE, subject, [blob for blob, _ in blobs])
    repository.push_referrer(data, replace(subject, annotations={}, platform=None), entry)
    return True
