"""Put an artifact where DeepGEMM reads it: checked whole first, then entry by entry, each by one rename.

DIR afterwards::

    cache/<entry>/…                          what DeepGEMM reads
    flashinfer/cache, modules, python, tmp   what FlashInfer reads, where the artifact has something for it
    baked/<compiler>/…, baked.json           what the engine's other compilers read, where the artifact has it
    cachebuilder/bin/nvcc, version.txt       the frozen nvcc and its text
    cachebuilder/artifacts/<digest>.<sha>.json, .yaml    each restored artifact's index and manifest, written last

Entries are not flushed to the disk. A killed restore still leaves whole entries only, since DeepGEMM reads them through
the page cache. After a power cut, restore into a fresh DIR.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from cachebuilder.artifact.baked import BakedFile, BakedPart
from cachebuilder.artifact.index import CACHE, Entry, Fingerprint, FlashInferPart, Index
from cachebuilder.artifact.read import Archive
from cachebuilder.artifact.trust import Trust
from cachebuilder.artifact.whole import open_file
from cachebuilder.common.folders import WrongFile
from cachebuilder.deepgemm import entries as entry_files
from cachebuilder.errors import ArtifactError, RestoreError
from cachebuilder.restoring import baked, damage, frozen
from cachebuilder.restoring.compatibility import Difference
from cachebuilder.restoring.destination import Destination
from cachebuilder.restoring.flashinfer_files import STAND_IN, stand_in_of
from cachebuilder.restoring.folder import own_files
from cachebuilder.restoring.machine import Compared, Machine, choose
from cachebuilder.restoring.relocation import Relocation

if TYPE_CHECKING:  # imports cryptography
    from cachebuilder.artifact.signature import TrustedKey

#: DeepGEMM puts paths below DIR on a shell's command line without quotes.
_PLAIN_PATH = re.compile(r"[\w./+@,=-]+")
#: How the fields of baked caches are called in differences.
_BAKED = "baked: "


@dataclass(frozen=True)
class Restored:
    """What a restore did.

    Attributes:
        dir: absolute.
        index: the artifact's, with the entries' names as restored.
        artifact: the one that was taken.
        differences: how that one differs: worth knowing, or overruled by force.
        others: the artifacts that were not taken, in the order given.
        written: entries made.
        skipped: entries that were already there, with equal bytes.
        relocated: legacy entries were renamed for this install path.
        baked: caches of the engine's other compilers that are in DIR now; None where none were restored.
        signed_by: the trusted key that signed it; None where no key was given to check with.
    """

    dir: Path
    index: Index
    artifact: Path
    differences: tuple[Difference, ...]
    others: tuple[Compared[Path], ...]
    written: int
    skipped: int
    relocated: bool
    baked: BakedPart | None
    signed_by: TrustedKey | None


def restore(
    artifacts: Sequence[str | Path],
    to: str | Path,
    *,
    machine: Machine | None = None,
    trust: Trust | None = None,
    force: bool = False,
    with_baked: bool = True,
) -> Restored:
    """Restore the first of ``artifacts`` that fits a machine into ``to``, beside a frozen nvcc.

    Every artifact is checked and compared before anything is written: all signatures, then all indexes, then that the
    files are whole. Nothing becomes visible to DeepGEMM before every byte of the one that is taken has been checked.
    If the restore fails, ``to`` is as it was. ``to`` may be in use.

        restored = restore(["small.tar.zst"], "/opt/deep_gemm", trust=Trust.load(["team.pub"]))
        print(restored.index.name, restored.written, "kernels")

    Args:
        artifacts: the artifacts' files, at least one; the first that fits is taken.
        to: the folder that DeepGEMM will read; made if it does not exist.
        machine: what will serve; default: this machine with the DeepGEMM that is installed.
        trust: the keys, one of which must have signed each artifact; None takes artifacts of any origin.
        force: take the first artifact where none fits: DeepGEMM will then not find its kernels. And write into folders
            of another user, who can exchange what DeepGEMM loads.
        with_baked: restore the caches of the engine's other compilers as well, if the artifact has them. They are of
            use in the folder where they were baked only.

    Raises:
        SignatureError: an artifact is not signed by a trusted key, or its provenance is not valid.
        CompatibilityError: none fits, or the entries cannot be relocated.
        ArtifactError: an artifact cannot be read, or is damaged or hostile, or there is none.
        RestoreError: ``to`` holds a different entry, is another user's, or cannot be written.
        InstallationError: the DeepGEMM is incomplete.
    """
    if not artifacts:
        raise ArtifactError("wanted at least one artifact, found none")
    to = Path(os.path.abspath(to))
    machine = machine or Machine.here()
    nvcc = frozen.frozen_nvcc(to)
    with contextlib.ExitStack() as stack:
        paths = [Path(artifact) for artifact in artifacts]
        files = [stack.enter_context(_checked(path, trust)) for path in paths]
        archives = [Archive(file, path) for path, (file, _) in zip(paths, files, strict=True)]
        compared = [
            Compared(
                path,
                (
                    *machine.differences(archive.index, relocates=True, frozen_nvcc=nvcc),
                    *(_baked_differences(archive.index.baked, to) if with_baked else ()),
                ),
            )
            for path, archive in zip(paths, archives, strict=True)
        ]
        hint = "--force restores the first one all the same; DeepGEMM will not find its kernels then"
        for archive, one in zip(archives, compared, strict=True):
            of_baked = [difference for difference in one.differences if difference.field.startswith(_BAKED)]
            if of_baked and archive.index.baked:
                where = archive.index.baked.record.dir
                others = "" if len(of_baked) == len(one.differences) else f"; {hint}"
                hint = f"restore --to {where}, where it was baked, or leave that out with --no-baked{others}"
                break
        choice = choose(compared, force=force, hint=hint)
        position = compared.index(choice)
        for other in archives[:position] + archives[position + 1 :]:
            other.drain()
        archive = archives[position]
        part = archive.index.baked if with_baked else None
        relocation = Relocation(archive.index, machine.installation)
        written, index = _restore(archive, Destination(to, force), relocation, part)
    return Restored(
        dir=to,
        index=index,
        artifact=choice.artifact,
        differences=choice.differences,
        others=tuple(one for one in compared if one is not choice),
        written=written,
        skipped=sum(map(len, index.folders.values())) - written,
        relocated=index is not archive.index,
        baked=part,
        signed_by=files[position][1],
    )


@contextlib.contextmanager
def _checked(path: Path, trust: Trust | None) -> Iterator[tuple[BinaryIO, TrustedKey | None]]:
    """An artifact's bytes, and who signed them; with ``trust``, exactly the bytes whose signature was checked."""
    if trust is None:
        with open_file(path) as file:
            yield file, None
    else:
        signed = trust.check_file(path)
        yield io.BytesIO(signed.data), signed.key


