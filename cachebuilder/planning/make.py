"""The plan: every kernel that DeepGEMM will ask for, its source and flags, and which points of which op select it."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Sequence
from importlib import metadata
from pathlib import Path

from pydantic import ValidationError

from cachebuilder.common.cache import cache_folder
from cachebuilder.common.files import write_atomically
from cachebuilder.common.records import Record
from cachebuilder.cuda.gpus import Gpu
from cachebuilder.cuda.toolchain import Toolchain
from cachebuilder.deepgemm import entries as entry_files
from cachebuilder.deepgemm.generation import Generation
from cachebuilder.deepgemm.installation import Installation
from cachebuilder.deepgemm.source import family, includes
from cachebuilder.errors import InstallationError, PlanError
from cachebuilder.manifest.schema import Manifest
from cachebuilder.planning.selection import Range, Selection
from cachebuilder.sweep import run as sweep


class Kernel(Record):
    """One kernel to compile.

    Attributes:
        entry: the folder's name in DeepGEMM's cache, which is the key.
        name: DeepGEMM's name for the kernel's family.
        source: the text of ``kernel.cu``.
        flags: nvcc's flags, without source, output and include paths.
        metadata: ``meta.json`` with no path of this machine in it (DeepJIT only).
        selected_by: every op and point that launches it; none for a kernel of the manifest's `sources`.
    """

    entry: str
    name: str
    source: str
    flags: tuple[str, ...]
    metadata: str | None = None
    selected_by: tuple[Selection, ...]


class Plan(Record):
    """All kernels of a manifest for one DeepGEMM and one compiler.

    Attributes:
        sm_counts: all at which any op was swept, ascending.
        arch: as nvcc names it, ``sm_90a``.
        include: legacy only: the include path that is part of every key, as DeepGEMM wrote it.
        legacy_flags: legacy only: the flags as DeepGEMM joins them for its keys.
        calls: how many times DeepGEMM was called to find this out.
        torch, python, peak_bytes: recorded of the sweep; they bind nothing.
    """

    generation: Generation
    gpu: Gpu
    sm_counts: tuple[int, ...]
    arch: str
    include: str | None = None
    legacy_flags: str | None = None
    ops: tuple[dict[str, object], ...]
    kernels: tuple[Kernel, ...]
    calls: int
    torch: str
    python: str
    peak_bytes: int


def make(
    manifest: Manifest,
    installation: Installation,
    toolchain: Toolchain,
    progress: sweep.Progress = lambda done, total: None,
    reuse: bool = True,
    found: Callable[[str, tuple[str, ...]], None] = lambda source, flags: None,
) -> Plan:
    """Plan ``manifest``: from the user's cache folder where nothing that bears on it has changed, else by a sweep.

    Args:
        found: called with the source and the flags of each kernel that a sweep comes upon, while it goes on.

    Raises what `sweep.run` raises, and `PlanError` where the sweep shows something that a cache must not be built from.
    """
    kept = cache_folder() / "plans" / f"{_inputs_digest(manifest, installation, toolchain)}.json"
    if reuse and (plan := _read(kept)):
        return plan
    include = str(installation.include)
    swept = sweep.run(
        manifest, installation, toolchain, progress, lambda entry: found(entry.source, _split_command(entry, include))
    )
    plan = _from_sweep(manifest, installation, toolchain, swept)
    if reuse:
        write_atomically(kept, plan.model_dump_json().encode(), InstallationError)
    return plan


def _read(path: Path) -> Plan | None:
    try:
        return Plan.model_validate_json(path.read_bytes())
    except (FileNotFoundError, ValidationError):
        return None


def _inputs_digest(manifest: Manifest, installation: Installation, toolchain: Toolchain) -> str:
    """sha256 over all that a plan depends on, this program's own code included."""
    package = Path(__file__).parents[1]
    code = hashlib.sha256()
    for file in sorted(file for file in package.rglob("*") if file.suffix in (".py", ".c", ".h", ".sh")):
        code.update(f"{file.relative_to(package)}\0".encode() + file.read_bytes())
    inputs = {
        "code": code.hexdigest(),
        "manifest": manifest.model_dump(mode="json", exclude={"name", "toolchain"}),
        "deep_gemm": [str(installation.imported_as), installation.code_digest, installation.headers_digest],
        "compiler": toolchain.version_text,
        "torch": _version("torch"),
    }
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _from_sweep(manifest: Manifest, installation: Installation, toolchain: Toolchain, found: sweep.Result) -> Plan:
    if not found.entries and not manifest.sources:
        raise PlanError("no op of this manifest needs a kernel of DeepGEMM's own: there is nothing to build")
    include = str(installation.include)
    asked = found.entries | found.checked
    commands = {entry.name: _split_command(entry, include) for entry in asked.values()}
    names = {entry: entry_files.kernel_name(found.generation, entry) or "" for entry in asked}
    _check_flags(names, commands)
    if found.generation == "legacy":
        _check_legacy_names(asked.values(), names, toolchain)
    selected_by = selections(found.sweeps)
    known = tuple(
        Kernel(
            entry=entry.name,
            name=names[entry.name],
            source=entry.source,
            flags=commands[entry.name],
            metadata=_portable_metadata(entry, found.cache_root, installation),
            selected_by=selected_by.get(entry.name, ()),
        )
        for entry in asked.values()
    )
    planned = [kernel for kernel in known if kernel.entry in found.entries]
    extra = _from_sources(manifest, planned, known, installation, toolchain, found)
    kernels = tuple(sorted((*planned, *extra), key=lambda kernel: kernel.entry))
    first = next(iter(asked.values()))
    legacy = found.generation == "legacy"
    return Plan(
        generation=found.generation,
        gpu=manifest.target.gpu,
        sm_counts=tuple(manifest.all_sm_counts),
        arch=_arch(known[0].flags),
        include=include if legacy else None,
        legacy_flags=_legacy_flags(first) if legacy else None,
        ops=tuple(op.model_dump(mode="json") for op in manifest.ops),
        kernels=kernels,
        calls=found.calls,
        torch=found.torch,
        python=found.python,
        peak_bytes=found.peak_bytes,
    )


