"""The examples' Dockerfiles, run without a container engine: their own commands, in folders of a test."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cachebuilder import building
from tests.conftest import ROOT

DOCKERFILES = sorted((ROOT / "examples").glob("Dockerfile.*"))


@pytest.mark.slow
@pytest.mark.parametrize("deep_gemm", ["deepjit"], indirect=True, scope="session")
@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)
def test_its_commands_restore_and_prove_the_cache_and_its_environment_serves(
    dockerfile: Path, built: building.Built, tmp_path: Path
) -> None:
    root, home = tmp_path / "deep_gemm", tmp_path / "home"
    text = dockerfile.read_text().replace("/tmp/", f"{tmp_path}/").replace("/opt/deep_gemm", str(root))
    commands = re.findall(r"^RUN (cachebuilder .*)$", text, re.MULTILINE)
    variables = dict(re.findall(r"^ENV (\w+)=(.*)$", text, re.MULTILINE))
    assert len(commands) == 2
    shutil.copy(built.packed.path, tmp_path / "artifact.tar.zst")
    (home / ".cache").mkdir(parents=True)
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("CACHEBUILDER_", "XDG_", "DG_"))}
    clean |= {"HOME": str(home), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    said = ""
    for command in commands:
        done = subprocess.run(["sh", "-ec", command], capture_output=True, text=True, env=clean, check=False)
        assert done.returncode == 0, done.stderr
        said += done.stdout + done.stderr
    assert "0 missing" in said
    assert not (tmp_path / "artifact.tar.zst").exists() and list((home / ".cache").iterdir()) == []
    nvcc = variables["DG_JIT_NVCC_COMPILER"]
    answer = subprocess.run([nvcc, "--version"], capture_output=True, text=True, env={}, check=True)
    assert answer.stdout == built.inputs.toolchain.version_text
    assert variables["DG_JIT_CACHE_DIR"].split(":")[-1] == str(root)
    assert {path.name for path in (root / "cache").iterdir()} == {kernel.entry for kernel in built.plan.kernels}
