"""Keys and signatures: ECDSA P-256 over an artifact's raw bytes. `trust.py` decides whose signature is believed.

The signature lies beside the artifact as ``ARTIFACT.sig``: base64 of the ECDSA-SHA256 signature in DER, which is what
``cosign sign-blob`` writes, and what ``openssl dgst -sha256 -verify`` takes once it is decoded. The package
`cryptography` does all cryptography.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import hashlib
import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from cachebuilder.artifact.whole import open_file, read_open
from cachebuilder.common.files import writing
from cachebuilder.common.folders import write_new
from cachebuilder.errors import ArtifactError, SignatureError

#: A key in PEM has under 1 kB.
_MAX_KEY_BYTES = 16 << 10

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
    """Make a key pair: the private key at ``path`` (PKCS #8 in PEM, mode 0600), the public key beside it as ``.pub``.

    Args:
        passphrase: encrypts the private key; None leaves it unencrypted.

    Returns:
        The public key's file, SubjectPublicKeyInfo in PEM.

    Raises:
        SignatureError: either file exists already or cannot be written.
    """
    public = path.with_suffix(".pub")
    if public == path:
        raise SignatureError(f"{path}: wanted a name that does not end with .pub: the public key gets that name")
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
    """Whether a private key needs a passphrase. Raises `SignatureError` where the file cannot be read."""
    return b"ENCRYPTED" in _pem(path)


def load_key(path: Path, passphrase: bytes | None = None) -> ec.EllipticCurvePrivateKey:
    """The private key in a PEM file, of `generate_key` or of ``openssl genpkey``.

    Raises:
        SignatureError: the file holds no such key, other users can read it, or this passphrase does not decrypt it.
    """
    data = _pem(path, private=True)
    try:
        key = serialization.load_pem_private_key(data, passphrase)
    except (TypeError, ValueError, UnsupportedAlgorithm) as error:
        why = "the passphrase is wrong or missing" if b"ENCRYPTED" in data else str(error).splitlines()[0]
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
            hint="name the .pub beside it, and keep the private key away from machines that only check signatures",
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
    """A signature of ``data`` as it is written beside an artifact: its DER in base64, and a newline."""
    return base64.b64encode(key.sign(data, _ALGORITHM)) + b"\n"


def check(data: bytes, signature: bytes, trusted: Sequence[TrustedKey], what: object) -> TrustedKey:
    """The first trusted key that made this signature of ``data``.

    Args:
        signature: base64, in one line or several, as `sign`, cosign and ``openssl base64`` write it.
        what: what the error calls ``data``.

    Raises:
        SignatureError: no trusted key made it.
    """
    der = _decode(signature, what)
    for one in trusted:
        try:
            one.key.verify(der, data, _ALGORITHM)
        except InvalidSignature:
            continue
        return one
    keys = ", ".join(str(one.path) for one in trusted) or "no key"
    raise SignatureError(
        f"{what}: the signature is not valid\nwanted: these bytes, signed with {keys}\n"
        f"found:  sha256 {hashlib.sha256(data).hexdigest()}, changed since it was signed, or signed with another key",
        hint="fetch the artifact and its signature again, from where the key's owner put them",
    )


def _decode(signature: bytes, what: object) -> bytes:
    """The DER in base64. Only the spelling that an encoder writes is taken, so no two texts are one signature."""
    text = signature.translate(None, b"\r\n")
    try:
        der = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        der = b""
    if not der or base64.b64encode(der) != text:
        raise SignatureError(
            f"{what}: wanted a signature in base64, found something else",
            hint="openssl base64 -A encodes a signature in DER",
        )
    return der


def _pem(path: Path, private: bool = False) -> bytes:
    """A key's file. As ssh does, a private key is taken only if no other user can read or change it."""
    if not os.path.lexists(path):
        raise SignatureError(f"{path}: wanted a key in PEM, found no file", hint=_KEYGEN)
    try:
        with open_file(path) as file:
            status = os.fstat(file.fileno())
            if private and status.st_mode & 0o077:
                raise SignatureError(
                    f"{path}: wanted a private key that only you can read, found mode {status.st_mode & 0o777:04o}",
                    hint=f"chmod 600 {shlex.quote(str(path))}; if others could read it for long, make a new key",
                )
            return read_open(path, file.fileno(), _MAX_KEY_BYTES)
    except ArtifactError as error:
        raise SignatureError(str(error)) from None


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
        except OSError:  # a full disk: an empty key would be in the way of the next try
            with contextlib.suppress(OSError):
                path.unlink()
            raise