def _from_sources(
    manifest: Manifest,
    planned: Sequence[Kernel],
    known: Sequence[Kernel],
    installation: Installation,
    toolchain: Toolchain,
    found: sweep.Result,
) -> tuple[Kernel, ...]:
    """The kernels that the manifest gives as text, but for the ``planned`` ones, which its ops ask for.

    DeepGEMM names and compiles them as it does the ``known`` ones of the same family, so these tell the name and the
    flags; that the key's formula holds is seen on one of these first.
    """
    covered = {kernel.source for kernel in planned}
    wanted = [(number, given) for number, given in enumerate(manifest.sources) if given.source not in covered]
    if not wanted:
        return ()

    def entry(name: str, source: str) -> str:
        if found.generation == "legacy":
            flags = _legacy_flags(next(iter((found.entries | found.checked).values())))
            return entry_files.legacy_entry(name, toolchain.release, flags, source.encode())
        cutlass = installation.cutlass_version
        return entry_files.deepjit_entry(
            name, toolchain.version_text, cutlass, known[0].flags, source, installation.include
        )

    first = known[0]
    if entry(first.name, first.source) != first.entry:
        raise PlanError(
            f"sources cannot be planned, the key's formula does not hold for this DeepGEMM: wanted {first.entry}, "
            f"found {entry(first.name, first.source)}",
            hint="leave sources out of the manifest and give the ops that ask for these kernels",
        )
    if others := sorted({" ".join(k.flags) for k in known if k.flags != first.flags}):
        raise PlanError(f"sources cannot be planned: wanted one set of flags, found {' '.join(first.flags)}, {others}")
    kernels = []
    for number, given in wanted:
        where = f"sources[{number}]"
        name = given.kernel or _name_by_family(where, given.source, known)
        _check_source(where, given.source, known, installation)
        try:
            key = entry(name, given.source)
        except OSError as error:
            raise PlanError(f"{where}: includes {error.filename}, which this DeepGEMM has not") from None
        # Compiler and options, the same for all: meta.json says nothing of the kernel itself.
        kernels.append(
            Kernel(
                entry=key,
                name=name,
                source=given.source,
                flags=first.flags,
                metadata=first.metadata,
                selected_by=(),
            )
        )
    return tuple(kernels)


def _name_by_family(where: str, source: str, known: Sequence[Kernel]) -> str:
    """DeepGEMM's name for a kernel, from the known ones that instantiate the same template for the same GemmType."""
    wanted = family(source)
    names = sorted({kernel.name for kernel in known if family(kernel.source) == wanted})
    if len(names) != 1:
        what = " ".join(filter(None, wanted)) or "a kernel of no known template"
        raise PlanError(
            f"{where}: DeepGEMM's name for {what} cannot be told: wanted one planned kernel's, found {names or 'none'}",
            hint="give it as kernel: NAME, or add an op that asks for such kernels",
        )
    return names[0]


