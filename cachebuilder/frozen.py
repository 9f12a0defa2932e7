"""The frozen nvcc of a restored folder: where it is, its policy and its log of misses."""

from __future__ import annotations

from pathlib import Path

#: What a compile request does: ``refuse`` (default), ``compile`` or ``compile-and-warn``.
POLICY_VARIABLE = "CACHEBUILDER_ON_MISS"
#: The file that misses are appended to, one JSON line each.
LOG_VARIABLE = "CACHEBUILDER_MISS_LOG"


def frozen_nvcc(folder: Path) -> Path:
    """The frozen compiler of the restored ``folder``."""
    return folder / "cachebuilder" / "bin" / "nvcc"