def _baked_differences(part: BakedPart | None, to: Path) -> list[Difference]:
    """What would make the engine compile again in ``to``, as far as it is known here."""
    if part is None:
        return []
    remedy = "keys of baked caches hold it: make it equal, bake again, or leave these caches out with --no-baked"
    return [
        Difference(f"{_BAKED}{name}", wanted, found, True, remedy)
        for name, wanted, found in baked.differences(part.record, to)
    ]


def _restore(
    archive: Archive, destination: Destination, relocation: Relocation, part: BakedPart | None
) -> tuple[int, Index]:
    """Write an artifact; returns how many entries were written, and the index as restored."""
    to = destination.to
    _check_path(to)
    different: list[str] = []
    try:
        with destination:
            _check_compiler(destination, archive.index.fingerprint)
            _check_flashinfer(destination, archive.index.flashinfer)
            new_baked = part if part and not _has_baked(destination, part) else None
            present = destination.entries(*archive.index.folders)
            entries: dict[str, Entry] = {}
            for member, data in archive.files():
                if member.folder == CACHE and member.file.name == entry_files.SOURCE:
                    relocation.add(member.entry, data)
                path = f"{member.folder}/{relocation.name(member)}"
                if path not in entries:
                    entries[path] = member.entry
                    if path not in present:
                        destination.new(path)
                    elif not destination.holds(path, member.entry):
                        different.append(path)
                if path not in present:
                    destination.write(path, member.file.name, data)
            _write_baked(archive, destination, new_baked)
            if different:
                raise _different(to, different)
            made_by_others = destination.publish(entries)
            if different := [name for name, equal in made_by_others.items() if not equal]:
                raise _different(to, different)
            if new_baked and not destination.publish_baked(new_baked.record.to_json().encode() + b"\n"):
                _has_baked(destination, new_baked)
            index, index_bytes = relocation.index(), relocation.index_bytes(archive.index_bytes)
            own = own_files(index, archive.index_bytes, archive.manifest, index_bytes)
            for name, (data, mode) in own.items():
                destination.write_own(name, data, mode)
            destination.keep()
    except OSError as error:
        named = error.filename2 or error.filename  # for a rename, the new name
        where = named if isinstance(named, str) and named.startswith("/") else to
        if isinstance(error, WrongFile):
            hint = "remove it, or restore into another folder; only DIR itself may be a link"
            raise RestoreError(f"{where}: {error.strerror}", hint=hint) from error
        raise RestoreError(f"{where}: cannot be written: {error.strerror}") from error
    return len(destination.made) - len(made_by_others), index


