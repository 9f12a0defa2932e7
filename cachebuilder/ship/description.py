"""What the annotations of an image say of the artifact in it. They only help to choose: the artifact is checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from cachebuilder.artifact.index import PROVENANCE_SUFFIX, REPORT_SUFFIX, SIGNATURE_SUFFIX, Fingerprint, Index
from cachebuilder.common import records
from cachebuilder.common.records import RecordError
from cachebuilder.errors import TransferError
from cachebuilder.ship.locations import is_digest, printable

#: The annotation with a file's name, which OCI tools use when they pull the file.
TITLE = "org.opencontainers.image.title"
#: The type of an attachment to an image: the signature of the artifact in it, with the other files in `BESIDE`.
SIGNATURE = "application/vnd.cachebuilder.signature.v1"
#: The files beside an artifact, by suffix: each one's media type in a registry and its most bytes. The signature is
#: first.
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
    """The annotations of an artifact, from which a machine sees whether it fits before it is fetched."""
    return {
        _NAME: index.name,
        _ARTIFACT: digest,
        _FINGERPRINT: index.fingerprint.model_dump_json(exclude_none=True),
        _DIGEST: index.fingerprint_digest,
        _MANIFEST: index.manifest,
        _KERNELS: str(len(index.entries)),
        _GPU: index.gpu,
    }


@dataclass(frozen=True)
class Described:
    """What annotations say of an artifact; the GPU is empty where they do not say. All of it may go to a terminal."""

    digest: str
    name: str
    gpu: str
    fingerprint: Fingerprint
    flashinfer: None = None  # annotations do not say


def read_description(annotations: Mapping[str, str], what: str) -> Described | None:
    """The description in annotations; None where they are not cachebuilder's.

    Raises:
        TransferError: they are cachebuilder's, and the fingerprint or the digest in them is wrong.
    """
    if _FINGERPRINT not in annotations:
        return None
    try:
        fingerprint = records.read(Fingerprint, annotations[_FINGERPRINT].encode())
    except RecordError as error:
        raise TransferError(f"{what}: annotation {_FINGERPRINT}: {error}") from None
    if not is_digest(digest := annotations.get(_ARTIFACT, "")):
        raise TransferError(f"{what}: annotation {_ARTIFACT}: wanted a sha256 digest, found {printable(digest)!r}")
    name, gpu = (printable(annotations.get(key, "")) for key in (_NAME, _GPU))
    return Described(digest, name, gpu, fingerprint)
