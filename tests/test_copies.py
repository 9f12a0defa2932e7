"""Copies of DeepGEMM: which one is found, what a person reads of one that is none, and kernels that cannot be built."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cachebuilder import building
from cachebuilder.cuda import toolchain as toolchains
from cachebuilder.deepgemm import installation as installations
from cachebuilder.errors import InstallationError, PlanError, RecordingError
from cachebuilder.sweep.recorder import Newcomers, read_entries, recording_compiler
from tests.conftest import Run
from tests.restored import copy_of

DEEP_JIT = Path(__file__).parent / "data" / "deep_jit"


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


@pytest.fixture(scope="module")
def hooked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A program that compiles one kernel with DeepJIT's own code and a post-hook."""
    dry = [toolchains.find().nvcc, "--dryrun", "-c", "kernel.cu"]
    top = re.search(r"TOP=(.*)", subprocess.run(dry, capture_output=True, text=True, check=False).stderr)
    headers = Path(top[1] if top else "/usr/local/cuda").resolve() / "include"
    compiler, torch = shutil.which("g++"), installations.package_folder("torch")
    if compiler is None or torch is None or not (headers / "cuda_runtime.h").is_file():
        pytest.skip("wants g++, torch and the CUDA toolkit's headers")
    program = tmp_path_factory.mktemp("deep_jit") / "hooked"
    include = installations.find().include
    folders = [f"-I{folder}" for folder in (DEEP_JIT, include, torch / "include", headers)]
    libraries = [
        f"-L{headers.parent}/lib64",
        f"-L{torch}/lib",
        f"-Wl,-rpath,{torch}/lib",
        f"-Wl,-rpath,{headers.parent}/lib64",
    ]
    names = ["-lcudart", "-ltorch", "-ltorch_cpu", "-ltorch_cuda", "-lc10", "-ldl"]
    command = [
        compiler,
        "-std=c++20",
        "-O0",
        *folders,
        str(DEEP_JIT / "hooked.cpp"),
        "-o",
        str(program),
        *libraries,
        *names,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return program


@pytest.mark.slow
def test_a_kernel_that_deepjit_changes_after_nvcc_is_refused(run: Run, hooked: Path, tmp_path: Path) -> None:
    library, root = tmp_path / "library", tmp_path / "root"
    (library / "jit_hooks").mkdir(parents=True)
    (library / "jit_hooks" / "hook.py").write_text("import sys\nopen(sys.argv[1], 'a').write('changed')\n")
    entry = root / "cache" / f"sm90_fp8_gemm_1d2d.{'0' * 32}"
    entry.mkdir(parents=True)
    compiler = recording_compiler(tmp_path, toolchains.find().version_text)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # DeepJIT runs the program with `python`
    variables = {"CUDA_HOME": str(compiler.home), "DG_JIT_NVCC_COMPILER": str(compiler.nvcc), "PATH": path}
    subprocess.run([hooked, library, entry], env=os.environ | variables, check=True)
    assert (entry / "kernel.cubin").read_text().endswith("changed")
    wanted = rf"{entry.name}: .* changes after nvcc, by jit_hooks/hook\.py"
    for read in (lambda: read_entries(root, "deepjit"), lambda: list(Newcomers(root, "deepjit").take())):
        with pytest.raises(PlanError, match=wanted):
            read()

    (entry / ".committed").touch()
    program = f'mkdir -p "$DG_JIT_CACHE_DIR/cache" && cp -r {entry} "$DG_JIT_CACHE_DIR/cache/"'
    done = run("record", "-o", tmp_path / "m.yaml", "--gpu", "H200", "--", "sh", "-c", program)
    assert "changes after nvcc, by jit_hooks/hook.py" in " ".join(done.stderr.split()), done.stderr
    assert done.returncode == RecordingError.exit_code and not (tmp_path / "m.yaml").exists()

    meta = json.loads((entry / "meta.json").read_text())
    meta["compiler_options"]["post_hook"] = None  # as in the meta.json of every kernel that DeepGEMM has today
    (entry / "meta.json").write_text(json.dumps(meta))
    assert list(read_entries(root, "deepjit")) == [entry.name]
