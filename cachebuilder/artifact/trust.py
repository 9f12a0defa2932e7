"""Whom an artifact must come from: the one place that decides whether its signature and its statement are believed.

`cryptography` is imported only where a key is given.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from cachebuilder.artifact.index import PROVENANCE_SUFFIX, SIGNATURE_SUFFIX
from cachebuilder.artifact.whole import read_beside, read_bytes
from cachebuilder.errors import SignatureError

if TYPE_CHECKING:  # imports cryptography
    from cachebuilder.artifact.signature import TrustedKey

#: The most bytes of each file that is checked beside an artifact.
_MAX_BYTES = {SIGNATURE_SUFFIX: 16 << 10, PROVENANCE_SUFFIX: 1 << 20}


@dataclass(frozen=True)
class Signed:
    """An artifact whose signature has been checked.

    Attributes:
        data: the bytes that were signed, whatever the file holds by now: parse these and not the file.
        statement: the signed provenance; None where only the artifact is signed.
    """

    data: bytes
    sha256: str
    key: TrustedKey
    statement: dict[str, Any] | None


@dataclass(frozen=True)
class Trust:
    """Public keys: an artifact is taken only if one of them signed it, and its provenance where it has one."""

    keys: tuple[TrustedKey, ...]

    @classmethod
    def load(cls, paths: Sequence[str | Path]) -> Self:
        """The public keys in PEM files, one each. Raises `SignatureError` for a file that holds anything else."""
        from cachebuilder.artifact.signature import load_trusted

        return cls(load_trusted(list(map(Path, paths))))

    def check_file(self, path: Path) -> Signed:
        """Read an artifact once, into memory, and check it with the signature and the statement beside it.

        Raises:
            SignatureError: it is unsigned, not signed by a trusted key, or its statement is damaged, signed by
                another key or about another artifact.
            ArtifactError: the file cannot be read.
        """
        data = read_bytes(path)
        attached = {}
        for suffix, most in _MAX_BYTES.items():
            content = read_beside(path.with_name(path.name + suffix), most)
            if content is not None:
                attached[suffix] = content
        return self.check(data, attached, path)

    def check(self, data: bytes, attached: Mapping[str, bytes], what: object) -> Signed:
        """The same for an artifact's bytes and what is attached to them.

        Args:
            attached: the signature and the statement, each by its file's suffix; other files are ignored.
            what: what errors call the artifact.
        """
        from cachebuilder.artifact import provenance, signature

        if SIGNATURE_SUFFIX not in attached:
            raise SignatureError(
                f"{what}: not signed: wanted a signature beside it, found none",
                hint="cachebuilder sign ARTIFACT --key KEY.pem where it was built; then push it, if it was pushed",
            )
        key = signature.check(data, attached[SIGNATURE_SUFFIX], self.keys, what)
        sha256 = hashlib.sha256(data).hexdigest()
        statement = None
        if PROVENANCE_SUFFIX in attached:
            envelope = attached[PROVENANCE_SUFFIX]
            statement = provenance.open_envelope(envelope, self.keys, sha256, f"{what}: provenance")
        return Signed(data, sha256, key, statement)

    def has(self, fingerprint: str | None) -> bool:
        """Whether a key of this fingerprint is trusted; None, which stands for an unchecked artifact, is not."""
        return any(key.fingerprint == fingerprint for key in self.keys)
