"""What each entry is called in DIR: as packed, or, for a legacy cache that moves, what DeepGEMM will look for there.

A legacy key holds the absolute include path of the DeepGEMM that was built for. The entries' names are computed anew
for the path of the one that serves. First the formula must give every entry's name as packed; else nothing is moved.
"""

from __future__ import annotations

import re

from cachebuilder.artifact.index import CACHE, Entry, Fingerprint, Index, Member
from cachebuilder.deepgemm import entries as entry_files
from cachebuilder.deepgemm.installation import Installation
from cachebuilder.errors import CompatibilityError


class Relocation:
    """The entries' names in DIR, collected as their sources are read.

    Attributes:
        names: each entry's name as packed → its name in DIR.
        moves: whether entries are renamed.
    """

    def __init__(self, index: Index, installation: Installation | None) -> None:
        """Raises `CompatibilityError` where the flags and the compiler do not say how the names are made."""
        self._index = index
        self.names: dict[str, str] = {}
        self._fingerprint, self._release = _relocated(index.fingerprint, installation)
        self.moves = self._fingerprint != index.fingerprint

    def add(self, entry: Entry, source: bytes) -> str:
        """Take an entry with its source; returns its name in DIR.

        Raises:
            CompatibilityError: the entries move, and this one's name does not follow from its source.
        """
        self.names[entry.name] = self._moved(entry.name, source) if self.moves else entry.name
        return self.names[entry.name]

    def name(self, member: Member) -> str:
        """The name of a member's entry in DIR."""
        return self.names[member.entry.name] if member.folder == CACHE else member.entry.name

    def path(self, member: Member) -> str:
        """A member's path below DIR."""
        return f"{member.folder}/{self.name(member)}/{member.file.name}"

    def index(self) -> Index:
        """The index as restored."""
        if not self.moves:
            return self._index
        entries = [entry.model_copy(update={"name": self.names[entry.name]}) for entry in self._index.entries]
        return self._index.model_copy(
            update={
                "fingerprint": self._fingerprint,
                "fingerprint_digest": self._fingerprint.digest(),
                "entries": tuple(sorted(entries, key=lambda entry: entry.name)),
            }
        )

    def index_bytes(self, packed: bytes) -> bytes:
        """The index's bytes for DIR; those of the artifact, ``packed``, where nothing moves."""
        return self.index().model_dump_json(exclude_none=True).encode() + b"\n" if self.moves else packed

    def _moved(self, name: str, source: bytes) -> str:
        old, new = self._index.fingerprint, self._fingerprint
        kernel = entry_files.kernel_name("legacy", name) or ""
        as_built = entry_files.legacy_entry(kernel, self._release, old.legacy_flags or "", source)
        if as_built != name:
            raise CompatibilityError(
                "cannot be relocated to this install path: an entry's name does not follow from its source\n"
                f"wanted: {as_built}\nfound:  {name}",
                hint=f"restore where DeepGEMM's headers are in {old.install_include}, or build for this machine",
            )
        return entry_files.legacy_entry(kernel, self._release, new.legacy_flags or "", source)


def _relocated(fingerprint: Fingerprint, installation: Installation | None) -> tuple[Fingerprint, str]:
    """The fingerprint for the path of ``installation``, and nvcc's release, which is empty where nothing moves."""
    if fingerprint.generation != "legacy" or installation is None or installation.generation != "legacy":
        return fingerprint, ""
    include = str(installation.include)
    if include == fingerprint.install_include:
        return fingerprint, ""
    old, flags = f"-I{fingerprint.install_include}", (fingerprint.legacy_flags or "").split(" ")
    release = re.search(r"release (\d+\.\d+)", fingerprint.compiler)
    if flags.count(old) != 1 or release is None:
        raise CompatibilityError(
            f"cannot be relocated: wanted one {old} among the flags and nvcc's release, "
            f"found {fingerprint.legacy_flags!r}"
        )
    new_flags = " ".join(f"-I{include}" if flag == old else flag for flag in flags)
    return fingerprint.model_copy(update={"install_include": include, "legacy_flags": new_flags}), release[1]
