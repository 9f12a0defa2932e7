"""Would DeepGEMM find an artifact's kernels? A fingerprint against another, or against what is here, field by field."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import zip_longest

from cachebuilder.artifact.index import Fingerprint, Index
from cachebuilder.cuda.nvml import VisibleGpu
from cachebuilder.deepgemm import environment as variables
from cachebuilder.deepgemm.installation import Installation

#: For each field of the fingerprint: what a difference does to serving, and the next step.
_REMEDIES: dict[str, str] = {
    "generation": "the two read different cache layouts, nothing hits: build with the DeepGEMM that serves",
    "deep_gemm": "its code decides which kernels are asked for: build with the DeepGEMM that serves",
    "distribution": "binds nothing by itself",
    "headers": "every key holds the headers it includes: build with the DeepGEMM that serves",
    "cutlass": "DeepJIT's keys hold it: build with the DeepGEMM that serves",
    "compiler": "keys hold the compiler: let the frozen nvcc answer (cachebuilder env), or restore again",
    "arch": "keys hold it: build for the GPU that serves (target.gpu in the manifest)",
    "sm_counts": "kernels hold the SM count: add it to target.sm_counts, or an op's, in the manifest and build again",
    "environment": "these variables change kernels: unset them, or give them in the manifest and build again",
    "install_include": "legacy keys hold the install path: restore again for it, which renames the entries",
    "legacy_flags": "legacy keys hold the flags: restore or build again with the DeepGEMM that serves",
}


@dataclass(frozen=True)
class Difference:
    """One field that is not the same on both sides.

    Attributes:
        causes_miss: DeepGEMM would not find kernels; otherwise it is worth knowing, no more.
        remedy: what the difference does, and what to do about it.
    """

    field: str
    wanted: object
    found: object
    causes_miss: bool
    remedy: str

    def lines(self) -> list[str]:
        """As a person reads it, within 80 columns: the first line is the field."""
        wanted, found = self.short()
        effect = "" if self.causes_miss else " (no miss by itself)"
        remedy = textwrap.wrap(self.remedy, 78, initial_indent="  remedy: ", subsequent_indent=" " * 10)
        return [f"{self.field}{effect}", f"  wanted: {wanted}", f"  found:  {found}", *remedy]

    def short(self) -> tuple[str, str]:
        """Both values in one line each: of texts with several lines, the first lines that differ."""
        wanted, found = (
            (value if isinstance(value, str) else json.dumps(value)).splitlines() for value in (self.wanted, self.found)
        )
        a, b = next(((a, b) for a, b in zip_longest(wanted, found, fillvalue="") if a != b), ("", ""))
        return _shorten(a), _shorten(b)


def between(wanted: Fingerprint, found: Fingerprint) -> list[Difference]:
    """Every field in which two fingerprints differ, in the fingerprint's own order."""
    a, b = wanted.model_dump(), found.model_dump()
    return [_difference(wanted, field, a[field], b[field]) for field in a if a[field] != b[field]]


def with_environment(
    index: Index,
    installation: Installation | None,
    gpu: VisibleGpu | None,
    environment: Mapping[str, str],
    *,
    compiler: str | None = None,
    sm_counts: Iterable[int] | None = None,
    relocates: bool = False,
    frozen_nvcc: str | None = None,
) -> list[Difference]:
    """How an artifact differs from what would serve it; nothing that causes a miss: each kernel would be found.

    Args:
        installation: the DeepGEMM that the engine will use, None where none was found.
        gpu: None where none is visible; arch and SM count are not compared then.
        environment: the serving process's variables.
        compiler: what ``nvcc --version`` will say; None where that is not known, or a frozen nvcc is about to say it.
        sm_counts: SM counts that the engine will set; None where that is not known.
        relocates: legacy entries are about to be renamed for this install path.
        frozen_nvcc: the path of the frozen nvcc, which ``DG_JIT_NVCC_COMPILER`` may name.

    Raises:
        InstallationError: the installation is not whole.
    """
    fingerprint = index.fingerprint
    found = _deep_gemm(fingerprint, installation, relocates)
    if compiler is not None and compiler != fingerprint.compiler:
        found.append(_difference(fingerprint, "compiler", fingerprint.compiler, compiler))
    if gpu is not None:
        found += _gpu(index, gpu)
    if sm_counts is not None and not set(sm_counts) <= set(fingerprint.sm_counts):
        found.append(_difference(fingerprint, "sm_counts", list(fingerprint.sm_counts), list(sm_counts)))
    return found + _environment(fingerprint, environment, frozen_nvcc)


