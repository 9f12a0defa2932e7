"""Where an artifact comes from, signed: an in-toto Statement v1 with SLSA provenance v1, in a DSSE envelope.

Formats: https://github.com/in-toto/attestation (spec/v1/statement.md), https://slsa.dev/spec/v1.0/provenance and
https://github.com/secure-systems-lab/dsse (protocol.md, envelope.md).
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import json
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ec

from cachebuilder.artifact import signature
from cachebuilder.artifact.index import (
    INDEX,
    MANIFEST,
    MAX_REPORT_BYTES,
    PROVENANCE_SUFFIX,
    RECORD_SUFFIX,
    REPORT_SUFFIX,
    SIGNATURE_SUFFIX,
    Index,
)
from cachebuilder.artifact.read import Archive
from cachebuilder.artifact.whole import read_beside, read_bytes
from cachebuilder.common import records
from cachebuilder.common.files import write_atomically
from cachebuilder.common.packages import Material
from cachebuilder.errors import ArtifactError, SignatureError

PAYLOAD_TYPE = "application/vnd.in-toto+json"
STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE = "https://slsa.dev/provenance/v1"
BUILD_TYPE = "urn:cachebuilder:artifact:v1"
BUILDER = "urn:cachebuilder"

#: The time of signing by the signer's clock, in UTC. SLSA wants a vendor's prefix on fields of its own.
SIGNED_ON = "cachebuilder_signedOn"


def encoded(payload_type: str, payload: bytes) -> bytes:
    """The bytes that a DSSE signature signs: the pre-authentication encoding (DSSE protocol.md, PAE)."""
    kind = payload_type.encode()
    return b"DSSEv1 %d %s %d %s" % (len(kind), kind, len(payload), payload)


def sign_file(path: Path, key: ec.EllipticCurvePrivateKey) -> tuple[str, list[Path]]:
    """Check a whole artifact, then write its signature and its statement beside it.

    Returns:
        The artifact's sha256, and the files that were written.

    Raises:
        ArtifactError: it is damaged, or the report beside it is about another artifact.
        SignatureError: a file cannot be written.
    """
    data = read_bytes(path)
    content = statement(path, data)
    signed = {SIGNATURE_SUFFIX: signature.sign(data, key), PROVENANCE_SUFFIX: seal(content, key)}
    written = {path.with_name(path.name + suffix): file for suffix, file in signed.items()}
    for file, file_data in written.items():
        write_atomically(file, file_data, SignatureError)
    return hashlib.sha256(data).hexdigest(), list(written)


def statement(path: Path, data: bytes) -> dict[str, Any]:
    """The statement about an artifact, which is checked whole: from its index, and from the report beside it if any."""
    archive = Archive(io.BytesIO(data), path)
    archive.check()
    index, sha256 = archive.index, hashlib.sha256(data).hexdigest()
    byproducts: list[dict[str, Any]] = [
        {"name": INDEX, "digest": _digest(archive.index_bytes), "annotations": {"kernels": len(index.entries)}}
    ]
    report_path = _report_path(path)
    if report := read_beside(report_path, MAX_REPORT_BYTES):
        _check_report(report_path, report, sha256)
        byproducts.append({"name": report_path.name, "digest": _digest(report)})
    return {
        "_type": STATEMENT_TYPE,
        "subject": [{"name": path.name, "digest": {"sha256": sha256}}],
        "predicateType": PREDICATE_TYPE,
        "predicate": {
            "buildDefinition": {
                "buildType": BUILD_TYPE,
                "externalParameters": {"name": index.name, "manifest": {"sha256": index.manifest}},
                "internalParameters": {
                    "fingerprint": index.fingerprint.model_dump(exclude_none=True),
                    "fingerprint_digest": index.fingerprint_digest,
                    "kernels": len(index.entries),
                    "recorded": index.recorded,
                },
                "resolvedDependencies": [*_dependencies(index), *_materials(path, sha256)],
            },
            "runDetails": {
                "builder": {"id": BUILDER, "version": {"cachebuilder": index.recorded.get("cachebuilder", "")}},
                "metadata": {SIGNED_ON: time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())},
                "byproducts": byproducts,
            },
        },
    }


def _dependencies(index: Index) -> list[dict[str, Any]]:
    fingerprint = index.fingerprint
    deep_gemm: dict[str, Any] = {
        "name": "deep_gemm",
        "annotations": {
            "version": fingerprint.deep_gemm,
            "headers": fingerprint.headers,
            "cutlass": fingerprint.cutlass,
        },
    }
    if fingerprint.distribution:
        deep_gemm["uri"] = "pkg:pypi/" + fingerprint.distribution.replace(" ", "@")
    else:
        deep_gemm["digest"] = {"headers": fingerprint.headers}
    compiler = fingerprint.compiler.encode("utf-8", "surrogateescape")
    return [
        {"name": MANIFEST, "digest": {"sha256": index.manifest}},
        deep_gemm,
        {"name": "nvcc --version", "digest": _digest(compiler), "content": base64.b64encode(compiler).decode()},
    ]


def _materials(path: Path, sha256: str) -> list[dict[str, Any]]:
    """The packages and compilers in the record of the build beside an artifact; none where no record is about it."""
    record_path = path.with_name(path.name + RECORD_SUFFIX)
    wrong = ArtifactError(f"{record_path}: wanted the record of a build, found something else", hint="remove it")
    if (data := read_beside(record_path, MAX_REPORT_BYTES)) is None:
        return []
    try:
        record = json.loads(data)
        if record["artifact"] != sha256:
            return []
        materials = [records.read(Material, json.dumps(item).encode()) for item in record.get("materials", ())]
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
        raise wrong from None
    return [_resource(material) for material in materials if material.uri or material.sha256]


def _resource(material: Material) -> dict[str, Any]:
    """A material as in-toto's ResourceDescriptor (attestation, spec/v1/resource_descriptor.md)."""
    resource: dict[str, Any] = {"name": material.name, "annotations": {"version": material.version}}
    if material.uri:
        resource["uri"] = material.uri
    if material.sha256:
        resource["digest"] = {"sha256": material.sha256}
    if material.installed:
        resource["annotations"]["installed_sha256"] = material.installed
    return resource


