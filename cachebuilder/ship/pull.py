"""Artifacts out of a registry: what a reference stands for, which of it fits, and its bytes with their signature."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cachebuilder.artifact.index import Index
from cachebuilder.common.files import write_atomically
from cachebuilder.errors import CompatibilityError, RestoreError, SignatureError, TransferError
from cachebuilder.restoring.compatibility import Difference
from cachebuilder.ship.description import BESIDE, SIGNATURE, TITLE, Described, read_description
from cachebuilder.ship.documents import INDEX, MANIFEST, Descriptor, Manifest, annotations_of, entries
from cachebuilder.ship.download import RemoteFile, download
from cachebuilder.ship.locations import Reference
from cachebuilder.ship.registry import Repository
from cachebuilder.ship.retry import Retries

#: Entries of an index that are looked at one by one, where the index itself does not say what they are.
_MAX_LOOKED_AT = 100
#: Signatures of one artifact: a few keys', and somebody else's noise.
_MAX_SIGNATURES = 20
_FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}\.tar\.zst")

#: How an artifact differs from this machine, by its index; nothing that causes a miss: it fits.
Compare = Callable[[Index], list[Difference]]

#: Given an artifact's file and what belongs beside it, by suffix: raises `SignatureError` where they do not say that
#: somebody who is trusted made it.
Check = Callable[[Path, dict[str, bytes]], object]


@dataclass(frozen=True)
class Candidate:
    """An artifact that a reference stands for: its image, and what that says of it."""

    reference: Reference
    described: Described

    def __str__(self) -> str:
        of = self.described.index
        return f"{of.name}, {of.recorded['gpu'] or of.fingerprint.arch}, {self.reference}"


@dataclass(frozen=True)
class Listing:
    """What a reference stands for: the digest of its image or index, and the artifacts in it."""

    reference: Reference
    digest: str
    candidates: tuple[Candidate, ...]


@dataclass(frozen=True)
class Choice:
    """The artifact that is taken, and why others before it are not."""

    candidate: Candidate
    differences: list[Difference] = field(default_factory=list)
    refused: list[tuple[Candidate, list[Difference]]] = field(default_factory=list)


class Puller:
    """Reads one repository."""

    def __init__(self, reference: Reference, retries: Retries) -> None:
        self._reference = reference
        self._retries = retries
        self._repository = Repository(reference, retries)

    def look_up(self) -> Listing:
        """What the reference stands for now. All else is asked for by digest: a tag that moves mixes nothing.

        Raises:
            TransferError: it cannot be had, is hostile, or has no artifact in it.
        """
        what = str(self._reference)
        found = self._repository.manifest(self._reference.tag_or_digest)
        candidates: dict[str, Candidate] = {}
        for digest, told in self._described(found, what):
            described = read_description(told, what)
            if described is not None:  # of the platforms of one artifact the first will do
                candidates.setdefault(described.digest, Candidate(self._reference.at(digest), described))
        if not candidates:
            raise TransferError(
                f"{what}: wanted an artifact, or an index of some; nothing in it says that it is one",
                hint="cachebuilder push writes them",
            )
        return Listing(self._reference, found.digest, tuple(candidates.values()))

    def _described(self, found: Manifest, what: str) -> list[tuple[str, dict[str, str]]]:
        if found.media_type != INDEX and "manifests" not in found.document:
            return [(found.digest, annotations_of(found.document))]
        listed = [entry for entry in entries(found, what) if entry.media_type == MANIFEST]
        told = [(entry.digest, dict(entry.annotations)) for entry in listed]
        if any(read_description(said, what) for _, said in told) or not told:
            return told
        # Another tool made the index of our images: they say it themselves.
        if len(told) > _MAX_LOOKED_AT:
            raise TransferError(f"{what}: wanted an index that says what is in it, or one of {_MAX_LOOKED_AT} entries")
        return [(digest, annotations_of(self._repository.manifest(digest, what).document)) for digest, _ in told]

    def fetch(self, candidate: Candidate, to: Callable[[str], Path], check: Check | None = None) -> Path:
        """Fetch an artifact, with its signature and what else is signed beside it; returns its file.

        Args:
            to: the file for an artifact of this name.
            check: of several signatures the first that passes is kept; with no check, the newest.

        Raises:
            SignatureError: ``check`` takes none of them.
            TransferError: it cannot be had, or is not what was asked for.
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
                f"{what}: its annotations are of another artifact than its first layer\n"
                f"wanted: {candidate.described.digest}\nfound:  {layer.digest}",
                hint="push it again",
            )
        title = layer.annotations.get(TITLE, "")
        path = to(title if _FILE.fullmatch(title) else f"{layer.digest[7:19]}.tar.zst")
        attached = self._signatures(candidate.reference)

        def accept(whole: Path) -> None:
            put_beside(path, self._first_that_passes(whole, attached, check))

        remote = RemoteFile(
            what,
            layer.size,
            version=layer.digest,
            sha256=layer.digest.removeprefix("sha256:"),
            read=lambda offset: self._repository.blob(layer, offset, what),
        )
        download(remote, path, self._retries, accept)
        return path

    def _signatures(self, reference: Reference) -> list[Descriptor]:
        """What is attached and says that it is a signature, the newest first."""
        attached = self._repository.referrers(str(reference.digest))
        return [one for one in reversed(attached) if one.artifact_type in (SIGNATURE, None)][:_MAX_SIGNATURES]

    def _first_that_passes(self, whole: Path, attached: Sequence[Descriptor], check: Check | None) -> dict[str, bytes]:
        failed: SignatureError | None = None
        for one in attached:
            if not (files := self._files(one)):
                continue
            try:
                if check is not None:
                    check(whole, files)
                return files
            except SignatureError as error:
                failed = error
        if failed is not None:
            raise failed
        if check is not None:
            check(whole, {})
        return {}

    def _files(self, attached: Descriptor) -> dict[str, bytes]:
        """Suffix and bytes of what belongs beside an artifact."""
        what = f"what is attached to {self._reference}"
        document = self._repository.manifest(attached.digest, what).document
        layers = document.get("layers")
        if document.get("artifactType") != SIGNATURE or not isinstance(layers, list):
            return {}
        kinds = {media_type: (suffix, most) for suffix, (media_type, most) in BESIDE.items()}
        found = {}
        for value in layers[: len(kinds)]:
            blob = Descriptor.parse(value, what)
            if blob.media_type in kinds:
                suffix, most = kinds[blob.media_type]
                found[suffix] = self._repository.small_blob(blob, most, what)
        return found


