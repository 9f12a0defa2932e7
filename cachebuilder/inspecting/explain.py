"""What one kernel of a cache is: its template's arguments in words, what its cubin takes, and who asked for it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from cachebuilder.artifact.index import CACHE, Index
from cachebuilder.cuda.cubin import Resources
from cachebuilder.deepgemm import entries as entry_files
from cachebuilder.deepgemm import environment as variables
from cachebuilder.deepgemm import templates
from cachebuilder.deepgemm.generation import Generation
from cachebuilder.deepgemm.source import Shape, kernel_template, read_shape
from cachebuilder.deepgemm.templates import Parameter
from cachebuilder.errors import ArtifactError
from cachebuilder.inspecting.report.facts import OpFacts, check_selections, gather, op_facts, resources_of
from cachebuilder.planning.selection import Selection
from cachebuilder.restoring.folder import is_restored, open_folder

_GENERATIONS: tuple[Generation, ...] = ("deepjit", "legacy")


@dataclass(frozen=True)
class Asker:
    """One op of one artifact that asks for the kernel."""

    artifact: str
    op: OpFacts
    selection: Selection


@dataclass(frozen=True)
class Explanation:
    """One kernel.

    Attributes:
        where: the folder or the artifact that it was found in.
        template, parameters: what its source instantiates.
        shape: what its source says it was generated for; None where that is not told.
        askers: from the index of the artifact it came in; empty for a kernel that DeepGEMM compiled itself, and for
            one of the manifest's `sources`.
    """

    entry: str
    name: str
    generation: Generation
    where: Path
    template: str | None
    parameters: tuple[Parameter, ...]
    shape: Shape | None
    cubin_bytes: int | None
    resources: Resources | None
    askers: tuple[Asker, ...]


def explain(target: str, inside: Path | None = None) -> Explanation:
    """The kernel called ``target``.

    Args:
        target: an entry's folder, or a key: an entry's name, its 32 digits, or at least the first 4 of them.
        inside: the artifact or the restored folder with that key; left out: the cache roots that DeepGEMM takes here.

    Raises:
        ArtifactError: there is no such kernel, more than one, or it is damaged.
    """
    if inside is None and (Path(target) / entry_files.SOURCE).is_file():
        return _of_folder(Path(target).absolute())
    if inside is not None and not inside.is_dir():
        return _of_artifact(target, inside)
    roots = [inside] if inside else sorted({r for g in _GENERATIONS for r in _roots(g)})
    folders = {path.name: path for root in roots for path in (root / CACHE).glob("*") if path.is_dir()}
    name = _one(
        target,
        folders,
        "the caches " + (", ".join(map(str, roots)) or "here: there are none, HOME is not set"),
        known=inside is not None,
    )
    return _of_folder(folders[name].absolute())


def _roots(generation: Generation) -> Iterable[Path]:
    return variables.cache_roots(generation, os.environ)[1]


def _one(key: str, entries: Iterable[str], where: str, known: bool = True) -> str:
    """The entry that ``key`` means."""
    wanted = re.compile(rf"(.*\.)?{re.escape(key)}[0-9a-f]*" if re.fullmatch("[0-9a-f]{4,32}", key) else re.escape(key))
    found = sorted(entry for entry in entries if wanted.fullmatch(entry))
    if len(found) == 1:
        return found[0]
    if found:
        raise ArtifactError(f"{key}: wanted one kernel, {len(found)} begin so: {', '.join(found[:4])}")
    hint = None if known else f"cachebuilder explain {key} --in ARTIFACT|DIR"
    raise ArtifactError(
        f"{key}: wanted a kernel's folder, its name or the first digits of its key in {where}", hint=hint
    )


def _of_folder(folder: Path) -> Explanation:
    generation = next((g for g in _GENERATIONS if entry_files.kernel_name(g, folder.name)), None)
    if generation is None:
        raise ArtifactError(f"{folder}: wanted the folder of a kernel, as sm90_fp8_gemm_1d2d.<32 digits>")
    root = folder.parent.parent
    indexes = open_folder(root).indexes if folder.parent.name == CACHE and is_restored(root) else []
    try:
        source = (folder / entry_files.SOURCE).read_text(errors="replace")
        binary = (folder / entry_files.CUBIN).read_bytes()
    except OSError as error:
        raise ArtifactError(f"{folder}: {error.filename} cannot be read: {error.strerror}") from error
    return _explanation(
        folder.name,
        generation,
        folder,
        source,
        len(binary),
        resources_of(folder, entry_files.CUBIN, binary),
        _askers(folder, folder.name, indexes),
    )


def _of_artifact(key: str, artifact: Path) -> Explanation:
    facts = gather(artifact)
    kernels = {kernel.entry: kernel for kernel in facts.kernels}
    kernel = kernels[_one(key, kernels, str(artifact))]
    asked = tuple(Asker(facts.name, facts.ops[selection.op], selection) for selection in kernel.selected_by)
    generation: Generation = "legacy" if facts.generation == "legacy" else "deepjit"
    return _explanation(kernel.entry, generation, artifact, kernel.source, kernel.size, kernel.resources, asked)


def _explanation(
    entry: str,
    generation: Generation,
    where: Path,
    source: str,
    cubin_bytes: int | None,
    resources: Resources | None,
    askers: tuple[Asker, ...],
) -> Explanation:
    return Explanation(
        entry=entry,
        name=entry_files.kernel_name(generation, entry) or entry,
        generation=generation,
        where=where,
        template=kernel_template(source),
        parameters=templates.parameters(source),
        shape=read_shape(source),
        cubin_bytes=cubin_bytes,
        resources=resources,
        askers=askers,
    )


def _askers(folder: Path, entry: str, indexes: Iterable[Index]) -> tuple[Asker, ...]:
    found = []
    for index in indexes:
        for selection in (s for listed in index.entries if listed.name == entry for s in listed.selected_by):
            check_selections(folder, len(index.ops), [selection])
            found.append(Asker(index.name, op_facts(index.ops[selection.op]), selection))
    return tuple(found)