def _difference(wanted: Fingerprint, field: str, want: object, have: object) -> Difference:
    # DeepJIT's keys hold CUTLASS's version (the extra signature), legacy's do not.
    binds = field != "distribution" and (field != "cutlass" or wanted.generation == "deepjit")
    return Difference(field, want, have, binds, _REMEDIES[field] if binds else "nothing to do: no key holds it")


def _deep_gemm(wanted: Fingerprint, installation: Installation | None, relocates: bool) -> list[Difference]:
    if installation is None:
        remedy = "install the engine first, name its copy with --deep-gemm PATH, or pass --force"
        return [Difference("deep_gemm", wanted.deep_gemm, "none", True, remedy)]
    if wanted.generation != installation.generation:
        # The rest would only say the same again: nothing of one generation is found by the other.
        text = f"{installation.generation} ({installation.version} in {installation.path})"
        return [_difference(wanted, "generation", wanted.generation, text)]
    facts: dict[str, tuple[str | None, str]] = {
        "deep_gemm": (wanted.deep_gemm, installation.version),
        "headers": (wanted.headers, installation.headers_digest),
        "cutlass": (wanted.cutlass, installation.cutlass_version),
    }
    if wanted.generation == "legacy" and not relocates:
        facts["install_include"] = (wanted.install_include, str(installation.include))
    return [_difference(wanted, field, want, have) for field, (want, have) in facts.items() if want != have]


def _gpu(index: Index, gpu: VisibleGpu) -> list[Difference]:
    wanted = index.fingerprint
    major, minor = gpu.capability
    # Legacy calls every 10.x but 10.1 sm_100 (csrc/jit/device_runtime.hpp, DeepGEMM 2.6.1).
    number = 100 if wanted.generation == "legacy" and major == 10 and minor != 1 else 10 * major + minor
    if re.sub(r"\D", "", wanted.arch) != str(number):
        return [_difference(wanted, "arch", wanted.arch, f"sm_{number} ({gpu.name})")]
    if gpu.sm_count is not None and gpu.sm_count not in wanted.sm_counts and _card_sms(index) != gpu.sm_count:
        return [_difference(wanted, "sm_counts", list(wanted.sm_counts), f"{gpu.sm_count} ({gpu.name})")]
    return []


def _card_sms(index: Index) -> int | None:
    """The SM count of the card that was planned for: an engine may be told to use fewer than there are."""
    from cachebuilder.cuda.gpus import GPUS  # only where it comes to that: a restore is in a hurry

    card = GPUS.get(index.recorded.get("gpu", ""))
    return card.sm_count if card else None


def _environment(wanted: Fingerprint, environment: Mapping[str, str], frozen_nvcc: str | None) -> list[Difference]:
    built_with = variables.kernel_variables(wanted.generation, wanted.environment)
    set_here = variables.kernel_variables(wanted.generation, environment)
    found = []
    for name in sorted(built_with.keys() | set_here.keys()):
        want, have = built_with.get(name), set_here.get(name)
        if want == have:
            continue
        if have is None:
            # `cachebuilder env` and `run` set it for the serving process, which this one need not be.
            remedy = f"set {name}={want} in the serving process; cachebuilder env does"
            found.append(Difference(name, want, "not set", False, remedy))
        else:
            remedy = f"unset {name}, or build with it under environment: in the manifest"
            found.append(Difference(name, want or "not set", have, True, remedy))
    nvcc = variables.get(wanted.generation, environment, "JIT_NVCC_COMPILER")
    if frozen_nvcc and nvcc and nvcc[1] not in ("", frozen_nvcc):
        found.append(Difference(nvcc[0], frozen_nvcc, nvcc[1], False, "cachebuilder env names the frozen nvcc instead"))
    return found


def _shorten(text: str) -> str:
    return text if len(text) <= 69 else f"{text[:68]}…"
