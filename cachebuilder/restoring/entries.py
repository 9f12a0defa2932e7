"""Put an artifact where DeepGEMM reads it: checked whole first, then entry by entry, each by one rename.

DIR afterwards::

    cache/<entry>/…                          what DeepGEMM reads
    cachebuilder/bin/nvcc, version.txt       the frozen nvcc and its text
    cachebuilder/artifacts/<digest>.<sha>.json, .yaml    each restored artifact's index and manifest, written last

Nothing is flushed to the disk: a killed process leaves whole entries only, and a serving image or an init container
has no use for more; after a power cut, restore into a fresh DIR. (DeepGEMM reads entries through the page cache.)
"""

from __future__ import annotations

import contextlib
import io
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cachebuilder.artifact.index import Entry, Fingerprint, Index
from cachebuilder.artifact.read import Archive, open_archive
from cachebuilder.common.files import make_folders, write_atomically
from cachebuilder.cuda.nvml import VisibleGpu
from cachebuilder.deepgemm import entries as entry_files
from cachebuilder.deepgemm.installation import Installation
from cachebuilder.errors import CompatibilityError, RestoreError
from cachebuilder.restoring import frozen
from cachebuilder.restoring.compatibility import Difference, with_environment
from cachebuilder.restoring.destination import Destination
from cachebuilder.restoring.folder import own_files

if TYPE_CHECKING:  # not imported where no key is given
    from cachebuilder.artifact.signature import TrustedKey

#: DeepGEMM hands paths below DIR to a shell with no quotes around them.
_PLAIN_PATH = re.compile(r"[\w./+@,=-]+")

#: Said where no key is given to check with.
UNCHECKED = "unchecked origin, no --trust KEY.pub was given; whoever made this file decides what runs"


@dataclass(frozen=True)
class Restored:
    """What a restore did.

    Attributes:
        dir: DIR, absolute.
        index: the artifact's, with the entries' names as restored.
        artifact: the one that was taken.
        refused: the others that were given and do not fit, each with the reasons.
        differences: of the one taken: worth knowing, or overruled by force.
        written: entries made.
        skipped: entries that were there already, equal.
        relocated: legacy entries were renamed for this install path.
        signed_by: the trusted key that signed it; None where no key was given to check with.
    """

    dir: Path
    index: Index
    artifact: Path
    refused: list[tuple[Path, list[Difference]]]
    differences: list[Difference]
    written: int
    skipped: int
    relocated: bool
    signed_by: TrustedKey | None = None


def restore(
    artifacts: Sequence[Path],
    to: Path,
    installation: Installation | None,
    gpu: VisibleGpu | None = None,
    force: bool = False,
    trust: Sequence[TrustedKey] | None = None,
) -> Restored:
    """Restore the first of ``artifacts`` that fits this environment into ``to``.

    The environment is compared before anything is written, and the whole archive is checked before anything becomes
    visible to DeepGEMM; where it fails, ``to`` is as before.

    Args:
        installation: the DeepGEMM that will read the cache; None where none was found, which only ``force`` accepts.
        gpu: the GPU, where one is visible.
        force: take the first artifact, whatever differs.
        trust: keys, by one of which each artifact must be signed; None to take any. The signatures of all are checked
            before anything is decompressed or parsed, and what is parsed are the bytes that were checked.

    Raises:
        SignatureError: an artifact is not signed by a trusted key, or what lies beside it as provenance is not.
        CompatibilityError: none fits, or the entries cannot be relocated.
        ArtifactError: an artifact is damaged or hostile.
        RestoreError: a different entry is in ``to``, or it cannot be written.
    """
    to = Path(os.path.abspath(to))
    refused: list[tuple[Path, list[Difference]]] = []
    taken: Restored | None = None
    if trust is not None:
        for path in artifacts[1:]:  # before the first is written; again when their turn comes
            _checked(path, trust)
    for path in artifacts:
        with _opened(path, trust) as (archive, key):
            nvcc = str(frozen.frozen_nvcc(to))
            found = with_environment(archive.index, installation, gpu, os.environ, relocates=True, frozen_nvcc=nvcc)
            fits = not any(difference.causes_miss for difference in found)
            if not fits and not (force and taken is None):
                refused.append((path, found))
            elif taken is None:
                written, skipped, index = _restore(archive, to, installation)
                relocated = index.fingerprint.install_include != archive.index.fingerprint.install_include
                taken = Restored(to, index, path, refused, found, written, skipped, relocated, key)
    if taken is None:
        raise CompatibilityError(
            "\n".join(explain(path, found) for path, found in refused),
            hint="--force restores all the same; DeepGEMM will not find the kernels then",
        )
    return taken


@contextlib.contextmanager
def _opened(path: Path, trust: Sequence[TrustedKey] | None) -> Iterator[tuple[Archive, TrustedKey | None]]:
    """The artifact, and who signed it."""
    if trust is None:
        with open_archive(path) as archive:
            yield archive, None
    else:
        data, key = _checked(path, trust)
        yield Archive(io.BytesIO(data), path), key


def _checked(path: Path, trust: Sequence[TrustedKey]) -> tuple[bytes, TrustedKey]:
    from cachebuilder.artifact import (
        provenance,
        signature,  # import cryptography
    )

    signed = signature.read_signed(path, trust)
    provenance.read_statement(signed, trust)
    return signed.data, signed.key


def explain(path: Path, differences: Sequence[Difference]) -> str:
    """The differences as a person reads them."""
    lines = [f"{path} does not fit this environment:"]
    lines += [f"  {line}" for difference in differences for line in difference.lines()]
    return "\n".join(lines)


