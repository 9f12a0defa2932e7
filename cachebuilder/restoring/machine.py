"""What serves, whether DeepGEMM would find an artifact's kernels there, and which of several artifacts to take."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, Protocol, Self, TypeVar

from cachebuilder.artifact.index import Fingerprint, FlashInferPart
from cachebuilder.cuda import nvml
from cachebuilder.cuda.gpus import GPUS
from cachebuilder.cuda.nvml import VisibleGpu
from cachebuilder.deepgemm import environment as variables
from cachebuilder.deepgemm import installation as installations
from cachebuilder.deepgemm.installation import Installation
from cachebuilder.errors import CompatibilityError, InstallationError
from cachebuilder.flashinfer import installation as flashinfers
from cachebuilder.flashinfer.installation import FlashInfer
from cachebuilder.restoring.compatibility import Difference, difference

T = TypeVar("T")


class Fingerprinted(Protocol):
    """What can be compared with a machine: an artifact's index, or a registry's description of an artifact."""

    @property
    def fingerprint(self) -> Fingerprint:
        """What must agree for a hit."""

    @property
    def gpu(self) -> str:
        """The name of the GPU that the artifact was planned for; empty where that is unknown."""

    @property
    def flashinfer(self) -> FlashInferPart | None:
        """What the artifact holds for FlashInfer; None where that is nothing, or unknown."""


@dataclass(frozen=True)
class Machine:
    """What serves, or will serve.

    Attributes:
        installation: the DeepGEMM that the engine will use; None where none was found.
        gpu: None where none is visible; arch and SM count are not compared then.
        environment: the serving process's variables.
        compiler: what ``nvcc --version`` will say; None where that is unknown, or where a frozen nvcc will answer.
        sm_counts: SM counts that the engine will set; None where they are unknown.
        flashinfer: the FlashInfer that the engine will use; None where none was found.
        glibc: the C library's version, as ``2.36``; None where it is unknown.
    """

    installation: Installation | None
    gpu: VisibleGpu | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    compiler: str | None = None
    sm_counts: tuple[int, ...] | None = None
    flashinfer: FlashInfer | None = None
    glibc: str | None = None

    @classmethod
    def here(cls, deep_gemm: str | Path | None = None) -> Self:
        """This machine with this process's variables.

        Args:
            deep_gemm: the DeepGEMM that will serve; default: the installed one, else vLLM's own copy.

        Raises:
            InstallationError: ``deep_gemm`` is no DeepGEMM. Without ``deep_gemm`` a missing DeepGEMM is no error.
        """
        try:
            installation = installations.find(Path(deep_gemm) if deep_gemm else None)
        except InstallationError:
            if deep_gemm is not None:
                raise
            installation = None
        return cls.of(installation, nvml.first_gpu())

    @classmethod
    def of(cls, installation: Installation | None, gpu: VisibleGpu | None) -> Self:
        """This machine with this process's variables, where its DeepGEMM and its GPU are known already."""
        return cls(installation, gpu, os.environ, flashinfer=flashinfers.installed(), glibc=_glibc())

    def differences(
        self, artifact: Fingerprinted, *, relocates: bool = False, frozen_nvcc: Path | None = None
    ) -> list[Difference]:
        """How an artifact differs from this machine. If no difference causes a miss, DeepGEMM finds every kernel.

        Args:
            relocates: the artifact is yet to be restored here, which renames legacy entries for the install path.
            frozen_nvcc: the frozen nvcc, which ``DG_JIT_NVCC_COMPILER`` may name.

        Raises:
            InstallationError: the installation is incomplete.
        """
        fingerprint = artifact.fingerprint
        differences = self._deep_gemm(fingerprint, relocates)
        if self.compiler is not None and self.compiler != fingerprint.compiler:
            differences.append(difference(fingerprint, "compiler", fingerprint.compiler, self.compiler))
        if self.gpu is not None:
            differences += _gpu(artifact, self.gpu)
        if self.sm_counts is not None and not set(self.sm_counts) <= set(fingerprint.sm_counts):
            differences.append(difference(fingerprint, "sm_counts", list(fingerprint.sm_counts), list(self.sm_counts)))
        if artifact.flashinfer is not None:
            differences += self._flashinfer(artifact.flashinfer)
        return differences + _environment(fingerprint, self.environment, frozen_nvcc)

    def fits(self, artifact: Fingerprinted, *, relocates: bool = False) -> bool:
        """Whether DeepGEMM finds every kernel of an artifact here; arguments and errors as of `differences`."""
        return not any(one.causes_miss for one in self.differences(artifact, relocates=relocates))

    def _deep_gemm(self, fingerprint: Fingerprint, relocates: bool) -> list[Difference]:
        installation = self.installation
        if installation is None:
            remedy = "install the engine first, name its copy with --deep-gemm PATH, or pass --force"
            return [Difference("deep_gemm", fingerprint.deep_gemm, "none", True, remedy)]
        if fingerprint.generation != installation.generation:
            # Every other field differs as well then, and says nothing more.
            text = f"{installation.generation} ({installation.version} in {installation.path})"
            return [difference(fingerprint, "generation", fingerprint.generation, text)]
        facts: dict[str, tuple[str | None, str]] = {
            "deep_gemm": (fingerprint.deep_gemm, installation.version),
            "headers": (fingerprint.headers, installation.headers_digest),
            "cutlass": (fingerprint.cutlass, installation.cutlass_version),
        }
        if fingerprint.generation == "legacy" and not relocates:
            facts["install_include"] = (fingerprint.install_include, str(installation.include))
        return [difference(fingerprint, name, built, here) for name, (built, here) in facts.items() if built != here]

    def _flashinfer(self, part: FlashInferPart) -> list[Difference]:
        """How the FlashInfer here differs from the one that an artifact was built with."""
        wanted = part.fingerprint
        if self.flashinfer is None:
            # An engine without FlashInfer calls DeepGEMM for every M.
            return [Difference("flashinfer", wanted.version, "none", False, _NO_FLASHINFER)]
        facts = {
            "flashinfer": (wanted.version, self.flashinfer.version),
            "flashinfer_headers": (wanted.headers, self.flashinfer.headers_digest),
            "tvm_ffi": (wanted.tvm_ffi, self.flashinfer.tvm_ffi),
        }
        differences = [
            Difference(name, built, here, True, _OTHER_FLASHINFER)
            for name, (built, here) in facts.items()
            if built != here
        ]
        if self.glibc and _numbers(self.glibc) < _numbers(wanted.glibc):
            remedy = "its modules do not load with an older C library: build on a machine with the image's distribution"
            differences.append(Difference("glibc", wanted.glibc, self.glibc, True, remedy))
        return differences


