"""Prove that FlashInfer would compile nothing: its modules load, and its GEMM finds every kernel, on a virtual GPU.

FlashInfer is asked twice. With a compiler that records and an empty cache, its GEMM says which kernels it wants. With
the frozen compiler, which refuses, it must then launch exactly these kernels from the restored ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cachebuilder.artifact.index import FLASHINFER, FLASHINFER_CACHE, FLASHINFER_MODULES
from cachebuilder.common.files import make_folders
from cachebuilder.errors import PlanError
from cachebuilder.flashinfer import elf, entries
from cachebuilder.flashinfer.installation import FlashInfer
from cachebuilder.planning.requests import selections
from cachebuilder.restoring.damage import Damage
from cachebuilder.restoring.frozen import LOG_VARIABLE
from cachebuilder.sweep import flashinfer as sweep
from cachebuilder.verifying.report import FlashInferReplay, Trial
from cachebuilder.verifying.virtual import Launches, Serving, frozen_compiler


def replay(serving: Serving, flashinfer: FlashInfer, damage: Sequence[Damage]) -> tuple[FlashInferReplay, Launches]:
    """Replay what the manifest needs of FlashInfer; returns also which kernels of the GEMM serve which M.

    Args:
        damage: the restored folder's; what is damaged counts as missing.

    Raises: as `sweep.flashinfer.requested_kernels` does.
    """
    needs, gpu, folder = serving.manifest.flashinfer, serving.manifest.target.gpu, serving.folder.path
    assert needs is not None
    damaged = {item.entry for item in damage}
    cubins = _whole(folder, FLASHINFER_CACHE, damaged)
    modules = _whole(folder, FLASHINFER_MODULES, damaged)
    missing = [name for name in needs.all_modules if name not in modules]
    wanted: dict[str, list[tuple[int, int, int]]] = {}
    launches: Launches = {}
    if needs.gemms and entries.GEMM_MODULE in modules:
        module = (modules[entries.GEMM_MODULE] / entries.module_file(entries.GEMM_MODULE)).read_bytes()
        asked, _ = sweep.requested_kernels(flashinfer, gpu, needs.gemms, module)
        launches = selections(asked.sweeps)
        missing += [entry for entry in launches if entry not in cubins]
        wanted = {
            entry: [(selection.op, r.first, r.last) for selection in selected_by for r in selection.ranges]
            for entry, selected_by in launches.items()
        }
    hits = sorted(wanted.keys() & cubins.keys())
    if missing:
        return FlashInferReplay(calls=0, hits=tuple(hits), missing=tuple(missing), modules=(), problems=()), launches
    root = _view(serving.scratch / FLASHINFER, flashinfer, serving, cubins, modules)
    (work := serving.scratch / "flashinfer-frozen").mkdir()
    compiler = frozen_compiler(serving.compiler_text, work)
    problems = []
    calls = 0
    try:
        served = sweep.call_gemms(flashinfer, gpu, needs.gemms, root, compiler, needs.all_modules)
    except PlanError as error:
        problems.append(str(error))
    else:
        calls = served.calls
        name_of = {elf.kernel_name((cubins[entry] / entries.CUBIN).read_bytes()): entry for entry in hits}
        launched = {
            name_of.get(name, name): [(s.op, r.first, r.last) for s in selected_by for r in s.ranges]
            for name, selected_by in selections(served.sweeps).items()
        }
        problems += [
            f"{name} is launched where it is not planned" for name in launched if launched[name] != wanted.get(name)
        ]
    if Path(compiler.environment[LOG_VARIABLE]).exists():
        problems.append("FlashInfer called the compiler for a kernel that is there")
    loaded = () if problems else tuple(needs.all_modules)
    replayed = FlashInferReplay(calls=calls, hits=tuple(hits), missing=(), modules=loaded, problems=tuple(problems))
    return replayed, launches


def try_kernels(serving: Serving, launches: Launches) -> tuple[Trial, ...]:
    """Compare the GEMM's kernels with a reference in float32 on this machine's GPU, at the ends of their ranges.

    Args:
        launches: what `replay` returned. The folder is whole.

    Raises: as `sweep.flashinfer.try_gemms` does.
    """
    needs, flashinfer = serving.manifest.flashinfer, serving.flashinfer
    if needs is None or flashinfer is None or not launches:
        return ()
    kernels_at: dict[tuple[int, int], list[str]] = {}
    for entry, selected_by in launches.items():
        for selection in selected_by:
            for m in {selection.ranges[0].first, selection.ranges[-1].last}:
                kernels_at.setdefault((selection.op, m), []).append(entry)
    folder = serving.folder.path
    parts = (_whole(folder, part, set()) for part in (FLASHINFER_CACHE, FLASHINFER_MODULES))
    root = _view(serving.scratch / "flashinfer-trials", flashinfer, serving, *parts)
    (work := serving.scratch / "flashinfer-on-gpu").mkdir()
    compiler = frozen_compiler(serving.compiler_text, work)
    answer = sweep.try_gemms(flashinfer, needs.gemms, sorted(kernels_at), root, compiler)
    return tuple(
        Trial(
            op=entries.GEMM_FUNCTION,
            shape=str(needs.gemms[index]),
            sm_count=serving.manifest.target.gpu.sm_count,
            variable="m",
            value=m,
            kernels=tuple(kernels_at[index, m]),
            **dict(result),
        )
        for (index, m), result in zip(sorted(kernels_at), answer.results, strict=True)
    )


def _whole(folder: Path, part: str, damaged: set[str]) -> dict[str, Path]:
    """The folders in ``part`` that are not damaged, by name."""
    folders = sorted((folder / part).glob("*"))
    return {path.name: path for path in folders if path.is_dir() and f"{part}/{path.name}" not in damaged}


def _view(
    root: Path, flashinfer: FlashInfer, serving: Serving, cubins: dict[str, Path], modules: dict[str, Path]
) -> Path:
    """A folder for FlashInfer in ``root``, with links to what is whole; FlashInfer may write there."""
    for name in ("cache", "modules", "tmp"):
        make_folders(root / name)
    for name, paths in (("cache", cubins), ("modules", modules)):
        for entry, path in paths.items():
            (root / name / entry).symlink_to(path, target_is_directory=True)
    sweep.write_modules(root, flashinfer, serving.manifest.target.gpu, {})
    return root
