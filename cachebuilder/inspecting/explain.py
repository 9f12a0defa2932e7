"""Explains one kernel of a cache: its template's arguments in words, what its cubin takes, and which ops ask for it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from cachebuilder.artifact.index import CACHE, FLASHINFER_CACHE, Index
from cachebuilder.common.reading import read_named
from cachebuilder.common.records import Record
from cachebuilder.cuda.cubin import Resources
from cachebuilder.deepgemm import entries as entry_files
from cachebuilder.deepgemm import environment as variables
from cachebuilder.deepgemm import templates
from cachebuilder.deepgemm.generation import Generation
from cachebuilder.deepgemm.source import Shape, kernel_template, read_shape
from cachebuilder.deepgemm.templates import Parameter
from cachebuilder.errors import ArtifactError
from cachebuilder.flashinfer import entries as flashinfer_files
from cachebuilder.inspecting.report.facts import KernelFacts, OpFacts, asked, check_selections, gather, resources_of
from cachebuilder.planning.selection import Range, Selection
from cachebuilder.restoring.folder import is_restored, open_folder

_GENERATIONS: tuple[Generation, ...] = ("deepjit", "legacy")


class Asker(Record):
    """An op of an artifact that asks for the kernel.

    Attributes:
        position: among the artifact's ops.
        shape: the op's fields in one line.
        ranges: the points of ``variable`` that select the kernel.
    """

    artifact: str
    op: str
    position: int
    shape: str
    variable: str
    sm_count: int
    ranges: tuple[Range, ...]


class Explanation(Record):
    """``explain --json``: one kernel.

    Attributes:
        generation: of DeepGEMM's cache; None for a kernel of FlashInfer's GEMM.
        where: the folder or the artifact that holds it.
        template, parameters: what its source instantiates.
        made_for: what its source says it was generated for; None where the source does not say.
        asked_by: from the index of its artifact; empty for a kernel that DeepGEMM compiled itself, and for one of the
            manifest's ``sources``.
    """

    entry: str
    name: str
    generation: Generation | None
    where: str
    template: str | None
    parameters: tuple[Parameter, ...]
    made_for: Shape | None
    cubin_bytes: int | None
    resources: Resources | None
    asked_by: tuple[Asker, ...]


def explain(target: str, inside: Path | None = None) -> Explanation:
    """The kernel called ``target``. Raises `ArtifactError` where no kernel or several are called so, or it is damaged.

    Args:
        target: an entry's folder, or a key: an entry's name, its 32 digits, or at least the first 4 of them.
        inside: the artifact or the restored folder with that key; default: the cache roots that DeepGEMM uses here.
    """
    if inside is None and (Path(target) / entry_files.SOURCE).is_file():
        return _in_folder(Path(target).absolute())
    if inside is not None and not inside.is_dir():
        return _in_artifact(target, inside)
    roots = [inside] if inside else sorted({r for g in _GENERATIONS for r in variables.cache_roots(g, os.environ)[1]})
    caches = [root / cache for root in roots for cache in (CACHE, FLASHINFER_CACHE)]
    folders = {path.name: path for cache in caches for path in cache.glob("*") if path.is_dir()}
    where = "the caches " + (", ".join(map(str, roots)) or "here: there are none, HOME is not set")
    hint = None if inside else f"cachebuilder explain {target} --in ARTIFACT|DIR"
    return _in_folder(folders[_entry_called(target, folders, where, hint)].absolute())


def _entry_called(key: str, entries: Iterable[str], where: str, hint: str | None = None) -> str:
    """The entry that ``key`` names."""
    pattern = rf"(.*\.)?{re.escape(key)}[0-9a-f]*" if re.fullmatch("[0-9a-f]{4,32}", key) else re.escape(key)
    matches = sorted(entry for entry in entries if re.fullmatch(pattern, entry))
    if len(matches) > 1:
        raise ArtifactError(f"{key}: wanted one kernel, {len(matches)} begin so: {', '.join(matches[:4])}")
    if not matches:
        raise ArtifactError(
            f"{key}: wanted a kernel's folder, its name or the first digits of its key in {where}", hint=hint
        )
    return matches[0]


def _in_folder(folder: Path) -> Explanation:
    of_flashinfer = flashinfer_files.is_entry(folder.name)
    generation = next((g for g in _GENERATIONS if entry_files.kernel_name(g, folder.name)), None)
    if generation is None and not of_flashinfer:
        raise ArtifactError(f"{folder}: wanted the folder of a kernel, as sm90_fp8_gemm_1d2d.<32 digits>")
    cache = FLASHINFER_CACHE if of_flashinfer else CACHE
    root = folder.parents[1 + cache.count("/")]
    indexes = open_folder(root).indexes if folder.parent == root / cache and is_restored(root) else []
    cubin_file = flashinfer_files.CUBIN if of_flashinfer else entry_files.CUBIN
    bounds = flashinfer_files.MAX_BYTES if of_flashinfer else entry_files.MAX_BYTES
    try:
        source = read_named(folder / entry_files.SOURCE, bounds[entry_files.SOURCE]).decode(errors="replace")
        cubin = read_named(folder / cubin_file, bounds[cubin_file])
    except OSError as error:
        raise ArtifactError(f"{folder}: {error.filename} cannot be read: {error.strerror}") from error
    name = (entry_files.kernel_name(generation, folder.name) or "") if generation else flashinfer_files.GEMM_FUNCTION
    kernel = KernelFacts(folder.name, name, "", source, (), len(cubin), resources_of(folder, cubin_file, cubin))
    return _explanation(kernel, generation, folder, _askers(folder, indexes))


def _in_artifact(key: str, artifact: Path) -> Explanation:
    facts = gather(artifact)
    kernels = {kernel.entry: kernel for kernel in facts.kernels}
    kernel = kernels[_entry_called(key, kernels, str(artifact))]
    askers = [_asker(facts.name, facts.ops[selection.op], selection) for selection in kernel.selected_by]
    generation = None if kernel.name == flashinfer_files.GEMM_FUNCTION else facts.generation
    return _explanation(kernel, generation, artifact, askers)


def _explanation(
    kernel: KernelFacts, generation: Generation | None, where: Path, askers: Iterable[Asker]
) -> Explanation:
    return Explanation(
        entry=kernel.entry,
        name=kernel.name or kernel.entry,
        generation=generation,
        where=str(where),
        template=kernel_template(kernel.source),
        parameters=templates.parameters(kernel.source),
        made_for=read_shape(kernel.source),
        cubin_bytes=kernel.size,
        resources=kernel.resources,
        asked_by=tuple(askers),
    )


def _askers(folder: Path, indexes: Iterable[Index]) -> Iterator[Asker]:
    """The ops of these artifacts that ask for the kernel in ``folder``."""
    for index in indexes:
        ops, entries = asked(index)
        for selection in (s for entry, selected_by in entries if entry.name == folder.name for s in selected_by):
            check_selections(folder, len(ops), [selection])
            yield _asker(index.name, ops[selection.op], selection)


def _asker(artifact: str, op: OpFacts, selection: Selection) -> Asker:
    return Asker(
        artifact=artifact,
        op=op.op,
        position=selection.op,
        shape=op.shape,
        variable=op.variable,
        sm_count=selection.sm_count,
        ranges=selection.ranges,
    )
