"""Copies of DeepGEMM: which one is found, what a person reads of one that is none, and kernels that cannot be built."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from cachebuilder import building
from cachebuilder.deepgemm import installation as installations
from cachebuilder.errors import InstallationError, PlanError
from cachebuilder.sweep.recorder import Newcomers, read_entries
from tests.conftest import Run
from tests.restored import copy_of, unpack


def install(site: Path, distribution: str, version: str, package: Path) -> None:
    """Write the record by which pip knows that ``package`` came with ``distribution``."""
    folder = site / f"{distribution.replace('-', '_')}-{version}.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
    (folder / "RECORD").write_text(f"{package.name}/__init__.py,,\n")


def test_a_package_without_the_kernels_headers_is_named_with_what_to_install(run: Run, tmp_path: Path) -> None:
    # The files of PyPI's deep-gemm 1.0.0: Python only. Its own setup.py fails, since it lacks third-party/cutlass.
    package = tmp_path / "deep_gemm"
    (package / "jit_kernels").mkdir(parents=True)
    (package / "__init__.py").write_text("from .jit_kernels import gemm_fp8_fp8_bf16_nt\n")
    install(tmp_path, "deep-gemm", "1.0.0", package)
    for done in (
        run("doctor", "--deep-gemm", package),
        run("plan", "manifests/quickstart.yaml", "--deep-gemm", package),
    ):
        said = " ".join((done.stdout + done.stderr).split())
        assert f"headers in include/deep_gemm, found none in {package}, from deep-gemm 1.0.0" in said
        assert "Traceback" not in said
    with pytest.raises(InstallationError) as caught:
        installations.find(package)
    assert caught.value.hint and caught.value.hint.startswith(
        "pip uninstall deep-gemm, then pip install sgl-deep-gemm or tokenspeed-deepgemm"
    )


def test_a_copy_without_a_compiled_extension_is_too_old(deep_gemm: Path | None, tmp_path: Path) -> None:
    here = installations.find(deep_gemm)
    (tmp_path / "deep_gemm" / "include").mkdir(parents=True)
    (tmp_path / "deep_gemm" / "include" / "deep_gemm").symlink_to(here.include / "deep_gemm")
    (tmp_path / "deep_gemm" / "__init__.py").touch()
    with pytest.raises(InstallationError, match=r"compiled extension _C\*\.so, found none in") as caught:
        installations.find(tmp_path / "deep_gemm").generation  # noqa: B018
    assert caught.value.hint and "DeepGEMM 1.0 and 2.0 have none" in caught.value.hint


def test_the_distribution_that_brought_a_copy_is_named(built: building.Built, tmp_path: Path) -> None:
    copy = copy_of(built.inputs.installation, tmp_path / "deep_gemm")
    install(tmp_path, "tokenspeed-deepgemm", "2.8.2.post20261020", copy.path)
    assert copy.distribution == "tokenspeed-deepgemm 2.8.2.post20261020"
    assert str(copy).startswith(f"DeepGEMM {copy.version} (tokenspeed-deepgemm 2.8.2.post20261020, ")


def test_a_kernel_that_deepgemm_changes_after_nvcc_is_refused(built: building.Built, tmp_path: Path) -> None:
    if built.plan.generation == "legacy":
        pytest.skip("legacy DeepGEMM has no such programs")
    folder = unpack(built.packed.path, tmp_path / "root")
    first, *others = sorted((folder / "cache").iterdir())
    shutil.rmtree(folder / "cachebuilder")
    for entry in (first, *others):  # what the recording compiler writes beside the source
        entry.chmod(0o755)
        (entry / "command.txt").write_text(f"{entry}/kernel.cu --cubin --output-file {entry}/kernel.cubin -O3\n")
    assert len(read_entries(folder, "deepjit")) == len(others) + 1
    meta = json.loads((first / "meta.json").read_text())
    meta["compiler_options"]["post_hook"] = "jit_hooks/interleave.py"
    (first / "meta.json").chmod(0o644)
    (first / "meta.json").write_text(json.dumps(meta))
    for read in (lambda: read_entries(folder, "deepjit"), lambda: list(Newcomers(folder, "deepjit").take())):
        with pytest.raises(PlanError, match=rf"{first.name}: .* changes after nvcc, by jit_hooks/interleave\.py"):
            read()
