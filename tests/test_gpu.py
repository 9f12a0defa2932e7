"""What can be said of the real GPU where there is none; tests/gpu is for where there is one."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest

from cachebuilder import building
from cachebuilder.cuda import gpus, nvml
from cachebuilder.errors import DeviceError
from cachebuilder.planning.selection import Range, Selection
from cachebuilder.sweep.protocol import Point
from cachebuilder.verifying import real
from cachebuilder.verifying import report as reports
from tests.conftest import Run
from tests.test_report import report_on


@pytest.mark.slow
@pytest.mark.skipif(nvml.first_gpu() is not None, reason="there is a GPU")
@pytest.mark.parametrize("deep_gemm", ["deepjit"], indirect=True, scope="session")
@pytest.mark.parametrize("verb", ["build", "verify"])
def test_without_a_gpu_cuda_is_one_sentence_and_auto_is_virtual(
    verb: str, built: building.Built, small: Path, run: Run, tmp_path: Path
) -> None:
    here = ["--deep-gemm", str(built.inputs.installation.imported_as)]
    output = tmp_path / "out.tar.zst"
    what = [small, "-o", output] if verb == "build" else [built.packed.path]
    done = run(verb, *what, *here, "--device", "cuda")
    assert done.returncode == 12 and "wanted the GPU H200, found no GPU to use" in done.stderr
    assert "--device virtual" in done.stderr and "Traceback" not in done.stderr
    assert not output.exists() and not reports.path_for(built.packed.path).exists()
    assert run(verb, *what, *here, "--device", "auto").returncode == 0


def test_kernels_are_tried_at_the_ends_of_the_ranges_that_select_them() -> None:
    ranges = tuple(Range(first=first, last=last, step=1) for first, last in ((1, 8), (20, 30), (40, 40)))
    one = Selection(op=0, sm_count=132, ranges=ranges)
    two = Selection(op=0, sm_count=132, ranges=(Range(first=8, last=19, step=1),))
    assert real.points({"a": [one], "b": [two]}) == {
        Point(op=0, sm_count=132, value=1): ("a",),
        Point(op=0, sm_count=132, value=8): ("a", "b"),
        Point(op=0, sm_count=132, value=19): ("b",),
        Point(op=0, sm_count=132, value=40): ("a",),
    }


def test_a_nan_is_a_wrong_result_in_the_written_report_and_no_reference_is_none(tmp_path: Path) -> None:
    """Both could become null in JSON, and then a wrong kernel would look like one that was only launched."""
    report = json.loads(json.dumps(report_on("0" * 64, "kernel")))
    [nan] = report["replays"][0]["trials"]
    nan |= {"relative_error": math.nan, "problems": ["d: relative error nan"]}
    report["replays"][0]["trials"].append(nan | {"relative_error": None, "problems": []})
    written = reports.GpuReport.model_validate_json(json.dumps(report)).to_json()
    (tmp_path / "report.json").write_text(written)
    assert not re.search(r"[^\"](NaN|Infinity)", written), "JSON has no such numbers"
    read = reports.read(tmp_path / "report.json", "0" * 64)
    assert read is not None and json.loads(written).keys() == report.keys()
    [replay] = read.replays
    assert [trial.value for trial in replay.wrong] == [1] and replay.worst == replay.wrong[0]
    assert replay.trials[1].relative_error is None and not replay.right
    with pytest.raises(DeviceError, match="at m 1: d: relative error nan"):
        replay.require_right("small.tar.zst", [])


@pytest.mark.parametrize(
    ("card", "gpu"),
    [
        ("NVIDIA H100 80GB HBM3", "H100-SXM"),
        ("NVIDIA H100 PCIe", "H100-PCIE"),
        ("NVIDIA H100 NVL", "H100-NVL"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA H20", "H20"),
        ("NVIDIA GH200 480GB", "GH200"),
        ("NVIDIA B200", "B200"),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", "RTX-PRO-6000"),
        ("NVIDIA GeForce RTX 5090", "RTX-5090"),
    ],
)
def test_a_card_is_known_by_the_name_that_its_driver_says(card: str, gpu: str) -> None:
    assert [known.name for known in gpus.GPUS.values() if known.is_called(card)] == [gpu]
