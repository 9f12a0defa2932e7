"""Artifacts into a registry: one image, or an index of several, each with what is signed attached to it."""

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


@dataclass(frozen=True)
class PushedTarget:
    """One artifact of a push: its index, the image's digest for each platform, and whether a signature went along."""

    path: Path
    index: Index
    manifests: tuple[Descriptor, ...]
    signed: bool


@dataclass(frozen=True)
class Pushed:
    """What a tag stands for now: an image's digest, or an index's."""

    reference: Reference
    digest: str
    targets: tuple[PushedTarget, ...]


def push(reference: Reference, artifacts: Sequence[Path], platforms: Sequence[str], retries: Retries) -> Pushed:
    """Push artifacts under one tag. The tag is put last: who reads it finds all that it stands for.

    A tag with one artifact for one platform is an image; with more it is an index, an entry each.

    Raises:
        ArtifactError: an artifact is damaged.
        TransferError: the registry cannot be reached or refuses, or two artifacts would fit the same machines.
    """
    if reference.tag is None or reference.digest is not None:
        raise TransferError(f"{reference}: wanted a tag to push to", hint="the digest follows from what is pushed")
    repository = Repository(reference, retries)
    targets: list[PushedTarget] = []
    last = b""
    for path in artifacts:
        # The checks take as long as the transfer: of a damaged artifact a blob is sent that nothing will refer to.
        with open_file(path) as file, ThreadPoolExecutor(1) as aside:
            reading = aside.submit(image.read, path, file)
            layer = image.artifact_layer(path.name, *_measure(path, file.fileno()))
            repository.push_blob(in_file(layer.digest, layer.size, file.fileno(), path), f"push {path.name}")
            contents = reading.result()
        made = image.make(contents, layer, platforms)
        for other in targets:
            if other.index.fingerprint_digest == contents.index.fingerprint_digest:
                raise TransferError(
                    f"{reference}: wanted one artifact a GPU and DeepGEMM, {other.path} and {path} are for the same",
                    hint="push each to a tag of its own",
                )
        for blob, data in made.blobs:
            repository.push_blob(in_memory(blob.digest, data), "push rest")
        signed = False
        for manifest, last in made.manifests:
            repository.push_manifest(last, manifest.media_type, manifest.digest)
            signed = _attach(repository, manifest, path)
        targets.append(PushedTarget(path, contents.index, tuple(manifest for manifest, _ in made.manifests), signed))
    listed = [manifest for target in targets for manifest in target.manifests]
    if len(listed) > 1:
        last = index_document(listed)
    repository.push_manifest(last, INDEX if len(listed) > 1 else listed[0].media_type, reference.tag)
    return Pushed(reference, digest_of(last), tuple(targets))


def _measure(path: Path, handle: int) -> tuple[str, int]:
    """Digest and size of an open file, whose position is left alone."""
    size = os.fstat(handle).st_size
    if size > MAX_ARTIFACT_BYTES:
        raise ArtifactError(f"{path}: wanted at most {MAX_ARTIFACT_BYTES} bytes, found {size}")
    digest, done = hashlib.sha256(), 0
    while part := os.pread(handle, _PART_BYTES, done):
        digest.update(part)
        done += len(part)
    return f"sha256:{digest.hexdigest()}", done


def _attach(repository: Repository, subject: Descriptor, path: Path) -> bool:
    """Attach the signature of an artifact with what it speaks of; False where it is not signed."""
    blobs: list[tuple[Descriptor, bytes]] = []
    for suffix, (media_type, most) in BESIDE.items():
        beside = path.with_name(path.name + suffix)
        data = read_beside(beside, most)
        if data is None and not blobs:
            return False
        if data is not None:
            blobs.append((Descriptor.of(media_type, data, annotations={TITLE: beside.name}), data))
    for blob, data in (*blobs, (image.nothing(), image.NOTHING)):
        repository.push_blob(in_memory(blob.digest, data), "push rest")
    entry, data = image.attachment(SIGNATURE, subject, blobs)
    repository.push_referrer(data, replace(subject, annotations={}, platform=None), entry)
    return True
