"""Manifests, indexes and descriptors: what a registry is asked for and gives, with limits on what it may give.

https://github.com/opencontainers/image-spec/blob/v1.1.0/ (manifest.md, image-index.md, descriptor.md)
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cachebuilder.errors import TransferError
from cachebuilder.ship.locations import is_digest, printable

MANIFEST = "application/vnd.oci.image.manifest.v1+json"
INDEX = "application/vnd.oci.image.index.v1+json"

#: What registries take (distribution-spec, "Pushing Manifests"); ours with 100 targets have 300 kB.
MAX_MANIFEST_BYTES = 4 << 20
_MAX_NESTED = 10_000


@dataclass(frozen=True)
class Descriptor:
    """A blob or a manifest by its digest (image-spec, descriptor.md).

    Attributes:
        platform: ``os/architecture`` of an index's entry.
    """

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
        """The descriptor in a parsed document. Raises `TransferError` where it is none."""
        if not isinstance(value, dict):
            raise TransferError(f"{what}: wanted a descriptor, found something else")
        media_type, digest, size = value.get("mediaType"), value.get("digest"), value.get("size")
        if not isinstance(media_type, str) or not is_digest(digest) or type(size) is not int or size < 0:
            raise TransferError(f"{what}: wanted a descriptor with mediaType, a sha256 digest and size, found others")
        platform, kind = value.get("platform"), value.get("artifactType")
        if isinstance(platform, dict):
            platform = printable(f"{platform.get('os')}/{platform.get('architecture')}")
        return cls(
            printable(media_type),
            str(digest),
            size,
            annotations_of(value),
            kind if isinstance(kind, str) else None,
            platform if isinstance(platform, str) else None,
        )

    def document(self) -> dict[str, Any]:
        """As it is written in a manifest or an index."""
        found: dict[str, Any] = {"mediaType": self.media_type, "digest": self.digest, "size": self.size}
        if self.artifact_type:
            found["artifactType"] = self.artifact_type
        if self.annotations:
            found["annotations"] = dict(self.annotations)
        if self.platform:
            found["platform"] = dict(zip(("os", "architecture"), self.platform.split("/"), strict=True))
        return found


@dataclass(frozen=True)
class Manifest:
    """A manifest or an index as the registry gave it: its digest has been checked, what it says has not."""

    digest: str
    media_type: str
    data: bytes
    document: dict[str, Any]


def digest_of(data: bytes) -> str:
    """``sha256:`` and the digest."""
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def annotations_of(document: Mapping[str, Any]) -> dict[str, str]:
    """The annotations of a document or a descriptor that are texts."""
    found = document.get("annotations")
    if not isinstance(found, dict):
        return {}
    return {name: value for name, value in found.items() if isinstance(value, str)}


def index_document(listed: Sequence[Descriptor], annotations: Mapping[str, str] | None = None) -> bytes:
    """An index of these entries."""
    document: dict[str, Any] = {
        "schemaVersion": 2,
        "mediaType": INDEX,
        "manifests": [entry.document() for entry in listed],
    }
    if annotations:
        document["annotations"] = dict(annotations)
    return json_bytes(document)


def json_bytes(document: Mapping[str, Any]) -> bytes:
    """JSON, equal for equal documents: its bytes are what a digest is of."""
    return json.dumps(document, separators=(",", ":"), sort_keys=True).encode()


#: An index of ours has one entry a target; nobody has a thousand.
MAX_ENTRIES = 1000


def entries(index: Manifest, what: str) -> list[Descriptor]:
    """The entries of an index. Raises `TransferError` where it is hostile or none."""
    listed = index.document.get("manifests")
    if not isinstance(listed, list):
        raise TransferError(f"{what}: wanted an index, found {printable(index.media_type)}")
    if len(listed) > MAX_ENTRIES:
        raise TransferError(f"{what}: wanted an index of at most {MAX_ENTRIES} entries, found {len(listed)}")
    return [Descriptor.parse(entry, what) for entry in listed]


def read_manifest(data: bytes, content_type: str, what: str) -> Manifest:
    """The manifest or index in what a registry gave. Raises `TransferError` where it is none, or hostile."""
    if data.count(b"{") + data.count(b"[") > _MAX_NESTED:
        raise TransferError(f"{what}: wanted a manifest of at most {_MAX_NESTED} objects and lists, found more")
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):
        document = None
    if not isinstance(document, dict) or document.get("schemaVersion") != 2:
        raise TransferError(f"{what}: wanted an image manifest or an index, found something else")
    # What the document says goes before the header, which no digest covers.
    media_type = document.get("mediaType") or content_type.partition(";")[0]
    return Manifest(digest_of(data), printable(str(media_type)), data, document)


def wrong_digest(what: str, wanted: str, found: str) -> TransferError:
    """Bytes that are not those that were asked for."""
    return TransferError(
        f"{what}: not the bytes that were asked for\nwanted: {wanted}\nfound:  {found}",
        hint="fetch again; if it stays so, the registry or something before it is broken, or not yours",
    )
