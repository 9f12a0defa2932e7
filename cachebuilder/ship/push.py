"""Push artifacts to a registry: one image, or an index of several, with each artifact's signature attached."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from cachebuilder.artifact.index import Index
from cachebuilder.artifact.whole import read_beside, read_bytes
from cachebuilder.errors import TransferError
from cachebuilder.ship import image
from cachebuilder.ship.description import BESIDE, SIGNATURE, TITLE
from cachebuilder.ship.documents import INDEX, MANIFEST, Descriptor, digest_of, index_document
from cachebuilder.ship.locations import Reference
from cachebuilder.ship.registry import Repository
from cachebuilder.ship.retry import Retries

#: The step of a push that sends everything but the artifacts, as `Progress` names it.
_REST = "push rest"


@dataclass(frozen=True)
class PushedTarget:
    """One pushed artifact: its image for each platform, and whether a signature was attached to them."""

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
        artifact = read_bytes(path)
        made = image.make(path, artifact, platforms)
        repository.push_blob(made.layer, artifact, f"push {path.name}")
        for other in targets:
            if other.index.fingerprint_digest == made.index.fingerprint_digest:
                raise TransferError(
                    f"{reference}: wanted one artifact for each GPU and DeepGEMM, "
                    f"found two for the same: {other.path} and {path}",
                    hint="push each to a tag of its own",
                )
        for blob, data in made.blobs:
            repository.push_blob(blob, data, _REST)
        signed = False
        for manifest, data in made.manifests:
            repository.push_manifest(data, manifest.media_type, manifest.digest)
            signed = _attach_signature(repository, manifest, path)
        manifests += made.manifests
        targets.append(PushedTarget(path, made.index, tuple(manifest for manifest, _ in made.manifests), signed))
    document, media_type = manifests[0][1], MANIFEST
    if len(manifests) > 1:
        document, media_type = index_document([manifest for manifest, _ in manifests]), INDEX
    repository.push_manifest(document, media_type, reference.tag)
    return Pushed(reference, digest_of(document), tuple(targets))


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
        repository.push_blob(blob, data, _REST)
    entry, data = image.attachment(SIGNATURE, subject, [blob for blob, _ in blobs])
    repository.push_referrer(data, replace(subject, annotations={}, platform=None), entry)
    return True