def seal(content: Mapping[str, Any], key: ec.EllipticCurvePrivateKey) -> bytes:
    """The statement in its envelope, without a key id: DSSE does not sign the id, so nobody could trust it."""
    payload = json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()
    sig = signature.sign(encoded(PAYLOAD_TYPE, payload), key).decode().strip()
    envelope = {
        "payloadType": PAYLOAD_TYPE,
        "payload": base64.b64encode(payload).decode(),
        "signatures": [{"sig": sig}],
    }
    return json.dumps(envelope, separators=(",", ":")).encode()


def open_envelope(data: bytes, trusted: Sequence[signature.TrustedKey], sha256: str, what: object) -> dict[str, Any]:
    """The statement in an envelope. Its signature is checked before the payload is parsed.

    Args:
        sha256: the artifact's.
        what: what errors call the envelope.

    Raises:
        SignatureError: it is damaged, not signed by a trusted key, or about another artifact.
    """
    wrong = SignatureError(f"{what}: wanted a DSSE envelope, found something else")
    try:
        envelope = json.loads(data)
    except (ValueError, RecursionError):
        raise wrong from None
    if not isinstance(envelope, dict) or envelope.keys() != {"payloadType", "payload", "signatures"}:
        raise wrong
    text, signatures = envelope["payload"], envelope["signatures"]
    if envelope["payloadType"] != PAYLOAD_TYPE or not isinstance(text, str) or not isinstance(signatures, list):
        raise wrong
    try:
        payload = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise wrong from None
    if base64.b64encode(payload).decode() != text:
        raise wrong
    _check_any(encoded(PAYLOAD_TYPE, payload), signatures, trusted, what)
    return _about(payload, sha256, what)


def _check_any(data: bytes, signatures: list[Any], trusted: Sequence[signature.TrustedKey], what: object) -> None:
    failed = SignatureError(f"{what}: wanted a DSSE envelope with a signature, found none")
    for one in signatures[:10]:
        if (
            not isinstance(one, dict)
            or not {"sig"} <= one.keys() <= {"sig", "keyid"}
            or not isinstance(one["sig"], str)
        ):
            continue  # a broken signature does not hide a valid one
        try:
            signature.check(data, one["sig"].encode("utf-8", "replace"), trusted, what)
            return
        except SignatureError as error:
            failed = error
    raise failed


def _about(payload: bytes, sha256: str, what: object) -> dict[str, Any]:
    try:
        content = json.loads(payload)
        types = (content["_type"], content["predicateType"])
        subjects = [subject["digest"].get("sha256") for subject in content["subject"]]
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
        raise SignatureError(f"{what}: wanted an in-toto statement, found something else") from None
    if types != (STATEMENT_TYPE, PREDICATE_TYPE):
        raise SignatureError(f"{what}: wanted {STATEMENT_TYPE} with {PREDICATE_TYPE}, found {types}")
    if sha256 not in subjects:
        raise SignatureError(
            f"{what}: it is about another artifact\nwanted: sha256 {sha256}\nfound:  {str(subjects)[:200]}",
            hint="sign the artifact again, or remove the other artifact's statement",
        )
    return dict(content)


def signed_on(content: Mapping[str, Any]) -> datetime | None:
    """When a statement was signed; None where it does not say so."""
    try:
        text = content["predicate"]["runDetails"]["metadata"][SIGNED_ON]
        return datetime.strptime(text, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC)
    except (KeyError, TypeError, ValueError):
        return None


def check_report_beside(path: Path, content: Mapping[str, Any]) -> str | None:
    """The name of the verification report that a statement lists; None where no report is listed or there is none.

    Raises:
        SignatureError: the report beside the artifact is not the one that was signed.
    """
    report_path = _report_path(path)
    try:
        listed = {item["name"]: item["digest"]["sha256"] for item in content["predicate"]["runDetails"]["byproducts"]}
    except (KeyError, TypeError):
        return None
    report = read_beside(report_path, MAX_REPORT_BYTES)
    if report_path.name not in listed or report is None:
        return None
    signed, digest = listed[report_path.name], hashlib.sha256(report).hexdigest()
    if digest != signed:
        raise SignatureError(
            f"{report_path}: not the report that was signed\nwanted: sha256 {signed}\nfound:  {digest}"
        )
    return report_path.name


def _check_report(path: Path, report: bytes, sha256: str) -> None:
    try:
        verified = json.loads(report)["artifact"]["sha256"]
    except (ValueError, RecursionError, KeyError, TypeError):
        raise ArtifactError(f"{path}: wanted a report of cachebuilder verify, found something else") from None
    if verified != sha256:
        raise ArtifactError(
            f"{path}: it is about another artifact\nwanted: sha256 {sha256}\nfound:  {verified}",
            hint="verify again, or remove the report",
        )


def _report_path(path: Path) -> Path:
    return path.with_name(path.name + REPORT_SUFFIX)


def _digest(data: bytes) -> dict[str, str]:
    return {"sha256": hashlib.sha256(data).hexdigest()}
