"""On the GPU that the kernels are for: `tests/gpu/run.sh` runs these, and whole models after them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cachebuilder import building
from cachebuilder.cuda import gpus, nvml
from cachebuilder.sweep import run as sweep
from cachebuilder.sweep.process import Compiler, Setting
from cachebuilder.sweep.protocol import SweepJob
from cachebuilder.verifying import report as reports
from tests.conftest import SMALL, TARGET, Run

GPU = nvml.first_gpu()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        GPU is None or not gpus.find(TARGET).is_called(GPU.name),
        reason=f"wants the GPU {TARGET} (CACHEBUILDER_TEST_GPU names another), found {GPU.name if GPU else 'none'}",
    ),
]


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
    report = json.loads(reports.path_for(real).read_text())
    assert report["right"] and report["replays"][0]["trials"]
    assert {kernel for trial in report["replays"][0]["trials"] for kernel in trial["kernels"]} == {
        entry["name"] for entry in json.loads(run("inspect", real, "--json").stdout)["entries"]
    }
    assert "verified" in run("inspect", real).stdout


def test_deepgemm_left_alone_with_nvcc_makes_exactly_the_planned_entries(built: building.Built, tmp_path: Path) -> None:
    nvcc = built.inputs.toolchain.nvcc
    (root := tmp_path / "root").mkdir()
    job = SweepJob.of(built.inputs.manifest, built.inputs.installation, "cuda", self_check=False)
    sweep.call(job, Setting("compile", Compiler(nvcc, nvcc.parents[1]), [root], tmp_path))
    made = {folder.name for folder in (root / "cache").iterdir()}
    assert made == {kernel.entry for kernel in built.plan.kernels}


def test_another_target_is_refused(deep_gemm: Path | None, run: Run, tmp_path: Path) -> None:
    here = ["--deep-gemm", str(deep_gemm)] if deep_gemm else []
    (tmp_path / "m.yaml").write_text(SMALL.replace(f"gpu: {TARGET}", "gpu: H20"))
    done = run("build", tmp_path / "m.yaml", "-o", tmp_path / "out.tar.zst", "--device", "cuda", *here)
    assert done.returncode == 12 and "SMs: wanted 78, found 132" in done.stderr


def test_a_shape_that_does_not_fit_is_named_and_nothing_is_written(
    deep_gemm: Path | None, run: Run, tmp_path: Path
) -> None:
    here = ["--deep-gemm", str(deep_gemm)] if deep_gemm else []
    op = "{op: m_grouped_fp8_gemm_nt_masked, experts: 256, max_m: 64, n: 65536, k: 65536}"
    (tmp_path / "m.yaml").write_text(f"name: large\ntarget: {{gpu: {TARGET}}}\nmax_tokens: 64\nops: [{op}]")
    done = run("build", tmp_path / "m.yaml", "-o", tmp_path / "out.tar.zst", "--device", "cuda", *here)
    assert done.returncode == 12 and "n=65536 k=65536" in done.stderr and "does not fit" in done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "out.tar.zst").exists()
