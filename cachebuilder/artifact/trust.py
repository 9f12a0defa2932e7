"""Whom an artifact must come from: the one place that decides whether its signature and its statement are believed.

`cryptography` is imported only where a key is given.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from cachebuilder.artifact.index import PROVENANCE_SUFFIX, SIGNATURE_SUFFIX
from cachebuilder.artifact.read import Archive
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
    """Public keys, and which artifacts to take of those that they signed.

    An artifact is taken only if one of the keys signed it, and its provenance where it has one. A signature stays valid
    for ever, and a key may sign many artifacts: a name and a time refuse another one, and an older one, in its place.

    Attributes:
        name: the name that an artifact must have; None for any.
        not_before: artifacts that were signed earlier are refused, and those whose provenance does not say when; None
            takes any. It is compared with the time in the signed provenance, by the signer's clock.
    """

    keys: tuple[TrustedKey, ...]
    name: str | None = None
    not_before: datetime | None = None

    @classmethod
    def load(cls, paths: Sequence[str | Path], *, name: str | None = None, not_before: datetime | None = None) -> Self:
        """The public keys in PEM files, one each; the other arguments are as of `Trust`.

        Raises:
            SignatureError: a file holds anything else, or ``not_before`` has no time zone.
        """
        from cachebuilder.artifact.signature import load_trusted

        if not_before is not None and not_before.tzinfo is None:
            raise SignatureError(f"wanted a time with its time zone, found {not_before}")
        return cls(load_trusted(list(map(Path, paths))), name, not_before)

    def check_file(self, path: Path) -> Signed:
        """Read an artifact once, into memory, and check it with the signature and the statement beside it.

        Raises:
            SignatureError: it is unsigned, not signed by a trusted key, or not the one that is wanted; or its statement
                is damaged, signed by another key or about another artifact.
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
        self._check_wanted(data, statement, what)
        return Signed(data, sha256, key, statement)

    def _check_wanted(self, data: bytes, statement: Mapping[str, Any] | None, what: object) -> None:
        """Raise `SignatureError` where an artifact has another name, or was signed too early. Both facts are signed."""
        from cachebuilder.artifact import provenance

        if self.name is not None:
            name = Archive(io.BytesIO(data), Path(str(what))).index.name
            if name != self.name:
                raise SignatureError(
                    f"{what}: a trusted key signed it, but it is another artifact\nwanted: {self.name}\nfound:  {name}",
                    hint="fetch the one that is wanted, or correct --name",
                )
        if self.not_before is not None:
            signed_on = provenance.signed_on(statement) if statement is not None else None
            if signed_on is None or signed_on < self.not_before:
                when = f"signed at {signed_on:%Y-%m-%dT%H:%M:%SZ}" if signed_on else "no signed provenance with a time"
                raise SignatureError(
                    f"{what}: a trusted key signed it, but too early or without a time\n"
                    f"wanted: signed at {self.not_before.astimezone(UTC):%Y-%m-%dT%H:%M:%SZ} or later\nfound:  {when}",
                    hint="fetch the current one; to go back to an older one, sign that one again",
                )