def _check_path(to: Path) -> None:
    """Raise `RestoreError` where DeepGEMM could not use the path."""
    if not _PLAIN_PATH.fullmatch(str(to)):
        raise RestoreError(
            f"{to}: wanted a path of letters, digits and ./_+@,=- only",
            hint="DeepGEMM puts it on a shell's command line without quotes, and splits lists of roots at ':'",
        )


def _check_compiler(destination: Destination, fingerprint: Fingerprint) -> None:
    """Raise `RestoreError` where the folder holds another compiler's kernels."""
    text = destination.version_text()
    if text is not None and text != fingerprint.compiler:
        raise RestoreError(
            f"{destination.to}: its frozen nvcc answers for another compiler\n"
            f"wanted: {_last_line(fingerprint.compiler)}\nfound:  {_last_line(text)}",
            hint="restore into another folder: one root serves one compiler",
        )


def _check_flashinfer(destination: Destination, part: FlashInferPart | None) -> None:
    """Raise `RestoreError` where the folder holds what was built from another FlashInfer."""
    present = destination.read_own(STAND_IN)
    if part is None or present is None or present == stand_in_of(part):
        return
    raise RestoreError(
        f"{destination.to}: wanted what is built from FlashInfer {part.fingerprint.version}, or nothing of FlashInfer; "
        "found what is built from another",
        hint="restore into another folder: FlashInfer's names do not say what they are built from",
    )


def _has_baked(destination: Destination, part: BakedPart) -> bool:
    """Whether the folder has these baked caches already. Raises `RestoreError` where it has others."""
    folder = destination.with_baked()
    if folder is None:
        return False
    own = folder.path / baked.FOLDER
    if baked.read(folder.path) != part.record:
        why = "caches that were baked by another command or elsewhere"
    elif different := damage.in_baked(folder, part):
        why = f"a different {different[0].file or different[0].entry}"
    else:
        return True
    raise RestoreError(
        f"{own}: wanted no baked caches or equal ones, found {why}",
        hint="remove it if it is yours to remove, restore into a fresh folder, or restore with --no-baked",
    )


def _write_baked(archive: Archive, destination: Destination, part: BakedPart | None) -> None:
    """Write the baked caches into the working folder. Without ``part``, they are only checked."""
    files: dict[str, list[BakedFile]] = {}
    for file in part.files if part else ():
        files.setdefault(file.sha256, []).append(file)
    for sha256, data in archive.baked_files():
        for file in files.get(sha256, ()):
            destination.write_baked(file, data)


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or [""])[-1]


def _different(to: Path, names: Sequence[str]) -> RestoreError:
    more = f", and {len(names) - 3} more" if len(names) > 3 else ""
    shown = ", ".join(name.removeprefix(f"{CACHE}/") for name in sorted(names)[:3])
    return RestoreError(
        f"{to}: wanted no entry or an equal one, found a different {shown}{more}",
        hint="restore into a fresh folder, or remove the entry if it is yours to remove",
    )
