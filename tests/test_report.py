"""The report: what it gathers, and the page that it writes."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cachebuilder.building import Built
from cachebuilder.compiling import record as build_record
from cachebuilder.errors import ArtifactError
from cachebuilder.inspecting.report import facts, page
from cachebuilder.verifying import report as verified
from tests.conftest import ROOT, Run

pytestmark = pytest.mark.slow


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
        "reference_microseconds": 9.7,
        "problems": [],
    }
    return {
        "schema_version": 1,
        "artifact": {"name": "small", "sha256": sha256, "fingerprint_digest": "0"},
        "right": True,
        "device": {
            "name": "NVIDIA H200",
            "capability": "9.0",
            "sm_count": 132,
            "l2_bytes": 62914560,
            "shared_memory_bytes": 232448,
            "memory_bytes": 150_000_000_000,
            "driver": "580",
        },
        "torch": "2.11.0",
        "deep_gemm": "2.8.1",
        "cachebuilder": "0.1.0",
        "replays": [{"manifest": "small", "calls": 43, "missed": [], "refusals": [], "trials": [trial]}],
    }


def test_facts_of_an_artifact_are_its_kernels_with_what_the_cubins_say(built: Built) -> None:
    gathered = facts.gather(built.packed.path)
    assert gathered.kind == "artifact" and gathered.sha256 == built.packed.sha256 and gathered.size == built.packed.size
    assert {kernel.entry for kernel in gathered.kernels} == {kernel.entry for kernel in built.plan.kernels}
    assert all(kernel.resources and kernel.resources.registers > 0 and kernel.size for kernel in gathered.kernels)
    assert gathered.build is not None and gathered.verified is None
    assert gathered.ops[0].title.startswith("fp8_gemm_nt n=576 k=512")
    gemm = next(kernel for kernel in gathered.kernels if "gemm" in kernel.name)
    assert set(gemm.highlights) == {"block", "stages", "cluster"}


def test_facts_of_a_plan_have_no_cubins(built: Built, tmp_path: Path) -> None:
    (path := tmp_path / "plan.json").write_text(built.plan.model_dump_json(exclude_none=True))
    gathered = facts.gather(path)
    assert gathered.kind == "plan" and len(gathered.kernels) == len(built.plan.kernels)
    assert all(kernel.resources is None for kernel in gathered.kernels)


def test_a_verify_report_is_read_where_it_is_of_these_bytes(built: Built, tmp_path: Path) -> None:
    artifact = Path(shutil.copy(built.packed.path, tmp_path / "small.tar.zst"))
    beside, entry = verified.path_for(artifact), built.plan.kernels[0].entry
    beside.write_text(json.dumps(report_on(built.packed.sha256, entry)))
    verified_facts = facts.gather(artifact).verified
    assert verified_facts is not None and verified_facts.replays[0].trials[0].relative_error == 1.7e-3
    beside.write_text(json.dumps(report_on("0" * 64, entry)))
    assert facts.gather(artifact).verified is None
    with pytest.raises(ArtifactError, match="wanted the report of verify"):
        facts.gather(artifact, beside)


@pytest.mark.parametrize("text", ["{}", "{", '{"kernels": 1}', "plain"])
def test_a_file_that_is_neither_artifact_nor_plan_is_refused(tmp_path: Path, text: str) -> None:
    (path := tmp_path / "file").write_text(text)
    with pytest.raises(ArtifactError):
        facts.gather(path)


def test_changes_against_the_same_artifact_are_none(built: Built) -> None:
    gathered = facts.gather(built.packed.path)
    changes = facts.compare(gathered, gathered)
    assert not (changes.fields or changes.added or changes.removed or changes.changed)
    assert changes.equal == len(gathered.kernels)


@pytest.fixture(scope="session")
def pages(built: Built, tmp_path_factory: pytest.TempPathFactory, run: Run) -> Path:
    """A folder with the small artifact, as it is after build and verify, its plan, and the report on each."""
    folder = tmp_path_factory.mktemp("report")
    artifact = Path(shutil.copy(built.packed.path, folder / "small.tar.zst"))
    record = build_record.path_for(built.packed.path)
    shutil.copy(record, build_record.path_for(artifact))
    gemm = next(kernel.entry for kernel in built.plan.kernels if "gemm" in kernel.name)
    verified.path_for(artifact).write_text(json.dumps(report_on(built.packed.sha256, gemm)))
    (folder / "plan.json").write_text(built.plan.model_dump_json(exclude_none=True))
    done = run("report", artifact, "-o", folder / "small.tar.zst.html", "--against", artifact)
    assert done.returncode == 0, done.stderr
    return folder


def test_the_page_holds_everything_and_is_one_small_file(pages: Path, built: Built) -> None:
    text = (pages / "small.tar.zst.html").read_text()
    assert len(text) < 3_000_000
    for part in (
        "fp8_gemm_nt n=576 k=512",
        built.packed.sha256,
        "on NVIDIA H200",
        "Size by op",
        "torch in BF16",
        "cicc",
        "0 new, 0 gone",
    ):
        assert part in text
    assert all(kernel.entry[-32:][:8] in text for kernel in built.plan.kernels)
    own = text.replace(page.library(), "")
    assert not re.search(r"""(src|href)=(?!"#)|@import|url\(""", own), "the page loads something"


