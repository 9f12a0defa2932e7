"""Artifacts out of a registry: which ones a reference stands for, and the bytes of one with its signature."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from cachebuilder.errors import SignatureError, TransferError
from cachebuilder.ship.description import BESIDE, SIGNATURE, TITLE, Described, read_description
from cachebuilder.ship.documents import INDEX, MANIFEST, Descriptor, Manifest, annotations_of, entries
from cachebuilder.ship.download import RemoteFile, Target, download
from cachebuilder.ship.locations import Reference
from cachebuilder.ship.registry import Repository
from cachebuilder.ship.retry import Retries

#: How many entries of an index are fetched to see what they are, where the index itself does not say it.
_MAX_LOOKED_AT = 100
#: How many attachments are tried: the signatures of a few keys, and whatever others attached.
_MAX_SIGNATURES = 20
_FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}\.tar\.zst")

#: Given an artifact's bytes and the files beside it, by suffix: raises `SignatureError` if no trusted key signed it.
Check = Callable[[bytes, dict[str, bytes]], object]


@dataclass(frozen=True)
class Candidate:
    """An artifact that a reference stands for: the reference of its image, and the image's annotations."""

    reference: Reference
    described: Described

    def __str__(self) -> str:
        described = self.described
        return f"{described.name}, {described.gpu or described.fingerprint.arch}, {self.reference}"


class Puller:
    """Reads one repository."""

    def __init__(self, reference: Reference, retries: Retries) -> None:
        self._reference = reference
        self._retries = retries
        self._repository = Repository(reference, retries)

    def look_up(self) -> tuple[Candidate, ...]:
        """The artifacts that the reference stands for now, at least one.

        Everything else is then asked for by digest, so a tag may move meanwhile.

        Raises:
            TransferError: it cannot be fetched, is hostile, or has no artifact in it.
        """
        what = str(self._reference)
        manifest = self._repository.manifest(self._reference.tag_or_digest)
        candidates: dict[str, Candidate] = {}
        for digest, texts in self._annotated(manifest, what):
            described = read_description(texts, what)
            if described is not None:  # the images of one artifact for several platforms count once
                candidates.setdefault(described.digest, Candidate(self._reference.at(digest), described))
        if not candidates:
            raise TransferError(
                f"{what}: wanted an artifact or an index of artifacts, found no annotation of one",
                hint="cachebuilder push writes artifacts with annotations",
            )
        return tuple(candidates.values())

    def _annotated(self, manifest: Manifest, what: str) -> list[tuple[str, dict[str, str]]]:
        """Digest and annotations of each image in a manifest or an index."""
        if manifest.media_type != INDEX and "manifests" not in manifest.document:
            return [(manifest.digest, annotations_of(manifest.document))]
        listed = [entry for entry in entries(manifest, what) if entry.media_type == MANIFEST]
        annotated = [(entry.digest, dict(entry.annotations)) for entry in listed]
        if any(read_description(texts, what) for _, texts in annotated) or not annotated:
            return annotated
        # Another tool made the index of our images: the annotations are in the images themselves.
        if len(annotated) > _MAX_LOOKED_AT:
            raise TransferError(
                f"{what}: wanted an index with annotations, or of at most {_MAX_LOOKED_AT} entries, "
                f"found {len(annotated)} entries without"
            )
        return [(digest, annotations_of(self._repository.manifest(digest, what).document)) for digest, _ in annotated]

    def fetch(self, candidate: Candidate, to: Callable[[str], Target], check: Check | None = None) -> Path:
        """Fetch an artifact and the files beside it; returns its file.

        Args:
            to: given the artifact's file name, says where to write it.
            check: checks the artifact with one signature; the first signature that passes is kept. Without a check
                the newest is kept.

        Raises:
            SignatureError: no signature passes ``check``.
            TransferError: it cannot be fetched, or is not what was asked for.
            RestoreError: it cannot be written.
        """
        what = str(candidate.reference)
        manifest = self._repository.manifest(candidate.reference.tag_or_digest, what)
        layers = manifest.document.get("layers")
        if not isinstance(layers, list) or not layers:
            raise TransferError(f"{what}: wanted an image with the artifact as its first layer, found no layer")
        layer = Descriptor.parse(layers[0], what)
        if layer.digest != candidate.described.digest:
            raise TransferError(
                f"{what}: its annotations are those of another artifact than its first layer\n"
                f"wanted: {candidate.described.digest}\nfound:  {layer.digest}",
                hint="push it again",
            )
        title = layer.annotations.get(TITLE, "")
        attached = self._signatures(candidate.reference)
        remote = RemoteFile(
            what,
            layer.size,
            version=layer.digest,
            sha256=layer.digest.removeprefix("sha256:"),
            read=lambda offset: self._repository.blob(layer, offset, what),
        )
        with to(title if _FILE.fullmatch(title) else f"{layer.digest[7:19]}.tar.zst") as target:

            def accept(whole: BinaryIO) -> None:
                put_beside(target, self._first_that_passes(whole, attached, check))

            download(remote, target, self._retries, accept)
            return target.path

    def _signatures(self, reference: Reference) -> list[Descriptor]:
        """The attachments that may be signatures, the newest first."""
        attached = self._repository.referrers(str(reference.digest))
        return [one for one in reversed(attached) if one.artifact_type in (SIGNATURE, None)][:_MAX_SIGNATURES]

    def _first_that_passes(
        self, whole: BinaryIO, attached: Sequence[Descriptor], check: Check | None
    ) -> dict[str, bytes]:
        """The files of the newest attachment that passes; a broken attachment does not hide a valid one."""
        data = whole.read() if check is not None else b""
        failed: SignatureError | TransferError | None = None
        for one in attached:
            try:
                if not (files := self._files(one)):
                    continue
                if check is not None:
                    check(data, files)
                return files
            except (SignatureError, TransferError) as error:
                failed = error
        if failed is not None:
            raise failed
        if check is not None:
            check(data, {})
        return {}

    def _files(self, attached: Descriptor) -> dict[str, bytes]:
        """The files in an attachment, by suffix; none where it is not a signature."""
        what = f"attachment to {self._reference}"
        document = self._repository.manifest(attached.digest, what).document
        layers = document.get("layers")
        if document.get("artifactType") != SIGNATURE or not isinstance(layers, list):
            return {}
        kinds = {media_type: (suffix, most) for suffix, (media_type, most) in BESIDE.items()}
        files = {}
        for value in layers[: len(kinds)]:
            blob = Descriptor.parse(value, what)
            if blob.media_type in kinds:
                suffix, most = kinds[blob.media_type]
                files[suffix] = self._repository.small_blob(blob, most, what)
        return files


def put_beside(target: Target, files: dict[str, bytes]) -> None:
    """Write the files beside an artifact, given by suffix, and remove those of an older artifact."""
    for suffix in BESIDE:
        if suffix in files:
            target.folder.write(target.name + suffix, files[suffix], 0o644)
        else:
            with contextlib.suppress(FileNotFoundError):
                target.folder.unlink(target.name + suffix)
