"""A restored folder for tests of what comes after a restore: the real restore, whatever DeepGEMM is here."""

from __future__ import annotations

from pathlib import Path

from cachebuilder.restore import restore


def unpack(artifact: Path, to: Path) -> Path:
    """``artifact`` restored into ``to`` for the place it was built for."""
    restore([artifact], to, None, force=True)
    return to
