"""Artifacts into a registry: one image, or an index of several, each with what is signed attached to it."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from cachebuilder.artifact.index import Index
from cachebuilder.artifact.whole import read_beside, read_bytes
from cachebuilder.errors import TransferError
from cachebuilder.ship import image
from cachebuilder.ship.description import BESIDE, SIGNATURE, TITLE
from cachebuilder.ship.documents import INDEX, Descriptor, digest_of, index_document
from cachebuilder.ship.locations import Reference
from cachebuilder.ship.registry import Repository
from cachebuilder.ship.retry import Retries


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
        data = read_bytes(path)
        # The checks take as long as the transfer: of a damaged artifact a blob is sent that nothing will refer to.
        with ThreadPoolExecutor(1) as aside:
            reading = aside.submit(image.read, path, data)
            layer = image.artifact_layer(path.name, data)
            repository.push_blob(layer.digest, data, f"push {path.name}")
            contents = reading.result()
        made = image.make(contents, layer, platforms)
        for other in targets:
            if other.index.fingerprint_digest == contents.index.fingerprint_digest:
                raise TransferError(
                    f"{reference}: wanted one artifact a GPU and DeepGEMM, {other.path} and {path} are for the same",
                    hint="push each to a tag of its own",
                )
        for blob, data in made.blobs:
            repository.push_blob(blob.digest, data, "push rest")
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
        repository.push_blob(blob.digest, data, "push rest")
    entry, data = image.attachment(SIGNATURE, subject, blobs)
    repository.push_referrer(data, replace(subject, annotations={}, platform=None), entry)
    return True