def _restore(archive: Archive, to: Path, installation: Installation | None) -> tuple[int, int, Index]:
    names = _Names(archive.index, installation)
    skipped: list[str] = []
    different: list[str] = []
    try:
        _check_destination(to, archive.index.fingerprint)
        with Destination(to) as destination:
            there = destination.entries()
            for entry, file, data in archive.files():
                if file.name == entry_files.SOURCE:
                    name = names.add(entry, data)
                    if name in there:
                        (skipped if destination.holds(name, entry) else different).append(name)
                    else:
                        destination.new(name)
                if (name := names.of[entry.name]) not in there:
                    destination.write(name, file.name, data)
            if different:
                raise _different(to, different)
            index = names.index()
            taken_meanwhile = destination.publish({names.of[entry.name]: entry for entry in archive.index.entries})
            if lost := [name for name, equal in taken_meanwhile.items() if not equal]:
                raise _different(to, lost)
            written = len(destination.made) - len(taken_meanwhile)
            here = names.index_bytes(archive.index_bytes)
            for name, (data, mode) in own_files(index, archive.index_bytes, archive.manifest, here).items():
                make_folders((to / name).parent)
                write_atomically(to / name, data, RestoreError, mode)
            destination.keep()
    except OSError as error:
        named = error.filename2 or error.filename  # of a rename: where to
        where = named if isinstance(named, str) and named.startswith("/") else to
        raise RestoreError(f"{where}: cannot be written: {error.strerror}") from error
    return written, len(archive.index.entries) - written, index


def _check_destination(to: Path, fingerprint: Fingerprint) -> None:
    """Raises `RestoreError` where DeepGEMM could not use the folder, or it serves another compiler's kernels."""
    if not _PLAIN_PATH.fullmatch(str(to)):
        raise RestoreError(
            f"{to}: wanted a path of letters, digits and ./_+@,=- only",
            hint="DeepGEMM hands it to a shell with no quotes, and splits lists of roots at ':'",
        )
    with contextlib.suppress(NotADirectoryError):
        text = frozen.version_text(to)
        if text is not None and text != fingerprint.compiler:
            raise RestoreError(
                f"{to}: its frozen nvcc speaks for another compiler\nwanted: {_last(fingerprint.compiler)}\n"
                f"found:  {_last(text)}",
                hint="restore into another folder: one root serves one compiler",
            )


def _last(text: str) -> str:
    return (text.strip().splitlines() or [""])[-1]


def _different(to: Path, names: Sequence[str]) -> RestoreError:
    more = f", and {len(names) - 3} more" if len(names) > 3 else ""
    return RestoreError(
        f"{to}: wanted no entry or an equal one, found a different {', '.join(sorted(names)[:3])}{more}",
        hint="restore into a fresh folder, or remove the entry if it is yours to remove",
    )


class _Names:
    """Each entry's name in DIR: as packed, or for a legacy cache that moves, what DeepGEMM will look for."""

    def __init__(self, index: Index, installation: Installation | None) -> None:
        self._index = index
        self.of: dict[str, str] = {}
        self._new: Fingerprint | None = None
        fingerprint = index.fingerprint
        if fingerprint.generation != "legacy" or installation is None or installation.generation != "legacy":
            return
        include = str(installation.include)
        if include == fingerprint.install_include:
            return
        old, flags = f"-I{fingerprint.install_include}", (fingerprint.legacy_flags or "").split(" ")
        release = re.search(r"release (\d+\.\d+)", fingerprint.compiler)
        if flags.count(old) != 1 or release is None:
            raise CompatibilityError(
                f"cannot be relocated: wanted one {old} among the flags and nvcc's release, "
                f"found {fingerprint.legacy_flags!r}"
            )
        self._release = release[1]
        new_flags = " ".join(f"-I{include}" if flag == old else flag for flag in flags)
        self._new = fingerprint.model_copy(update={"install_include": include, "legacy_flags": new_flags})

    def add(self, entry: Entry, source: bytes) -> str:
        """Take an entry; returns its name in DIR. Raises `CompatibilityError` where the formula does not hold."""
        name = entry.name
        if self._new is not None:
            old = self._index.fingerprint
            kernel = entry_files.kernel_name("legacy", name) or ""
            as_built = entry_files.legacy_entry(kernel, self._release, old.legacy_flags or "", source)
            if as_built != name:
                raise CompatibilityError(
                    "cannot be relocated to this install path, the names do not follow from the sources\n"
                    f"wanted: {as_built}\nfound:  {name}",
                    hint=f"restore where DeepGEMM's headers are in {old.install_include}, or build for this machine",
                )
            name = entry_files.legacy_entry(kernel, self._release, self._new.legacy_flags or "", source)
        self.of[entry.name] = name
        return name

    def index_bytes(self, packed: bytes) -> bytes:
        """The index for DIR; as packed where nothing moved, since writing 1,000 kernels' JSON takes a while."""
        return packed if self._new is None else self.index().model_dump_json(exclude_none=True).encode() + b"\n"

    def index(self) -> Index:
        """The index as restored."""
        if self._new is None:
            return self._index
        entries = [entry.model_copy(update={"name": self.of[entry.name]}) for entry in self._index.entries]
        return self._index.model_copy(
            update={
                "fingerprint": self._new,
                "fingerprint_digest": self._new.digest(),
                "entries": tuple(sorted(entries, key=lambda entry: entry.name)),
            }
        )