_OTHER_FLASHINFER = (
    "FlashInfer's names do not say what they are built from, so it would load another version's code: build with the "
    "FlashInfer that serves"
)
_NO_FLASHINFER = "nothing to do if the engine has none: it takes DeepGEMM for every M then"


def _glibc() -> str | None:
    try:
        return (os.confstr("CS_GNU_LIBC_VERSION") or "").rpartition(" ")[2] or None
    except (ValueError, OSError):  # another C library
        return None


def _numbers(version: str) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", version)]


@dataclass(frozen=True)
class Compared(Generic[T]):
    """An artifact that could be taken, and how it differs from the machine."""

    artifact: T
    differences: tuple[Difference, ...]

    @property
    def fits(self) -> bool:
        """Whether DeepGEMM would find every kernel."""
        return not any(one.causes_miss for one in self.differences)

    def __str__(self) -> str:
        lines = [line for one in self.differences for line in one.lines()]
        return "\n  ".join([f"{self.artifact} does not fit this environment:", *lines])


def choose(compared: Sequence[Compared[T]], *, force: bool, hint: str) -> Compared[T]:
    """The first artifact that fits, of at least one. If none fits, ``force`` takes the first one.

    Raises:
        CompatibilityError: none fits; the message has every artifact's differences, and ``hint`` is its hint.
    """
    for one in compared:
        if one.fits:
            return one
    if force:
        return compared[0]
    raise CompatibilityError("\n".join(map(str, compared)), hint=hint)


def _gpu(artifact: Fingerprinted, gpu: VisibleGpu) -> list[Difference]:
    fingerprint = artifact.fingerprint
    major, minor = gpu.capability
    # Legacy calls every 10.x but 10.1 sm_100 (csrc/jit/device_runtime.hpp, DeepGEMM 2.6.1).
    number = 100 if fingerprint.generation == "legacy" and major == 10 and minor != 1 else 10 * major + minor
    if re.sub(r"\D", "", fingerprint.arch) != str(number):
        return [difference(fingerprint, "arch", fingerprint.arch, f"sm_{number} ({gpu.name})")]
    # An engine may use fewer SMs than the card has. So the card that was planned for fits, whatever sm_counts says.
    card = GPUS.get(artifact.gpu)
    if gpu.sm_count is None or gpu.sm_count in (*fingerprint.sm_counts, card.sm_count if card else None):
        return []
    return [difference(fingerprint, "sm_counts", list(fingerprint.sm_counts), f"{gpu.sm_count} ({gpu.name})")]


def _environment(
    fingerprint: Fingerprint, environment: Mapping[str, str], frozen_nvcc: Path | None
) -> list[Difference]:
    built_with = variables.kernel_variables(fingerprint.generation, fingerprint.environment)
    set_here = variables.kernel_variables(fingerprint.generation, environment)
    differences = []
    for name in sorted(built_with.keys() | set_here.keys()):
        built, here = built_with.get(name), set_here.get(name)
        if built == here:
            continue
        if here is None:
            # `cachebuilder env` and `run` set it for the serving process, which need not be this one.
            remedy = f"set {name}={built} in the serving process; cachebuilder env does"
            differences.append(Difference(name, built, "not set", False, remedy))
        else:
            remedy = f"unset {name}, or build with it under environment: in the manifest"
            differences.append(Difference(name, built or "not set", here, True, remedy))
    nvcc = variables.get(fingerprint.generation, environment, "JIT_NVCC_COMPILER")
    if frozen_nvcc and nvcc and nvcc[1] not in ("", str(frozen_nvcc)):
        remedy = "cachebuilder env names the frozen nvcc instead"
        differences.append(Difference(nvcc[0], str(frozen_nvcc), nvcc[1], False, remedy))
    return differences
