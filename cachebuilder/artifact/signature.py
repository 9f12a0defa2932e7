"""Who made an artifact: ECDSA P-256 signatures over its raw bytes, checked before anything in it is read.

The signature lies beside the artifact as ``ARTIFACT.sig``, base64 of the DER ECDSA-SHA256 signature: what
``cosign sign-blob`` writes and ``openssl dgst -sha256 -verify`` takes once decoded. The provenance (`provenance.py`)
lies beside both as ``ARTIFACT.intoto.json``. All cryptography is the package `cryptography`'s.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from cachebuilder.artifact.index import SIGNATURE_SUFFIX
from cachebuilder.artifact.whole import read_beside, read_bytes
from cachebuilder.common.files import write_new, writing
from cachebuilder.errors import SignatureError

#: The signature lies beside the artifact, under its name and this.
SUFFIX = SIGNATURE_SUFFIX

#: A key in PEM, or a signature: both are under 1 kB.
_MAX_SMALL_BYTES = 16 << 10

_ALGORITHM = ec.ECDSA(hashes.SHA256())


@dataclass(frozen=True)
class TrustedKey:
    """A public key whose signatures are believed, and the file it came from."""

    path: Path
    key: ec.EllipticCurvePublicKey

    @property
    def fingerprint(self) -> str:
        """``sha256:`` and the digest of the key's SubjectPublicKeyInfo in DER, as `openssl pkey -pubin` gives it."""
        return f"sha256:{hashlib.sha256(_public_bytes(self.key, serialization.Encoding.DER)).hexdigest()}"


# Keys


def generate_key(path: Path, passphrase: bytes | None = None) -> Path:
    """Make a key pair: the private key at ``path``, 0600, PKCS #8 in PEM; the public key beside it as ``.pub``.

    Args:
        passphrase: what to encrypt the private key with; None for not at all.

    Returns:
        The public key's file, SubjectPublicKeyInfo in PEM.

    Raises:
        SignatureError: either file is there already, or cannot be written.
    """
    public = path.with_suffix(".pub")
    if public == path:
        raise SignatureError(f"{path}: wanted another name: the public key will be {public}")
    if passphrase == b"":
        raise SignatureError("wanted a passphrase, found an empty one")
    key = ec.generate_private_key(ec.SECP256R1())
    private_bytes = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(passphrase) if passphrase else serialization.NoEncryption(),
    )
    _write_key(path, private_bytes, 0o600)
    try:
        _write_key(public, _public_bytes(key.public_key(), serialization.Encoding.PEM), 0o644)
    except SignatureError:
        path.unlink()
        raise
    return public


def is_encrypted(path: Path) -> bool:
    """Whether a private key wants a passphrase. Raises `SignatureError` where the file cannot be read."""
    return b"ENCRYPTED" in _pem(path)


def load_key(path: Path, passphrase: bytes | None = None) -> ec.EllipticCurvePrivateKey:
    """The private key in a PEM file, of `generate_key` or of ``openssl genpkey``.

    Raises:
        SignatureError: no such key, or not with this passphrase.
    """
    data = _pem(path)
    try:
        key = serialization.load_pem_private_key(data, passphrase)
    except (TypeError, ValueError, UnsupportedAlgorithm) as error:
        why = "the passphrase is wrong, or missing" if b"ENCRYPTED" in data else str(error).splitlines()[0]
        raise SignatureError(f"{path}: wanted an ECDSA P-256 private key in PEM: {why}") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP256R1):
        raise SignatureError(f"{path}: wanted an ECDSA P-256 key, found {_kind(key)}", hint=_KEYGEN)
    return key


def load_trusted(paths: Sequence[Path]) -> tuple[TrustedKey, ...]:
    """The public keys in PEM files, one each. Raises `SignatureError` for a file that holds anything else."""
    return tuple(_load_trusted(path) for path in paths)


def _load_trusted(path: Path) -> TrustedKey:
    data = _pem(path)
    if b"PRIVATE KEY" in data:
        raise SignatureError(
            f"{path}: wanted a public key, found a private one",
            hint="give the .pub beside it, and keep the private key away from machines that only check",
        )
    if (count := data.count(b"-----BEGIN ")) != 1:
        raise SignatureError(f"{path}: wanted one public key in PEM, found {count or 'none'}")
    try:
        key = serialization.load_pem_public_key(data)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise SignatureError(f"{path}: wanted a public key in PEM: {str(error).splitlines()[0]}") from None
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise SignatureError(f"{path}: wanted an ECDSA P-256 key, found {_kind(key)}", hint=_KEYGEN)
    return TrustedKey(path, key)


