"""What the annotations of an image say of the artifact in it: enough to choose by, and believed no further."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from cachebuilder.artifact.index import PROVENANCE_SUFFIX, REPORT_SUFFIX, SIGNATURE_SUFFIX, Fingerprint, Index
from cachebuilder.common import records
from cachebuilder.common.records import RecordError
from cachebuilder.errors import TransferError
from cachebuilder.ship.locations import printable

#: A file's name: where the OCI tools put it when they pull.
TITLE = "org.opencontainers.image.title"
#: The type of what is attached to an image: the signature of the artifact in it, and what else is signed.
SIGNATURE = "application/vnd.cachebuilder.signature.v1"
#: What lies beside an artifact under its name and a suffix: the media type it travels as, and how large it may be.
#: The signature is first.
BESIDE = {
    SIGNATURE_SUFFIX: ("application/vnd.cachebuilder.signature.v1+base64", 16 << 10),
    PROVENANCE_SUFFIX: ("application/vnd.dsse.envelope.v1+json", 1 << 20),
    REPORT_SUFFIX: ("application/vnd.cachebuilder.verified.v1+json", 64 << 20),
}

_PREFIX = "cachebuilder."
_NAME, _ARTIFACT, _FINGERPRINT, _DIGEST, _MANIFEST, _KERNELS, _GPU = (
    _PREFIX + name for name in ("name", "artifact", "fingerprint", "fingerprint-digest", "manifest", "kernels", "gpu")
)


def describe(index: Index, digest: str) -> dict[str, str]:
    """The annotations of an artifact: enough to tell whether it fits a machine, before it is fetched."""
    return {
        _NAME: index.name,
        _ARTIFACT: digest,
        _FINGERPRINT: index.fingerprint.model_dump_json(exclude_none=True),
        _DIGEST: index.fingerprint_digest,
        _MANIFEST: index.manifest,
        _KERNELS: str(len(index.entries)),
        _GPU: index.recorded.get("gpu", ""),
    }


@dataclass(frozen=True)
class Described:
    """What annotations say of an artifact; of use to choose, and believed no further.

    Attributes:
        digest: the artifact's, which is the first layer's.
        index: the artifact's as far as they tell: without ops and entries. All of it may be shown on a terminal.
    """

    digest: str
    index: Index


def read_description(annotations: Mapping[str, str], what: str) -> Described | None:
    """The description in annotations; None where there is none of ours.

    Raises:
        TransferError: it is of ours, and cannot be.
    """
    if _FINGERPRINT not in annotations:
        return None
    try:
        fingerprint = records.read(Fingerprint, annotations[_FINGERPRINT].encode())
    except RecordError as error:
        raise TransferError(f"{what}: annotation {_FINGERPRINT}: {error}") from None
    if not _is_text(fingerprint.model_dump()):
        raise TransferError(f"{what}: annotation {_FINGERPRINT}: wanted text, found control characters")
    index = Index.model_construct(  # the manifest's digest may be missing in an annotation
        schema_version=1,
        name=printable(annotations.get(_NAME, "")),
        fingerprint=fingerprint,
        fingerprint_digest=fingerprint.digest(),
        manifest=annotations.get(_MANIFEST, ""),
        ops=(),
        entries=(),
        recorded={"gpu": printable(annotations.get(_GPU, ""))},
    )
    return Described(annotations.get(_ARTIFACT, ""), index)


def _is_text(value: object) -> bool:
    """Whether all strings in it leave a terminal alone."""
    if isinstance(value, dict):
        return all(map(_is_text, value.keys())) and all(map(_is_text, value.values()))
    if isinstance(value, (list, tuple)):
        return all(map(_is_text, value))
    return not isinstance(value, str) or value.replace("\n", "").replace("\t", "").isprintable()