def test_a_plan_has_a_page_that_says_what_a_plan_lacks(pages: Path) -> None:
    plan = facts.gather(pages / "plan.json")
    text = page.render(plan, facts.compare(plan, plan))
    assert "report on a plan" in text and "nothing is built yet" in text and 'id="size"' not in text


def test_equal_artifacts_have_equal_pages(pages: Path) -> None:
    gathered = facts.gather(pages / "small.tar.zst")
    assert page.render(gathered, facts.compare(gathered, gathered)) == (pages / "small.tar.zst.html").read_text()


def test_names_in_an_artifact_cannot_become_code_of_the_page(built: Built, tmp_path: Path) -> None:
    evil = "</script><script>alert(1)</script>"
    plan = built.plan.model_copy(
        update={
            "ops": ({"op": evil, "n": "<img src=x onerror=alert(2)>"}, *built.plan.ops[1:]),
            "kernels": tuple(kernel.model_copy(update={"name": evil}) for kernel in built.plan.kernels),
        }
    )
    (path := tmp_path / "<b>plan.json").write_text(plan.model_dump_json(exclude_none=True))
    text = page.render(facts.gather(path)).replace(page.library(), "")
    assert "alert(1)" in text and evil not in text and "<img" not in text and "<b>plan" not in text


def test_a_kernel_that_writes_nan_is_reported_in_words(built: Built, tmp_path: Path) -> None:
    artifact = Path(shutil.copy(built.packed.path, tmp_path / "small.tar.zst"))
    report = report_on(built.packed.sha256, built.plan.kernels[0].entry)
    [replay] = report["replays"]  # type: ignore[misc]
    replay["trials"][0] |= {"relative_error": math.nan, "problems": ["d: relative error nan, wanted at most 5e-03"]}
    verified.path_for(artifact).write_text(json.dumps(report | {"right": False}))
    text = page.render(facts.gather(artifact))
    assert "WRONG" in text and "n=576 k=512 at m 1: d: relative error nan" in text


@pytest.mark.parametrize("selection", [{"op": 7}, {"ranges": ()}], ids=["no such op", "no point"])
def test_a_kernel_that_no_op_can_ask_for_is_refused(built: Built, tmp_path: Path, selection: dict[str, object]) -> None:
    [first, *others] = built.plan.kernels
    wrong = first.model_copy(update={"selected_by": (first.selected_by[0].model_copy(update=selection),)})
    path = tmp_path / "plan.json"
    path.write_text(built.plan.model_copy(update={"kernels": (wrong, *others)}).model_dump_json(exclude_none=True))
    with pytest.raises(ArtifactError, match="wanted kernels asked for by ops 0 to 1 at some points"):
        facts.gather(path)


@pytest.mark.parametrize("deep_gemm", ["deepjit"], indirect=True, scope="session")
def test_in_a_browser_it_is_drawn_without_complaint_and_the_tooltip_names_the_kernel(pages: Path) -> None:
    look = [
        sys.executable,
        str(ROOT / "tools" / "look.py"),
        str(pages / "small.tar.zst.html"),
        "--chromium",
        chromium(),
    ]
    done = subprocess.run(look, capture_output=True, text=True, check=False, timeout=180)
    looked = json.loads(done.stdout)
    assert done.returncode == 0 and not looked["problems"], looked
    assert looked["charts"] >= 5
    for word in ("block", "stages", "cluster", "cubin", "registers", "shared memory"):
        assert word in looked["tooltip"]


def chromium() -> str:
    """The path of a Chromium: this machine's, else Debian's, where it can be installed."""
    names = ("chromium", "chromium-browser", "google-chrome")
    if not any(map(shutil.which, names)) and os.geteuid() == 0 and shutil.which("apt-get"):
        for command in (
            ["apt-get", "update", "-q"],
            ["apt-get", "install", "-yq", "--no-install-recommends", "chromium"],
        ):
            subprocess.run(command, capture_output=True, check=False, timeout=240)
    browser = next((path for name in names if (path := shutil.which(name))), None)
    return browser or pytest.skip("no chromium on PATH, and apt-get did not install one")
