"""Gathers the facts of a report from an artifact or a plan, and from the files beside it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from pydantic import ValidationError

from cachebuilder.artifact.index import Entry, Index
from cachebuilder.artifact.read import open_archive
from cachebuilder.artifact.whole import read_bytes
from cachebuilder.compiling import record as build_record
from cachebuilder.compiling.record import BuildRecord
from cachebuilder.cuda import cubin
from cachebuilder.cuda.cubin import Resources
from cachebuilder.deepgemm import entries as entry_files
from cachebuilder.deepgemm import templates
from cachebuilder.deepgemm.generation import Generation
from cachebuilder.errors import ArtifactError
from cachebuilder.flashinfer.entries import CUBIN as GEMM_CUBIN
from cachebuilder.flashinfer.entries import GEMM_FUNCTION
from cachebuilder.ops.catalog import OPS
from cachebuilder.planning.plan import Plan
from cachebuilder.planning.selection import Selection
from cachebuilder.restoring.compatibility import Difference, between
from cachebuilder.verifying import report as verified
from cachebuilder.verifying.report import GpuReport


@dataclass(frozen=True)
class KernelFacts:
    """One kernel of DeepGEMM or of FlashInfer's GEMM. A plan has no cubin, so no ``size`` and no ``resources``.

    Attributes:
        digest: of its files; in a plan, of its source.
    """

    entry: str
    name: str
    digest: str
    source: str
    selected_by: tuple[Selection, ...]
    size: int | None = None
    resources: Resources | None = None

    @property
    def short(self) -> str:
        """The first eight digits of the key, as `plan` prints them; of FlashInfer's GEMM, its name's end."""
        return self.entry[-32:][:8] if self.name != GEMM_FUNCTION else self.entry.removeprefix("gemm_")

    @cached_property
    def highlights(self) -> Mapping[str, str]:
        """Block sizes, stages and cluster, as far as the template has them."""
        return templates.highlights(templates.parameters(self.source))


@dataclass(frozen=True)
class OpFacts:
    """One op of the manifest: its name, its shape in a few characters, and the variable that was swept."""

    op: str
    shape: str
    variable: str

    @property
    def title(self) -> str:
        """As ``fp8_gemm_nt n=2112 k=7168``."""
        return f"{self.op} {self.shape}"


@dataclass(frozen=True)
class Facts:
    """An artifact or a plan. A plan has no size, no sha256, no index and no files beside it.

    Attributes:
        ops: the manifest's, then the shapes of FlashInfer's GEMM.
        modules: those of FlashInfer, by name, and their sizes in bytes; in a plan None.
    """

    path: Path
    name: str
    generation: Generation
    gpu: str
    arch: str
    ops: tuple[OpFacts, ...]
    kernels: tuple[KernelFacts, ...]
    modules: Mapping[str, int | None] = field(default_factory=dict)
    size: int | None = None
    sha256: str | None = None
    index: Index | None = None
    build: BuildRecord | None = None
    verified: GpuReport | None = None

    @property
    def kind(self) -> str:
        """``artifact`` or ``plan``."""
        return "plan" if self.sha256 is None else "artifact"

    def kernels_of(self, op: int) -> list[tuple[KernelFacts, Selection]]:
        """The kernels that an op asks for, in the order of the first points that select them."""
        selected = [(kernel, s) for kernel in self.kernels for s in kernel.selected_by if s.op == op]
        return sorted(selected, key=lambda pair: (pair[1].sm_count, pair[0].name, pair[1].ranges[0].first))


@dataclass(frozen=True)
class Changes:
    """What changed since an older artifact or plan.

    Attributes:
        fields: of the fingerprint, ``wanted`` being the old value; none unless both are artifacts.
    """

    old: Facts
    fields: tuple[Difference, ...]
    added: tuple[KernelFacts, ...]
    removed: tuple[KernelFacts, ...]
    changed: tuple[KernelFacts, ...]
    equal: int


def gather(path: Path, verify_report: Path | None = None) -> Facts:
    """Everything about the artifact or the plan (``cachebuilder plan --json``) at ``path``.

    Args:
        verify_report: what ``verify`` wrote; default: the report beside the artifact.

    Raises:
        ArtifactError: it is neither, or damaged; or ``verify_report`` does not exist, or is of another artifact.
    """
    data = read_bytes(path)
    if data.startswith(b"{"):
        return _of_plan(path, data)
    return _of_artifact(path, hashlib.sha256(data).hexdigest(), verify_report)


def compare(old: Facts, new: Facts) -> Changes:
    """What changed from ``old`` to ``new``."""
    before, after = ({kernel.entry: kernel for kernel in facts.kernels} for facts in (old, new))
    both = before.keys() & after.keys()
    comparable = old.kind == new.kind
    changed = {entry for entry in both if comparable and before[entry].digest != after[entry].digest}
    fields = between(old.index.fingerprint, new.index.fingerprint) if old.index and new.index else []
    return Changes(
        old=old,
        fields=tuple(fields),
        added=_named(after, after.keys() - before.keys()),
        removed=_named(before, before.keys() - after.keys()),
        changed=_named(after, changed),
        equal=len(both) - len(changed),
    )


def check_selections(path: Path, op_count: int, selections: Iterable[Selection]) -> None:
    """Raise `ArtifactError` where a selection names an op that does not exist, or no point."""
    for selection in selections:
        if selection.op >= op_count or not selection.ranges:
            raise ArtifactError(
                f"{path}: wanted kernels asked for by ops 0 to {op_count - 1} at some points, found "
                f"ops[{selection.op}] with {len(selection.ranges)} ranges"
            )


def _named(kernels: Mapping[str, KernelFacts], entries: Iterable[str]) -> tuple[KernelFacts, ...]:
    return tuple(kernels[entry] for entry in sorted(entries))


def _of_plan(path: Path, data: bytes) -> Facts:
    try:
        plan = Plan.model_validate_json(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ArtifactError(
            f"{path}: wanted an artifact or a plan, found other JSON: {where}: {first['msg']}",
            hint=f"cachebuilder plan MANIFEST --json > {path}",
        ) from None
    of_flashinfer = plan.flashinfer
    gemms = of_flashinfer.gemms if of_flashinfer else ()
    kernels = [
        *((kernel, kernel.name, kernel.selected_by) for kernel in plan.kernels),
        *(
            (kernel, GEMM_FUNCTION, _after(len(plan.ops), kernel.selected_by))
            for kernel in (of_flashinfer.kernels if of_flashinfer else ())
        ),
    ]
    check_selections(path, len(plan.ops) + len(gemms), (s for _, _, selected_by in kernels for s in selected_by))
    return Facts(
        path=path,
        name=path.stem,
        generation=plan.generation,
        gpu=plan.gpu.name,
        arch=plan.arch,
        ops=(*map(op_facts, plan.ops), *map(_gemm_facts, gemms)),
        kernels=tuple(
            KernelFacts(k.entry, name, hashlib.sha256(k.source.encode()).hexdigest(), k.source, selected_by)
            for k, name, selected_by in kernels
        ),
        modules=dict.fromkeys(of_flashinfer.modules if of_flashinfer else ()),
    )


def _of_artifact(path: Path, sha256: str, verify_report: Path | None) -> Facts:
    with open_archive(path) as archive:
        index = archive.index
        ops, asked_entries = asked(index)
        check_selections(path, len(ops), (s for _, selected_by in asked_entries for s in selected_by))
        files: dict[str, dict[str, bytes]] = {entry.name: {} for entry, _ in asked_entries}
        for member, data in archive.files():
            files.setdefault(member.entry.name, {})[member.file.name] = data
        archive.drain()
    kernels = []
    for entry, selected_by in asked_entries:
        name = entry_files.kernel_name(index.fingerprint.generation, entry.name) or GEMM_FUNCTION
        cubin_file = entry_files.CUBIN if name != GEMM_FUNCTION else GEMM_CUBIN
        kernels.append(
            KernelFacts(
                entry=entry.name,
                name=name,
                digest=" ".join(file.sha256 for file in entry.files),
                source=files[entry.name][entry_files.SOURCE].decode(errors="replace"),
                selected_by=selected_by,
                size=len(files[entry.name][cubin_file]),
                resources=resources_of(path, entry.name, files[entry.name][cubin_file]),
            )
        )
    gpu_report = verified.read(verify_report or verified.path_for(path), sha256)
    if verify_report and gpu_report is None:
        raise ArtifactError(
            f"{verify_report}: wanted the report of verify on {path.name}, sha256 {sha256[:16]}…, found another or none"
        )
    return Facts(
        path=path,
        name=index.name,
        generation=index.fingerprint.generation,
        gpu=index.gpu,
        arch=index.fingerprint.arch,
        ops=ops,
        kernels=tuple(kernels),
        modules={m.name: m.files[0].size for m in (index.flashinfer.modules if index.flashinfer else ())},
        size=path.stat().st_size,
        sha256=sha256,
        index=index,
        build=build_record.read(path, sha256),
        verified=gpu_report,
    )


def asked(index: Index) -> tuple[tuple[OpFacts, ...], list[tuple[Entry, tuple[Selection, ...]]]]:
    """An artifact's ops, with the shapes of FlashInfer's GEMM behind them, and where they ask for each entry."""
    ops = tuple(map(op_facts, index.ops))
    entries = [(entry, entry.selected_by) for entry in index.entries]
    if index.flashinfer:
        entries += [(entry, _after(len(ops), entry.selected_by)) for entry in index.flashinfer.entries]
        ops += tuple(map(_gemm_facts, index.flashinfer.gemms))
    return ops, entries


def _gemm_facts(fields: Mapping[str, object]) -> OpFacts:
    """The facts of a shape of FlashInfer's GEMM."""
    return OpFacts(GEMM_FUNCTION, f"n={fields.get('n')} k={fields.get('k')}", "m")


def _after(op_count: int, selected_by: Iterable[Selection]) -> tuple[Selection, ...]:
    """Selections by shapes of FlashInfer's GEMM, whose numbers follow those of the ops."""
    return tuple(selection.model_copy(update={"op": op_count + selection.op}) for selection in selected_by)


def resources_of(path: Path, entry: str, data: bytes) -> Resources:
    """What the kernel in the cubin ``data`` of ``entry`` takes. Raises `ArtifactError` where ``data`` is no cubin."""
    try:
        return cubin.resources(data)
    except cubin.CubinError as error:
        raise ArtifactError(f"{path}: {entry}: {error}") from error


def op_facts(fields: Mapping[str, object]) -> OpFacts:
    """The facts of an op. One that this version does not know, or not in this form, shows all of its fields."""
    name = str(fields.get("op"))
    try:
        op = OPS[name].model_validate(fields)
    except (KeyError, ValidationError):
        shape = (f"{key}={value}" for key, value in fields.items() if key != "op" and value is not None)
        return OpFacts(name, " ".join(shape), "m")
    return OpFacts(name, op.shape(), op.variable)
