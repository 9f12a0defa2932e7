"""The report: what it gathers, and the page that it writes."""

import json
import shutil
from pathlib import Path

import pytest

from cachebuilder import verified
from cachebuilder.build import Built
from cachebuilder.errors import ArtifactError
from cachebuilder.report import facts


def report_on(sha256: str, entry: str) -> dict[str, object]:
    """A report as `verify --device cuda` writes it, of one trial."""
    trial = {
        "op": "fp8_gemm_nt",
        "shape": "n=576 k=512",
        "sm_count": 132,
        "variable": "m",
        "value": 1,
        "kernels": [entry],
        "relative_error": 1.7e-3,
        "worst_row_error": 2e-3,
        "microseconds": 8.1,
        "problems": [],
    }
    return {
        "schema_version": 1,
        "artifact": {"name": "small", "sha256": sha256, "fingerprint_digest": "0"},
        "right": True,
        "device": {"name": "NVIDIA H200", "driver": "580"},
        "torch": "2.11.0",
        "deep_gemm": "2.8.1",
        "cachebuilder": "0.1.0",
        "replays": [{"manifest": "small", "calls": 43, "missed": [], "refusals": [], "trials": [trial]}],
    }


def test_facts_of_an_artifact_are_its_kernels_with_what_the_cubins_say(built: Built) -> None:
    found = facts.gather(built.packed.path)
    assert found.kind == "artifact" and found.sha256 == built.packed.sha256 and found.size == built.packed.size
    assert {kernel.entry for kernel in found.kernels} == {kernel.entry for kernel in built.plan.kernels}
    assert all(kernel.resources and kernel.resources.registers > 0 and kernel.size for kernel in found.kernels)
    assert found.build is not None and found.verified is None
    assert found.ops[0].title.startswith("fp8_gemm_nt n=576 k=512")
    gemm = next(kernel for kernel in found.kernels if "gemm" in kernel.name)
    assert set(gemm.highlights) == {"block", "stages", "cluster"}


def test_facts_of_a_plan_have_no_cubins(built: Built, tmp_path: Path) -> None:
    (path := tmp_path / "plan.json").write_text(built.plan.model_dump_json(exclude_none=True))
    found = facts.gather(path)
    assert found.kind == "plan" and len(found.kernels) == len(built.plan.kernels)
    assert all(kernel.resources is None for kernel in found.kernels)


def test_a_verify_report_is_read_where_it_is_of_these_bytes(built: Built, tmp_path: Path) -> None:
    artifact = Path(shutil.copy(built.packed.path, tmp_path / "small.tar.zst"))
    beside, entry = verified.path_for(artifact), built.plan.kernels[0].entry
    beside.write_text(json.dumps(report_on(built.packed.sha256, entry)))
    found = facts.gather(artifact).verified
    assert found is not None and found.replays[0].trials[0].relative_error == 1.7e-3
    beside.write_text(json.dumps(report_on("0" * 64, entry)))
    assert facts.gather(artifact).verified is None
    with pytest.raises(ArtifactError, match="wanted the report of verify"):
        facts.gather(artifact, beside)


@pytest.mark.parametrize("text", ["{}", "{", '{"kernels": 1}', "plain"])
def test_what_is_neither_artifact_nor_plan_is_refused(tmp_path: Path, text: str) -> None:
    (path := tmp_path / "file").write_text(text)
    with pytest.raises(ArtifactError):
        facts.gather(path)


def test_changes_against_the_same_artifact_are_none(built: Built) -> None:
    found = facts.gather(built.packed.path)
    changes = facts.compare(found, found)
    assert not (changes.fields or changes.added or changes.removed or changes.changed)
    assert changes.equal == len(found.kernels)
