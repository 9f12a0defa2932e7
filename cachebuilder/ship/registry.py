"""A repository in an OCI registry: the requests of distribution-spec 1.1 that push and pull need.

https://github.com/opencontainers/distribution-spec/blob/v1.1.0/spec.md
"""

from __future__ import annotations

from collections.abc import Iterator

import requests

from cachebuilder.errors import TransferError
from cachebuilder.ship import credentials
from cachebuilder.ship.documents import (
    INDEX,
    MANIFEST,
    MAX_MANIFEST_BYTES,
    Descriptor,
    Manifest,
    digest_of,
    entries,
    index_document,
    read_manifest,
    wrong_digest,
)
from cachebuilder.ship.locations import Reference, is_digest
from cachebuilder.ship.retry import Retries
from cachebuilder.ship.session import Request, Session, parts, read
from cachebuilder.ship.upload import Upload

#: Docker's names for the two, accepted because some registries convert ours.
_DOCKER = (
    "application/vnd.docker.distribution.manifest.v2+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
)
#: The answers of registries that do not know the path of referrers, or do not allow it.
_NO_REFERRERS = (400, 403, 404, 405, 406, 501)


class Repository:
    """One repository. Every call but `blob` is tried again where that may help.

    Raises:
        TransferError: from every call: the registry cannot be reached, refuses, or sends something else than requested.
    """

    def __init__(self, reference: Reference, retries: Retries) -> None:
        self.reference = reference
        self._retries = retries
        host = "registry-1.docker.io" if reference.host == "docker.io" else reference.host
        base = f"{'http' if reference.plain else 'https'}://{host}"
        self._session = Session(base, lambda: credentials.find(reference.host), retries.patience)
        self._path = f"/v2/{reference.name}"

    # Reading

    def manifest(self, tag_or_digest: str, what: str | None = None) -> Manifest:
        """A manifest or an index. One that is requested by digest has that digest."""
        manifest = self._manifest(tag_or_digest, what or str(self.reference))
        if manifest is None:
            raise TransferError(f"{self.reference}: not found", hint="check the repository and the tag or digest")
        return manifest

    def _manifest(self, tag_or_digest: str, what: str) -> Manifest | None:
        """As `manifest`; None if the repository does not have it."""
        headers = {"Accept": ", ".join((INDEX, MANIFEST, *_DOCKER))}
        url = f"{self._path}/manifests/{tag_or_digest}"
        request = Request("GET", url, what, accept=(200, 404), headers=headers, most=MAX_MANIFEST_BYTES)

        def get() -> Manifest | None:
            response = self._session.send(request)
            if response.status_code == 404:
                response.close()
                return None
            manifest = _read_manifest(response, what)
            if is_digest(tag_or_digest) and manifest.digest != tag_or_digest:
                raise wrong_digest(what, tag_or_digest, manifest.digest)
            stated = response.headers.get("Docker-Content-Digest")
            if is_digest(stated) and manifest.digest != stated:
                raise wrong_digest(
                    f"{what}, whose digest the registry states as {stated}", str(stated), manifest.digest
                )
            return manifest

        return self._retries.run(get)

    def blob(self, blob: Descriptor, offset: int, what: str) -> tuple[int, Iterator[bytes]]:
        """A blob's bytes from ``offset`` on, in one try; their digest is not checked.

        Returns:
            The offset at which the bytes begin, and the bytes. The offset is 0 if the registry takes no offsets.

        Raises:
            Again: from the call or from reading the bytes: the connection broke.
        """
        url = f"{self._path}/blobs/{blob.digest}"
        headers = {"Range": f"bytes={offset}-"} if offset else None
        request = Request("GET", url, what, accept=(200, 206, 416), headers=headers, most=blob.size)
        response = self._session.send(request)
        if response.status_code == 206 and response.headers.get("Content-Range", "").startswith(f"bytes {offset}-"):
            return offset, parts(response, what)
        if response.status_code != 200:
            response.close()
            response = self._session.send(Request("GET", url, what, most=blob.size))
        return 0, parts(response, what)

    def small_blob(self, blob: Descriptor, most: int, what: str) -> bytes:
        """The bytes of a blob of at most ``most`` bytes; their digest is checked."""
        if blob.size > most:
            raise TransferError(f"{what}: wanted at most {most} bytes, found {blob.size}")
        request = Request("GET", f"{self._path}/blobs/{blob.digest}", what, most=most)
        data = self._retries.run(lambda: read(self._session.send(request), most, what))
        if (digest := digest_of(data)) != blob.digest:
            raise wrong_digest(what, blob.digest, digest)
        return data

    def referrers(self, digest: str) -> list[Descriptor]:
        """The manifests that refer to a manifest, by the registry's API or, without one, by the tag in its place."""
        what = f"what is attached to {self.reference.at(digest)}"
        url, accept = f"{self._path}/referrers/{digest}", (200, *_NO_REFERRERS)
        request = Request("GET", url, what, accept, headers={"Accept": INDEX}, most=MAX_MANIFEST_BYTES)

        def get() -> Manifest | None:
            response = self._session.send(request)
            if response.status_code != 200:
                response.close()
                return None
            return _read_manifest(response, what)

        index = self._retries.run(get) or self._manifest(_referrers_tag(digest), what)
        return entries(index, what, skip_broken=True) if index else []

    # Writing

    def push_blob(self, blob: Descriptor, data: bytes, step: str) -> None:
        """Send a blob if the repository lacks it; ``step`` is the name under which progress is reported."""
        progress = self._retries.watcher.progress
        request = Request("HEAD", f"{self._path}/blobs/{blob.digest}", str(self.reference), accept=(200, 404))
        if self._retries.run(lambda: self._session.send_unread(request)).status_code == 404:
            what = f"push to {self.reference}"
            upload = Upload(self._session, f"{self._path}/blobs/uploads/", blob.digest, data, what)
            self._retries.run(lambda: upload.send(step, progress))
        progress(step, blob.size, blob.size)

    def push_manifest(self, data: bytes, media_type: str, tag_or_digest: str) -> requests.Response:
        """Put a manifest or an index under a tag or under its digest; returns the registry's answer."""
        what = f"push to {self.reference}"
        url, headers = f"{self._path}/manifests/{tag_or_digest}", {"Content-Type": media_type}
        request = Request("PUT", url, what, accept=(201, 202), headers=headers, body=lambda: data)
        response = self._retries.run(lambda: self._session.send_unread(request))
        stored_digest = response.headers.get("Docker-Content-Digest")
        if is_digest(stored_digest) and stored_digest != digest_of(data):
            raise wrong_digest(what, digest_of(data), str(stored_digest))
        return response

    def push_referrer(self, data: bytes, subject: Descriptor, entry: Descriptor) -> None:
        """Put a manifest that refers to ``subject``, so that `referrers` finds it.

        Args:
            entry: the manifest's own descriptor, as `referrers` returns it.
        """
        response = self.push_manifest(data, MANIFEST, entry.digest)
        if "OCI-Subject" in response.headers:
            return
        # The registry has no API of referrers, so the client keeps the list (distribution-spec, "Referrers Tag
        # Schema"). Two clients at once may undo each other's entry: look again after each write.
        tag, what = _referrers_tag(subject.digest), f"what is attached to {self.reference.at(subject.digest)}"
        for _ in range(5):
            index = self._manifest(tag, what)
            listed = entries(index, what) if index else []
            if entry.digest in [other.digest for other in listed]:
                return
            self.push_manifest(index_document([*listed, entry]), INDEX, tag)
        raise TransferError(f"{what}: another push writes the list at the same time", hint="push again")


def _read_manifest(response: requests.Response, what: str) -> Manifest:
    data = read(response, MAX_MANIFEST_BYTES, what)
    return read_manifest(data, response.headers.get("Content-Type", ""), what)


def _referrers_tag(digest: str) -> str:
    return digest.replace(":", "-")
