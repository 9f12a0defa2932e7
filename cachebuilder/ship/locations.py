"""Locations of artifacts: a path, an object in a store (``s3://…``), or a reference in a registry (``oci://…``)."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass, replace

from cachebuilder.errors import TransferError

# Host, name, tag and digest: distribution-spec 1.1, "Pulling manifests", and docker's reference grammar.
_HOST = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9.-]*[A-Za-z0-9])?(?::[0-9]{1,5})?|\[[0-9a-fA-F:]+\](?::[0-9]{1,5})?")
_NAME = re.compile(r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*(?:/[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*)*")
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_MAX_NAME = 255
# RFC 3986, 3.2.1 and 3.4: what stands before the host, and what stands behind the path.
_USER = re.compile(r"://[^/?#\s]*@")
_QUERY = re.compile(r"(://[^?#\s]*)\?[^#\s]*")

#: ``oci+http`` is a registry without TLS. On loopback addresses, ``oci`` means the same.
_OCI = ("oci", "oci+http")


@dataclass(frozen=True)
class Reference:
    """An image in a registry.

    Attributes:
        host: with the port, if the reference has one.
        digest: ``sha256:…`` of the manifest or index.
        plain: whether the registry is spoken to without TLS.
    """

    host: str
    name: str
    tag: str | None
    digest: str | None
    plain: bool

    def __str__(self) -> str:
        scheme = "oci+http" if self.plain and not _is_loopback(self.host) else "oci"
        tag = f":{self.tag}" if self.tag else ""
        digest = f"@{self.digest}" if self.digest else ""
        return f"{scheme}://{self.host}/{self.name}{tag}{digest}"

    @property
    def tag_or_digest(self) -> str:
        """What a request to the registry names: the digest if there is one, else the tag."""
        return self.digest or str(self.tag)

    def at(self, digest: str) -> Reference:
        """Another manifest of the same repository."""
        return replace(self, tag=None, digest=digest)


def is_oci(text: str) -> bool:
    """Whether ``text`` names something in a registry."""
    return text.startswith(tuple(f"{scheme}://" for scheme in _OCI))


def is_digest(text: object) -> bool:
    """Whether this is ``sha256:`` and 64 hexadecimal digits in lower case."""
    return isinstance(text, str) and _DIGEST.fullmatch(text) is not None


def parse(text: str) -> Reference:
    """The reference in ``oci://HOST/NAME:TAG``, ``…@sha256:…``, or both. Raises `TransferError` for another text."""
    if "@" in (authority := text.partition("://")[2].partition("/")[0]):
        raise TransferError(
            f"wanted a registry's host, found {authority.rpartition('@')[2]} with a user in front",
            hint="remove the user; credentials come from docker's config, which docker login HOST writes",
        )
    text = shown(text)
    scheme, _, rest = text.partition("://")
    rest, _, digest = rest.partition("@")
    host, _, name = rest.partition("/")
    name, _, tag = name.partition(":")
    hint = "as in oci://registry.example/team/cache:v1, or …/cache@sha256:… to pin the bytes"
    if scheme not in _OCI or not _HOST.fullmatch(host):
        raise TransferError(f"{text}: wanted oci://HOST/NAME:TAG", hint=hint)
    if not _NAME.fullmatch(name) or len(name) > _MAX_NAME:
        raise TransferError(f"{text}: wanted a repository's name in lower case, found {name!r}", hint=hint)
    if tag and not _TAG.fullmatch(tag):
        raise TransferError(f"{text}: wanted a tag of letters, digits, '.', '_' and '-', found {tag!r}", hint=hint)
    if digest and not is_digest(digest):
        raise TransferError(f"{text}: wanted @sha256: and 64 hexadecimal digits, found {digest!r}", hint=hint)
    if not tag and not digest:
        raise TransferError(f"{text}: wanted a tag or a digest, found neither", hint=hint)
    return Reference(host, name, tag or None, digest or None, scheme == "oci+http" or _is_loopback(host))


def is_text(text: str) -> bool:
    """Whether it can be encoded; what JSON or a header gave may hold half a character."""
    return text.encode(errors="ignore").decode() == text


def shown(text: str) -> str:
    """A location, or a text with some, as messages and records hold it: without users, passwords and signed queries."""
    return _QUERY.sub(r"\1?…", _USER.sub("://", text))


def printable(text: str) -> str:
    """Text of a foreign source, as one short line without control characters."""
    return "".join(c if c.isprintable() else "?" for c in text[:200])


def _is_loopback(host: str) -> bool:
    """Whether the host is this machine, whose registry docker, like us, speaks to without TLS."""
    bare = host[1 : host.index("]")] if host.startswith("[") else host.partition(":")[0]
    try:
        return ipaddress.ip_address(bare).is_loopback
    except ValueError:
        return bare == "localhost"
