"""Two fingerprints, or one and what is found here, field by field: what differs, and what to do about it."""

from __future__ import annotations

from dataclasses import dataclass

from cachebuilder.artifact.index import Fingerprint
from cachebuilder.deepgemm.installation import Installation

#: For each field: what a difference does to serving, and the next step.
REMEDIES: dict[str, str] = {
    "generation": "the two read different cache layouts, nothing hits: build with the DeepGEMM that serves",
    "deep_gemm": "its code decides which kernels are asked for: build with the DeepGEMM that serves",
    "distribution": "binds nothing by itself",
    "headers": "every key holds the headers it includes: build with the DeepGEMM that serves",
    "cutlass": "DeepJIT's keys hold it: build with the DeepGEMM that serves",
    "compiler": "keys hold the compiler: let the frozen nvcc answer (cachebuilder env), or restore again",
    "arch": "keys hold it: build for the GPU that serves",
    "sm_counts": "kernels hold the SM count: add it to target.sm_counts in the manifest and build again",
    "environment": "these variables change keys: unset them, or give them in the manifest and build again",
    "install_include": "legacy keys hold the install path: restore again for it, which renames the entries",
    "legacy_flags": "legacy keys hold the flags: restore or build again with the DeepGEMM that serves",
}


@dataclass(frozen=True)
class Difference:
    """One field of a fingerprint that is not the same on both sides."""

    field: str
    wanted: object
    found: object

    @property
    def remedy(self) -> str:
        """What the difference does, and what to do next."""
        return REMEDIES[self.field]


def between(wanted: Fingerprint, found: Fingerprint) -> list[Difference]:
    """Every field that differs, in the fingerprint's own order."""
    return _differences(wanted, found.model_dump(mode="json"))


def against(wanted: Fingerprint, **found: object) -> list[Difference]:
    """How ``wanted`` differs from ``found``; fields that are not given are not compared."""
    return _differences(wanted, found)


def against_installation(wanted: Fingerprint, installation: Installation, **found: object) -> list[Difference]:
    """How ``wanted`` differs from a DeepGEMM copy and from what else is known here.

    Args:
        found: fields of the fingerprint that are known here beside DeepGEMM's own: ``compiler``, ``sm_counts``,
            ``environment``, ``arch``. Those left out are not compared.

    Raises:
        InstallationError: the copy is of neither generation.
    """
    here: dict[str, object] = {
        "generation": installation.generation,
        "deep_gemm": installation.version,
        "headers": installation.headers_digest,
        "cutlass": installation.cutlass_version,
    }
    if wanted.generation == installation.generation == "legacy":
        here["install_include"] = str(installation.include)
    return _differences(wanted, here | found)


def _differences(wanted: Fingerprint, found: dict[str, object]) -> list[Difference]:
    ours = wanted.model_dump(mode="json")
    return [
        Difference(field, ours[field], found[field]) for field in ours if field in found and ours[field] != found[field]
    ]
