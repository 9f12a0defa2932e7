"""The whole build, in order: manifest → plan → compile → pack."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cachebuilder import compile as compiling
from cachebuilder import manifest as manifests
from cachebuilder import plan as planning
from cachebuilder import toolchain as toolchains
from cachebuilder.artifact.index import fingerprint
from cachebuilder.artifact.pack import Packed, pack
from cachebuilder.deepgemm import installation as installations
from cachebuilder.store import CubinStore, NoStore

#: Called with a step's name ("plan", "compile"), units done and units in all (0: not known yet).
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Inputs:
    """What a plan is made from, found and checked before anything slow starts."""

    manifest: manifests.Manifest
    manifest_bytes: bytes
    toolchain: toolchains.Toolchain
    installation: installations.Installation


@dataclass(frozen=True)
class Built:
    """A finished build: the artifact and where the time went, in seconds."""

    inputs: Inputs
    plan: planning.Plan
    compiled: compiling.Report
    checked: int
    packed: Packed
    plan_seconds: float
    pack_seconds: float


def find_inputs(manifest: Path, nvcc: Path | None = None, deep_gemm: Path | None = None) -> Inputs:
    """Read the manifest, find the compiler and DeepGEMM. Raises what each of them raises."""
    model, data = manifests.load(manifest)
    release = model.toolchain.nvcc if model.toolchain else None
    return Inputs(model, data, toolchains.find(nvcc, release), installations.find(deep_gemm))


def build(
    inputs: Inputs,
    output: Path,
    jobs: int | None = None,
    use_store: bool = True,
    grouped: bool = True,
    check_code: int = 1,
    progress: Progress = lambda step, done, total: None,
) -> Built:
    """Build ``output`` from ``inputs``.

    Args:
        jobs: compilers at once; all cores when left out.
        grouped: let kernels share the compiler's front end; the bytes are the same either way.
        check_code: of the kernels compiled now, compare this many random ones with what nvcc makes of them alone.
        use_store: keep plans and compiled kernels in the user's cache folder, and take them from there.

    Raises:
        CacheBuilderError: of the kind that says which step failed; no artifact is written then.
    """
    started = time.monotonic()
    plan = planning.make(
        inputs.manifest,
        inputs.installation,
        inputs.toolchain,
        lambda done, total: progress("plan", done, total),
        reuse=use_store,
    )
    planned = time.monotonic()
    cubins, report = compiling.compile_all(
        plan.kernels,
        inputs.toolchain,
        inputs.installation,
        CubinStore() if use_store else NoStore(),
        jobs,
        lambda done, total: progress("compile", done, total),
        grouped,
    )
    checked = random.sample(report.compiled, min(check_code, len(report.compiled)))
    compiling.check(checked, cubins, inputs.toolchain, inputs.installation)
    compiled = time.monotonic()
    packed = pack(
        output,
        inputs.manifest.name,
        inputs.manifest_bytes,
        plan,
        cubins,
        fingerprint(plan, inputs.installation, inputs.toolchain, inputs.manifest.environment),
    )
    return Built(inputs, plan, report, len(checked), packed, planned - started, time.monotonic() - compiled)
