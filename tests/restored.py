"""A restored folder for tests of what comes after a restore, and copies of a DeepGEMM for tests of what fits."""

from __future__ import annotations

import shutil
from pathlib import Path

from cachebuilder.deepgemm import installation as installations
from cachebuilder.deepgemm.installation import Installation
from cachebuilder.restoring.machine import Machine
from cachebuilder.restoring.restore import restore
from cachebuilder.verifying.report import Report
from cachebuilder.verifying.verify import verify


def unpack(artifact: Path, to: Path) -> Path:
    """``artifact`` restored into ``to`` for the path it was built for."""
    restore([artifact], to, machine=Machine(None), force=True)
    return to


def check(target: Path, installation: Installation, manifest: Path | None = None) -> Report:
    """What `cachebuilder verify` finds."""
    return verify(target, deep_gemm=installation.imported_as, manifest=manifest)


def copy_of(installation: Installation, to: Path) -> Installation:
    """Another copy on disk. Its extension is a link, since it is large and nothing here changes it."""
    for file in installation.path.rglob("*"):
        target = to / file.relative_to(installation.path)
        if file.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            if file.suffix == ".so":
                target.hardlink_to(file) if file.stat().st_dev == to.parent.stat().st_dev else shutil.copy(file, target)
            else:
                shutil.copy(file, target)
    for beside in installation.path.parent.glob("*tvm_ffi*"):  # the legacy copy's own dependency
        if not (to.parent / beside.name).exists():
            (to.parent / beside.name).symlink_to(beside)
    return installations.find(to)