_KEYGEN = "make one with cachebuilder keygen"


# Signing and checking


def sign(data: bytes, key: ec.EllipticCurvePrivateKey) -> bytes:
    """A signature of ``data`` as it is written beside an artifact: base64 of its DER, and a newline."""
    return base64.b64encode(key.sign(data, _ALGORITHM)) + b"\n"


def check(data: bytes, signature: bytes, trusted: Sequence[TrustedKey], what: object) -> TrustedKey:
    """The first trusted key whose signature of ``data`` this is.

    Args:
        signature: base64, in lines or not, as `sign`, cosign and ``openssl base64`` write it.
        what: what ``data`` is called in the error.

    Raises:
        SignatureError: it is none of theirs.
    """
    return check_der(data, _decode(signature, what), trusted, what)


def check_der(data: bytes, signature: bytes, trusted: Sequence[TrustedKey], what: object) -> TrustedKey:
    """The same for a signature in DER."""
    for one in trusted:
        try:
            one.key.verify(signature, data, _ALGORITHM)
        except InvalidSignature:
            continue
        return one
    keys = ", ".join(str(one.path) for one in trusted) or "no key"
    raise SignatureError(
        f"{what}: the signature is not valid\nwanted: these bytes, signed with {keys}\n"
        f"found:  sha256 {hashlib.sha256(data).hexdigest()}, changed since, or signed with another key",
        hint="fetch the artifact and its signature again, from where the key's owner put them",
    )


@dataclass(frozen=True)
class Signed:
    """An artifact whose signature has been checked: ``data`` is what was signed, whatever the file holds by now."""

    path: Path
    data: bytes
    sha256: str
    key: TrustedKey


def read_signed(path: Path, trusted: Sequence[TrustedKey], signature: bytes | None = None) -> Signed:
    """Read an artifact once, into memory, and check the signature over those bytes.

    Whoever parses the artifact parses `Signed.data` and not the file: a change between the check and the parsing, of
    the name or of the bytes in place, changes nothing.

    Args:
        signature: the signature in base64; None for the one in ``path``'s `SUFFIX` file.

    Raises:
        SignatureError: unsigned, or not signed by a trusted key.
        ArtifactError: the file cannot be read.
    """
    data = read_bytes(path)
    if signature is None:
        beside = path.with_name(path.name + SUFFIX)
        signature = read_beside(beside, _MAX_SMALL_BYTES)
        if signature is None:
            raise SignatureError(
                f"{path}: not signed: there is no {beside.name} beside it",
                hint=f"cachebuilder sign {path} --key KEY.pem, where it was built",
            )
    key = check(data, signature, trusted, path)
    return Signed(path, data, hashlib.sha256(data).hexdigest(), key)


def _decode(signature: bytes, what: object) -> bytes:
    """The one spelling of base64 that its encoder writes, in lines or not: no two texts are one signature."""
    text = signature.translate(None, b"\r\n")
    try:
        found = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        found = b""
    if not found or base64.b64encode(found) != text:
        raise SignatureError(
            f"{what}: wanted a signature in base64, found something else",
            hint="openssl base64 -A makes one of a signature in DER",
        )
    return found


def _pem(path: Path) -> bytes:
    data = read_beside(path, _MAX_SMALL_BYTES)
    if data is None:
        raise SignatureError(f"{path}: wanted a key in PEM, found no file", hint=_KEYGEN)
    return data


def _kind(key: object) -> str:
    name = type(key).__name__.removesuffix("PublicKey").removesuffix("PrivateKey")
    return str(key.curve.name) if hasattr(key, "curve") else name


def _public_bytes(key: ec.EllipticCurvePublicKey, encoding: serialization.Encoding) -> bytes:
    return key.public_bytes(encoding, serialization.PublicFormat.SubjectPublicKeyInfo)


def _write_key(path: Path, data: bytes, mode: int) -> None:
    with writing(path, SignatureError):
        try:
            write_new(str(path), data, mode)
        except FileExistsError:
            raise SignatureError(
                f"{path}: wanted no file, found one: a key is never overwritten", hint="choose another name"
            ) from None
