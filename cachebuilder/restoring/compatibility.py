"""How two fingerprints differ, field by field, and what each difference means for serving."""

from __future__ import annotations

import json
import textwrap
from dataclasses import dataclass
from itertools import zip_longest

from cachebuilder.artifact.index import Fingerprint

#: For each field of the fingerprint: what a difference does to serving, and the next step.
_REMEDIES: dict[str, str] = {
    "generation": "each generation reads its own cache layout, no kernel would be found: build with the DeepGEMM that "
    "serves",
    "deep_gemm": "its code decides which kernels it asks for: build with the DeepGEMM that serves",
    "headers": "every key holds a hash of the headers: build with the DeepGEMM that serves",
    "cutlass": "DeepJIT's keys hold it: build with the DeepGEMM that serves",
    "compiler": "keys hold the compiler's text: let the frozen nvcc answer (cachebuilder env), or restore again",
    "arch": "keys hold it: build for the GPU that serves (target.gpu in the manifest)",
    "sm_counts": "kernels hold the SM count: add it to target.sm_counts, or an op's, in the manifest and build again",
    "environment": "these variables change kernels: unset them, or set them in the manifest and build again",
    "install_include": "legacy keys hold the install path: restore again for this path, which renames the entries",
    "legacy_flags": "legacy keys hold the flags: restore or build again with the DeepGEMM that serves",
}


@dataclass(frozen=True)
class Difference:
    """One field that is not the same on both sides.

    Attributes:
        causes_miss: DeepGEMM would not find kernels; a difference that causes no miss is only worth knowing.
        remedy: what the difference does, and what to do about it.
    """

    field: str
    wanted: object
    found: object
    causes_miss: bool
    remedy: str

    def lines(self) -> list[str]:
        """The difference for a person, within 80 columns; the first line is the field."""
        wanted, found = self.short()
        effect = "" if self.causes_miss else " (no miss by itself)"
        remedy = textwrap.wrap(self.remedy, 78, initial_indent="  remedy: ", subsequent_indent=" " * 10)
        return [f"{self.field}{effect}", f"  wanted: {wanted}", f"  found:  {found}", *remedy]

    def short(self) -> tuple[str, str]:
        """Both values in one line each: for texts of several lines, the first lines that differ."""
        wanted, found = (
            (value if isinstance(value, str) else json.dumps(value)).splitlines() for value in (self.wanted, self.found)
        )
        a, b = next(((a, b) for a, b in zip_longest(wanted, found, fillvalue="") if a != b), ("", ""))
        return _shorten(a), _shorten(b)


def difference(fingerprint: Fingerprint, field: str, wanted: object, found: object) -> Difference:
    """A difference in one field of a fingerprint, with its effect and its remedy."""
    # DeepJIT's keys hold CUTLASS's version (the extra signature), legacy's do not. No key holds the distribution.
    binds = field != "distribution" and (field != "cutlass" or fingerprint.generation == "deepjit")
    return Difference(field, wanted, found, binds, _REMEDIES[field] if binds else "nothing to do: no key holds it")


def between(wanted: Fingerprint, found: Fingerprint) -> list[Difference]:
    """Every field in which two fingerprints differ, in the fingerprint's own order."""
    a, b = wanted.model_dump(), found.model_dump()
    return [difference(wanted, field, a[field], b[field]) for field in a if a[field] != b[field]]


def _shorten(text: str) -> str:
    return text if len(text) <= 68 else f"{text[:67]}…"