def put_beside(path: Path, files: dict[str, bytes]) -> None:
    """What belongs beside an artifact, by suffix, and nothing of an older one."""
    for suffix in BESIDE:
        beside = path.with_name(path.name + suffix)
        if suffix in files:
            write_atomically(beside, files[suffix], RestoreError)
        else:
            beside.unlink(missing_ok=True)


def choose(listing: Listing, compare: Compare, force: bool = False) -> Choice:
    """The first artifact that fits; with ``force``, the first if none does.

    Raises:
        CompatibilityError: none fits.
    """
    refused: list[tuple[Candidate, list[Difference]]] = []
    for candidate in listing.candidates:
        found = compare(candidate.described.index)
        if not any(difference.causes_miss for difference in found):
            return Choice(candidate, found, refused)
        refused.append((candidate, found))
    if force:
        candidate, found = refused.pop(0)
        return Choice(candidate, found, refused)
    raise CompatibilityError(
        "\n".join(explain(candidate, found) for candidate, found in refused),
        hint=f"name one by its digest: {listing.candidates[0].reference}",
    )


def explain(candidate: Candidate, differences: Sequence[Difference]) -> str:
    """Why an artifact is refused, as a person reads it."""
    lines = [f"{candidate} does not fit this environment:"]
    return "\n".join([*lines, *(f"  {line}" for difference in differences for line in difference.lines())])
