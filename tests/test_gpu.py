"""On a real GPU where there is one; elsewhere, that asking for one is a clear error.

benchmarks/gpu/truth.py does the same for whole models.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cachebuilder import build as building
from cachebuilder import nvml, on_gpu, verified
from cachebuilder.plan import Range, Selection
from cachebuilder.sweep import Point
from tests.conftest import SMALL, Run

GPU = nvml.first_gpu()
gpu = pytest.mark.skipif(GPU is None or "H200" not in GPU.name, reason="wants an H200; none is visible")


@pytest.mark.slow
@pytest.mark.skipif(GPU is not None, reason="there is a GPU")
@pytest.mark.parametrize("deep_gemm", ["deepjit"], indirect=True, scope="session")
@pytest.mark.parametrize("verb", ["build", "verify"])
def test_without_a_gpu_cuda_is_one_sentence_and_auto_is_virtual(
    verb: str, built: building.Built, small: Path, run: Run, tmp_path: Path
) -> None:
    here = ["--deep-gemm", str(built.inputs.installation.imported_as)]
    output = tmp_path / "out.tar.zst"
    what = [small, "-o", output] if verb == "build" else [built.packed.path]
    done = run(verb, *what, *here, "--device", "cuda")
    assert done.returncode == 12 and "wanted a H200, found no GPU to use" in done.stderr
    assert "--device virtual" in done.stderr and "Traceback" not in done.stderr
    assert not output.exists() and not verified.path_for(built.packed.path).exists()
    assert run(verb, *what, *here, "--device", "auto").returncode == 0


def test_kernels_are_tried_at_the_ends_of_the_ranges_that_select_them() -> None:
    ranges = tuple(Range(first=first, last=last, step=1) for first, last in ((1, 8), (20, 30), (40, 40)))
    one = Selection(op=0, sm_count=132, ranges=ranges)
    two = Selection(op=0, sm_count=132, ranges=(Range(first=8, last=19, step=1),))
    assert on_gpu.points({"a": [one], "b": [two]}) == {
        Point(0, 132, 1): ("a",),
        Point(0, 132, 8): ("a", "b"),
        Point(0, 132, 19): ("b",),
        Point(0, 132, 40): ("a",),
    }


@gpu
def test_the_gpu_asks_for_the_planned_kernels_and_each_is_right(
    deep_gemm: Path | None, small: Path, run: Run, tmp_path: Path
) -> None:
    here = ["--deep-gemm", str(deep_gemm)] if deep_gemm else []
    virtual, real = tmp_path / "virtual.tar.zst", tmp_path / "real.tar.zst"
    assert run("build", small, "-o", virtual, *here).returncode == 0
    done = run("build", small, "-o", real, *here, "--device", "cuda")
    assert done.returncode == 0, done.stderr
    assert real.read_bytes() == virtual.read_bytes()
    done = run("verify", real, *here, "--device", "cuda")
    assert done.returncode == 0, done.stderr
    report = json.loads(verified.path_for(real).read_text())
    assert report["right"] and report["replays"][0]["trials"]
    assert "verified" in run("inspect", real).stdout


@gpu
def test_another_target_is_refused(run: Run, tmp_path: Path) -> None:
    (tmp_path / "m.yaml").write_text(SMALL.replace("gpu: H200", "gpu: H20"))
    done = run("build", tmp_path / "m.yaml", "-o", tmp_path / "out.tar.zst", "--device", "cuda")
    assert done.returncode == 12 and "SMs: wanted 78, found 132" in done.stderr
