"""What a plan is made from: a manifest, and the compiler and the DeepGEMM that were found for it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cachebuilder.cuda import toolchain as toolchains
from cachebuilder.cuda.toolchain import Toolchain
from cachebuilder.deepgemm import installation as installations
from cachebuilder.deepgemm.environment import value_problem
from cachebuilder.deepgemm.installation import Installation
from cachebuilder.errors import ManifestError
from cachebuilder.flashinfer import installation as flashinfers
from cachebuilder.flashinfer.installation import FlashInfer
from cachebuilder.manifest import schema
from cachebuilder.manifest.schema import Manifest


@dataclass(frozen=True)
class Inputs:
    """What a plan and a build are made from, all of it found and checked before anything slow starts.

    Attributes:
        manifest_bytes: the manifest's file as it is, which an artifact carries.
        flashinfer: None where the manifest needs none.
    """

    manifest: Manifest
    manifest_bytes: bytes
    toolchain: Toolchain
    installation: Installation
    flashinfer: FlashInfer | None = None


def load_manifest(
    path: str | Path,
    *,
    nvcc: str | Path | None = None,
    deep_gemm: str | Path | None = None,
    flashinfer: str | Path | None = None,
) -> Inputs:
    """Read a manifest, and find the compiler and the DeepGEMM that it is planned with.

    Args:
        nvcc: the compiler; left out, that of ``CUDA_HOME``, else of ``PATH``, else of PyPI's wheels.
        deep_gemm: the ``deep_gemm`` package; left out, the installed one, else vLLM's own copy.
        flashinfer: the ``flashinfer`` package, for a manifest that needs one; left out, the installed one.

    Raises:
        ManifestError: the manifest cannot be read or is wrong, or this DeepGEMM does not take one of its variables.
        ToolchainError: there is no nvcc, not the release that the manifest wants, or none that this DeepGEMM takes.
        InstallationError: there is no DeepGEMM, or no FlashInfer where the manifest needs one.
    """
    model, data = schema.load(Path(path))
    release = model.toolchain.nvcc if model.toolchain else None
    installation = installations.find(Path(deep_gemm) if deep_gemm else None)
    check_environment(model, installation)
    toolchain = toolchains.find(Path(nvcc) if nvcc else None, release, installation.oldest_nvcc)
    needed = flashinfers.find(Path(flashinfer) if flashinfer else None) if model.flashinfer else None
    return Inputs(model, data, toolchain, installation, needed)


def check_environment(manifest: Manifest, installation: Installation) -> None:
    """Raise `ManifestError` where this DeepGEMM does not take the value of one of the manifest's variables."""
    if problem := value_problem(installation.generation, manifest.environment):
        raise ManifestError(
            f"{manifest.name}: environment: {problem}", hint="correct the value in the manifest, or remove the variable"
        )
