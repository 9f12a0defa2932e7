"""Prove that DeepGEMM would find every kernel in an artifact or a restored folder."""

from __future__ import annotations

import os
from pathlib import Path

from cachebuilder.common.cache import scratch_folder
from cachebuilder.common.progress import Progress, no_progress
from cachebuilder.cuda import nvml
from cachebuilder.cuda.device import DeviceChoice
from cachebuilder.deepgemm import installation as installations
from cachebuilder.deepgemm.environment import get as get_variable
from cachebuilder.deepgemm.environment import kernel_variables
from cachebuilder.deepgemm.installation import Installation
from cachebuilder.errors import CompatibilityError
from cachebuilder.flashinfer import installation as flashinfers
from cachebuilder.manifest import schema as manifests
from cachebuilder.manifest.inputs import check_environment
from cachebuilder.restoring.environment import has_gemms, uncovered
from cachebuilder.sweep import warm
from cachebuilder.verifying import flashinfer as for_flashinfer
from cachebuilder.verifying import real, virtual
from cachebuilder.verifying.report import DeepGemmCopy, Replay, Report
from cachebuilder.verifying.virtual import Launches, Serving


def verify(
    target: str | Path,
    *,
    deep_gemm: str | Path | None = None,
    flashinfer: str | Path | None = None,
    manifest: str | Path | None = None,
    device: DeviceChoice = "virtual",
    progress: Progress = no_progress,
) -> Report:
    """Replay every call of a manifest against ``target`` with a compiler that refuses to compile.

    The replay runs on a virtual GPU and needs no real one. It has those of this process's variables that change
    kernels. With ``device="cuda"``, a complete cache is then also served from on this machine's GPU, and every kernel's
    results on random inputs are compared with a reference in float32. Nothing is written to ``target``. A report of
    missing kernels is no error; `Report.require_right` raises.

        report = verify("small.tar.zst")
        assert report.complete, report.problem()

    Args:
        target: an artifact, or a folder that artifacts were restored into.
        deep_gemm: the ``deep_gemm`` package that will serve; left out, the installed one, else vLLM's own copy.
        flashinfer: the ``flashinfer`` package that will serve, for an artifact that holds something for it; left out,
            the installed one.
        manifest: the shapes to replay; left out, those that each artifact was built for.
        device: ``cuda`` to use this machine's GPU as well, which must be the manifest's target; ``auto`` to use it if
            it is the target.
        progress: its steps are the manifests' names; done and total count calls of DeepGEMM.

    Raises:
        ArtifactError: ``target`` is neither an artifact nor a restored folder, or the folder's own files are damaged.
        ManifestError: ``manifest`` cannot be read or is wrong, or this DeepGEMM does not take one of its variables.
        InstallationError: torch, DeepGEMM or, where it is needed, FlashInfer is missing or does not load.
        CompatibilityError: a variable has DeepGEMM compile with NVRTC.
        PlanError: DeepGEMM died or misreads tensors. (A call that it refuses is part of the report.)
        DeviceError: the real GPU is missing, not the target, or out of memory.
    """
    target = Path(target)
    installation = installations.find(Path(deep_gemm) if deep_gemm else None)
    with scratch_folder() as scratch, warm.kept():
        folder = virtual.open_target(target, installation, scratch)
        if manifest:
            replayed = [(manifests.load(Path(manifest))[0], folder.artifacts)]
        else:
            replayed = [(manifests.parse(item.manifest, item.stem), (item,)) for item in folder.artifacts]
        for model, _ in replayed:
            check_environment(model, installation)
        chosen = replayed[0][0].target.choose(device)
        _refuse_nvrtc(installation)
        damage, compiler_text = tuple(folder.damage()), folder.compiler_text()
        replays: list[Replay] = []
        servings: list[tuple[Serving, Launches, Launches]] = []
        for number, (model, artifacts) in enumerate(replayed):
            (work := scratch / str(number)).mkdir()
            copy = flashinfers.find(Path(flashinfer) if flashinfer else None) if model.flashinfer else None
            serving = Serving(folder, installation, model, compiler_text, work, nvml.first_gpu(), copy)
            replay, launches = virtual.replay(serving, artifacts, damage, progress)
            of_gemms: Launches = {}
            if copy:
                of_flashinfer, of_gemms = for_flashinfer.replay(serving, copy, damage)
                replay = replay.model_copy(update={"flashinfer": of_flashinfer})
            replays.append(replay)
            servings.append((serving, launches, of_gemms))
        complete = not damage and all(replay.complete for replay in replays)
        on_gpu = real.check(target, servings, progress) if complete and chosen == "cuda" else None
    vllm_serves = installation.is_vllms or installations.package_folder("vllm") is not None
    dense = any(op.op == "fp8_gemm_nt" for model, _ in replayed for op in model.ops)
    indexes = [index for index in folder.indexes if not has_gemms(index)] if vllm_serves and dense else []
    archs = {index.fingerprint.arch for index in indexes}
    return Report(
        complete=complete,
        target=str(target),
        deep_gemm=DeepGemmCopy(path=str(installation.path), version=installation.version),
        entries=len(
            {(path, one.name) for index in folder.indexes for path, many in index.folders.items() for one in many}
        ),
        damage=damage,
        replays=tuple(replays),
        uncovered=tuple(filter(None, (uncovered(arch, os.environ) for arch in sorted(archs)))),
        on_gpu=on_gpu,
    )


def _refuse_nvrtc(installation: Installation) -> None:
    """Raise `CompatibilityError` if this process's variables choose NVRTC, which compiles and asks no nvcc."""
    nvrtc = get_variable(installation.generation, os.environ, "JIT_USE_NVRTC")
    if installation.generation == "legacy" and nvrtc and nvrtc[0] in kernel_variables("legacy", os.environ):
        raise CompatibilityError(
            f"{nvrtc[0]}: wanted nvcc, found NVRTC ({nvrtc[1]!r}), which has other keys: it would find no kernel",
            hint=f"unset {nvrtc[0]}",
        )
