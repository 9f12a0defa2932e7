"""A restored folder for tests of what comes after a restore: the real restore, whatever DeepGEMM is here."""

from __future__ import annotations

from pathlib import Path

from cachebuilder.deepgemm.installation import Installation
from cachebuilder.restoring.entries import restore
from cachebuilder.verifying.report import Report
from cachebuilder.verifying.verify import verify


def unpack(artifact: Path, to: Path) -> Path:
    """``artifact`` restored into ``to`` for the place it was built for."""
    restore([artifact], to, None, force=True)
    return to


def check(target: Path, installation: Installation, manifest: Path | None = None) -> Report:
    """What `cachebuilder verify` finds."""
    return verify(target, deep_gemm=installation.imported_as, manifest=manifest)