def _check_source(where: str, source: str, known: Sequence[Kernel], installation: Installation) -> None:
    """Raises `PlanError` for a kernel of another arch, or of other headers (legacy writes their hash into it)."""
    template, ours = family(source)[0] or "", _arch(known[0].flags)
    arch = re.match(r"sm(\d+)_", template)
    if arch and not ours.startswith(f"sm_{arch[1][:-1]}"):
        raise PlanError(f"{where}: wanted a kernel for {ours}, found {template}")
    if installation.generation == "deepjit":
        return
    head, _, body = source.partition("\n")
    for kernel in known:
        its_head, _, its_body = kernel.source.partition("\n")
        if includes(its_body) == includes(body) and its_head != head:
            raise PlanError(
                f"{where}: written by a DeepGEMM with other headers: wanted {its_head!r}, found {head!r}",
                hint="take the source out: the DeepGEMM that serves now would not ask for it",
            )


def _split_command(entry: sweep.Entry, include: str) -> tuple[str, ...]:
    """The flags of a recorded command, without source, output and DeepGEMM's own include path."""
    words = entry.arguments.split(" ")[1:]  # the first is the source
    flags, index = [], 0
    while index < len(words):
        word = words[index]
        if word in ("-o", "--output-file") or (
            word in ("-I", "--include-path") and words[index + 1 : index + 2] == [include]
        ):
            index += 1
        elif word not in ("-cubin", "--cubin", f"-I{include}"):
            flags.append(word)
        index += 1
    if strange := [flag for flag in flags if flag.startswith(("-I", "--include-path"))]:
        raise PlanError(f"{entry.name}: wanted no include path but {include}, found {' '.join(strange)}")
    return tuple(flags)


def _check_flags(names: dict[str, str], commands: dict[str, tuple[str, ...]]) -> None:
    seen: dict[str, str] = {}
    for entry, name in names.items():
        first = seen.setdefault(name, entry)
        if commands[entry] != commands[first]:
            raise PlanError(
                f"{entry}: asked for with other flags than its sibling {first}: wanted {' '.join(commands[first])}, "
                f"found {' '.join(commands[entry])}"
            )


def _legacy_flags(entry: sweep.Entry) -> str:
    """The flags as legacy DeepGEMM hashes them: all that follows the output file in its command."""
    return entry.arguments.split(" -o ", 1)[1].split(" ", 1)[1]


def _check_legacy_names(asked: Iterable[sweep.Entry], names: dict[str, str], toolchain: Toolchain) -> None:
    """Every entry's name recomputed from the formula must be the one DeepGEMM chose: relocation hangs on it."""
    for entry in asked:
        expected = entry_files.legacy_entry(
            names[entry.name], toolchain.release, _legacy_flags(entry), entry.source.encode()
        )
        if expected != entry.name:
            raise PlanError(
                f"the legacy key's formula does not hold for this DeepGEMM: wanted {expected}, found {entry.name}"
            )


def _arch(flags: Sequence[str]) -> str:
    for flag in flags:
        if match := re.fullmatch(r"--gpu-architecture=(sm_\w+)", flag):
            return match[1]
    raise PlanError(f"wanted --gpu-architecture among DeepGEMM's flags, found {' '.join(flags)}")


def _portable_metadata(entry: sweep.Entry, cache_root: str, installation: Installation) -> str | None:
    """DeepJIT's ``meta.json``, which nothing reads back, without the paths of this machine."""
    if entry.metadata is None:
        return None
    source = entry.arguments.split(" ", 1)[0]  # <root>/tmp/<uuid>/kernel.cu
    text = entry.metadata.replace(source.removesuffix(entry_files.SOURCE), "")
    text = text.replace(f"{cache_root.removesuffix('/root')}/cuda/bin/", "").replace(
        str(installation.imported_as), "deep_gemm"
    )
    return json.dumps(json.loads(text), separators=(",", ":"))


def selections(sweeps: Sequence[sweep.Sweep]) -> dict[str, tuple[Selection, ...]]:
    """For each entry: where it is launched, touching ranges joined."""
    found: dict[str, list[Selection]] = {}
    for swept in sweeps:
        ranges: dict[str, list[Range]] = {}
        for run in swept.runs:
            for entry in dict.fromkeys(run.entries):
                known = ranges.setdefault(entry, [])
                if known and known[-1].last + run.step == run.first:
                    known[-1] = Range(first=known[-1].first, last=run.last, step=run.step)
                else:
                    known.append(Range(first=run.first, last=run.last, step=run.step))
        for entry, known in ranges.items():
            found.setdefault(entry, []).append(Selection(op=swept.op, sm_count=swept.sm_count, ranges=tuple(known)))
    return {entry: tuple(where) for entry, where in found.items()}
