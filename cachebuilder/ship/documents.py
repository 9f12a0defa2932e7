"""Manifests, indexes and descriptors: a registry's documents, and the limits on those that it sends.

https://github.com/opencontainers/image-spec/blob/v1.1.0/ (manifest.md, image-index.md, descriptor.md)
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cachebuilder.errors import TransferError
from cachebuilder.ship.locations import is_digest, is_text, printable

MANIFEST = "application/vnd.oci.image.manifest.v1+json"
INDEX = "application/vnd.oci.image.index.v1+json"

#: Registries take this much (distribution-spec, "Pushing Manifests"). An index of ours with 100 targets has 300 kB.
MAX_MANIFEST_BYTES = 4 << 20
_MAX_NESTED = 10_000
#: An index of ours has one entry for each target and platform; nobody has a thousand.
_MAX_ENTRIES = 1000
_PLATFORM = re.compile(r"[A-Za-z0-9._-]{1,50}/[A-Za-z0-9._-]{1,50}")


@dataclass(frozen=True)
class Descriptor:
    """A blob or a manifest (image-spec, descriptor.md); an entry of an index has a platform, ``os/architecture``."""

    media_type: str
    digest: str
    size: int
    annotations: Mapping[str, str] = field(default_factory=dict)
    artifact_type: str | None = None
    platform: str | None = None

    @classmethod
    def of(cls, media_type: str, data: bytes, **more: Any) -> Descriptor:
        """The descriptor of these bytes."""
        return cls(media_type, digest_of(data), len(data), **more)

    @classmethod
    def parse(cls, value: object, what: str) -> Descriptor:
        """The descriptor in a parsed document. Raises `TransferError` if ``value`` is no descriptor."""
        if not isinstance(value, dict):
            raise TransferError(f"{what}: wanted a descriptor, found something else")
        media_type, digest, size = value.get("mediaType"), value.get("digest"), value.get("size")
        if not isinstance(media_type, str) or not is_digest(digest) or type(size) is not int or size < 0:
            raise TransferError(f"{what}: wanted a descriptor with mediaType, a sha256 digest and size, found others")
        artifact_type = value.get("artifactType")
        return cls(
            printable(media_type),
            str(digest),
            size,
            annotations_of(value),
            artifact_type if isinstance(artifact_type, str) else None,
            _platform(value.get("platform")),
        )

    def document(self) -> dict[str, Any]:
        """The descriptor as a manifest or an index holds it."""
        document: dict[str, Any] = {"mediaType": self.media_type, "digest": self.digest, "size": self.size}
        if self.artifact_type:
            document["artifactType"] = self.artifact_type
        if self.annotations:
            document["annotations"] = dict(self.annotations)
        if self.platform:
            document["platform"] = dict(zip(("os", "architecture"), self.platform.split("/"), strict=True))
        return document


def _platform(value: object) -> str | None:
    """``os/architecture``, where both are words."""
    if not isinstance(value, dict):
        return None
    text = f"{value.get('os')}/{value.get('architecture')}"
    return text if _PLATFORM.fullmatch(text) else None


@dataclass(frozen=True)
class Manifest:
    """A manifest or an index as the registry sent it. Its digest has been checked, its content has not."""

    digest: str
    media_type: str
    data: bytes
    document: dict[str, Any]


def digest_of(data: bytes) -> str:
    """The digest of ``data``, as ``sha256:…``."""
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def annotations_of(document: Mapping[str, Any]) -> dict[str, str]:
    """The annotations of a document or a descriptor, without those that are no text: JSON can hold half a character."""
    annotations = document.get("annotations")
    if not isinstance(annotations, dict):
        return {}
    return {name: value for name, value in annotations.items() if isinstance(value, str) and is_text(name + value)}


def index_document(manifests: Sequence[Descriptor]) -> bytes:
    """An index of these manifests."""
    listed = [manifest.document() for manifest in manifests]
    return json_bytes({"schemaVersion": 2, "mediaType": INDEX, "manifests": listed})


def json_bytes(document: Mapping[str, Any]) -> bytes:
    """The document as JSON. Equal documents give equal bytes, and so equal digests."""
    return json.dumps(document, separators=(",", ":"), sort_keys=True).encode()


def entries(index: Manifest, what: str, *, skip_broken: bool = False) -> list[Descriptor]:
    """The entries of an index. Raises `TransferError` if the document is no index, or exceeds a limit.

    Args:
        skip_broken: leave out entries that are no descriptors, so that they do not hide the others.
    """
    listed = index.document.get("manifests")
    if not isinstance(listed, list):
        raise TransferError(f"{what}: wanted an index, found {printable(index.media_type)}")
    if len(listed) > _MAX_ENTRIES:
        raise TransferError(f"{what}: wanted an index of at most {_MAX_ENTRIES} entries, found {len(listed)}")
    descriptors = []
    for entry in listed:
        try:
            descriptors.append(Descriptor.parse(entry, what))
        except TransferError:
            if not skip_broken:
                raise
    return descriptors


def read_manifest(data: bytes, content_type: str, what: str) -> Manifest:
    """Read a manifest or an index that a registry sent. Raises `TransferError` if it is neither, or exceeds a limit."""
    if data.count(b"{") + data.count(b"[") > _MAX_NESTED:
        raise TransferError(f"{what}: wanted a manifest of at most {_MAX_NESTED} objects and lists, found more")
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):
        document = None
    if not isinstance(document, dict) or document.get("schemaVersion") != 2:
        raise TransferError(f"{what}: wanted an image manifest or an index, found something else")
    # The document's own type counts before the header's, which no digest covers.
    media_type = document.get("mediaType") or content_type.partition(";")[0]
    return Manifest(digest_of(data), printable(str(media_type)), data, document)


def wrong_digest(what: str, wanted: str, found: str) -> TransferError:
    """The error for bytes with another digest than the requested one."""
    return TransferError(
        f"{what}: not the bytes that were asked for\nwanted: {wanted}\nfound:  {found}",
        hint="fetch again; if the digest stays wrong, the registry or a proxy before it is broken or not yours",
    )
