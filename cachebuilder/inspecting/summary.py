"""Summarises an artifact from its index, and from the report of a GPU where one lies beside it."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from cachebuilder.artifact.index import MAX_REPORT_BYTES, Index
from cachebuilder.artifact.read import read_index
from cachebuilder.common.folders import read_regular
from cachebuilder.deepgemm import entries as entry_files
from cachebuilder.verifying import report
from cachebuilder.verifying.report import GpuReport


@dataclass(frozen=True)
class Verdict:
    """What ``verify --device cuda`` reported; ``right``: every kernel of these bytes was right on the GPU."""

    right: bool
    text: str


@dataclass(frozen=True)
class Summary:
    """An artifact, with sizes in bytes.

    Attributes:
        families: number of kernels by DeepGEMM's name for their family.
        verdict: None where no report lies beside the artifact.
    """

    index: Index
    sha256: str
    size: int
    unpacked_size: int
    families: Mapping[str, int]
    verdict: Verdict | None


def summarise(artifact: Path) -> Summary:
    """The summary of ``artifact``. Raises `ArtifactError` where it cannot be read or is damaged."""
    index = read_index(artifact)
    with artifact.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    generation = index.fingerprint.generation
    return Summary(
        index=index,
        sha256=sha256,
        size=artifact.stat().st_size,
        unpacked_size=index.unpacked_size,
        families=Counter(entry_files.kernel_name(generation, entry.name) or entry.name for entry in index.entries),
        verdict=_verdict(report.path_for(artifact), sha256),
    )


def _verdict(path: Path, sha256: str) -> Verdict | None:
    try:
        verified = GpuReport.model_validate_json(read_regular(path, MAX_REPORT_BYTES))
    except FileNotFoundError:
        return None
    except (OSError, ValidationError):
        return Verdict(False, f"{path.name} cannot be read")
    if verified.artifact.sha256 != sha256:
        return Verdict(False, f"{path.name} is of another artifact")
    calls = sum(replay.calls for replay in verified.replays)
    word = "right" if verified.right else "WRONG"
    return Verdict(verified.right, f"{word} on {verified.device.name}, {calls} calls ({path.name})")
