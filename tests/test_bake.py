"""An engine's other compilers fill their caches on a virtual GPU; a second start compiles nothing."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from cachebuilder.authoring.observe import engines, program
from cachebuilder.authoring.observe.bake import bake
from cachebuilder.common.progress import no_progress
from cachebuilder.cuda import gpus
from cachebuilder.errors import CompatibilityError, RecordingError
from cachebuilder.restoring import baked
from tests.conftest import Run
from tests.restored import unpack

GENERATIONS = ("deepjit",)
PROGRAM = Path(__file__).with_name("small_compiled.py")
STORED = Path(__file__).parent / "data" / "v1-legacy.tar.zst"
COMPILERS = ("gcc", "g++", "cc", "c++", "clang", "nvcc", "ptxas")

needs_headers = pytest.mark.skipif(
    not Path(sysconfig.get_path("include"), "Python.h").exists(), reason="Triton's launcher wants Python.h"
)


def refusing(folder: Path, calls: Path) -> dict[str, str]:
    """Variables by which every compiler that is called is written down and fails; a question for its version does not."""
    import triton

    folder.mkdir()
    ptxas = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    for name in COMPILERS:
        if real := (ptxas if name == "ptxas" else shutil.which(name)):
            text = f'#!/bin/sh\n[ "$*" = --version ] && exec {real} --version\necho "{name} $*" >>{calls}\nexit 77\n'
            (folder / name).write_text(text)
            (folder / name).chmod(0o755)
    return {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}", "TRITON_PTXAS_PATH": str(folder / "ptxas")}


@pytest.mark.slow
@needs_headers
def test_a_start_on_restored_baked_caches_calls_no_compiler(tmp_path: Path, run: Run) -> None:
    dir, artifact = unpack(STORED, tmp_path / "restored"), tmp_path / "baked.tar.zst"
    options = ("--gpu", "H200", "--artifact", STORED, "-o", artifact)
    done = run("bake", dir, *options, "--", sys.executable, PROGRAM)
    assert done.returncode == 0, done.stderr
    assert "the card chooses at its first start" in done.stdout
    assert list((dir / baked.FOLDER / "triton").rglob("*.cubin"))
    assert not list((dir / baked.FOLDER).rglob("*.best_config")), "a choice by timing was kept"

    dir.rename(tmp_path / "where it was baked")
    unpack(artifact, dir)
    calls = tmp_path / "calls"
    environment = os.environ | {name: value for name, (value, _) in baked.variables(dir).items()}
    environment |= refusing(tmp_path / "compilers", calls)
    (tmp_path / "work").mkdir()
    setting = program.Setting(gpus.find("H200"), None, tmp_path / "work", environment)
    program.run(engines.launch_to_bake([sys.executable, str(PROGRAM)], environment), setting, no_progress)
    assert "CACHES {'hit': 1, 'miss': 0}" in setting.log.read_text()
    assert not calls.exists(), calls.read_text()
    # The wrappers do refuse: without the caches, the same program ends there.
    bare = os.environ | refusing(tmp_path / "again", calls) | {"TRITON_CACHE_DIR": str(tmp_path / "empty")}
    (tmp_path / "bare").mkdir()
    with pytest.raises(RecordingError):
        program.run(
            engines.launch_to_bake([sys.executable, str(PROGRAM)], bare),
            program.Setting(gpus.find("H200"), None, tmp_path / "bare", bare),
            no_progress,
        )
    assert calls.exists()


@pytest.mark.slow
@needs_headers
def test_a_kernel_has_the_registers_that_its_cubin_has(tmp_path: Path) -> None:
    """Inductor compiles another candidate of a kernel that has many."""
    import triton

    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path / "triton")}
    setting = program.Setting(gpus.find("H200"), None, tmp_path, environment)
    program.run(engines.launch_to_bake([sys.executable, str(PROGRAM)], environment), setting, no_progress)
    (cubin,) = (tmp_path / "triton").rglob("add_one.cubin")
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    printed = subprocess.run([cuobjdump, "-res-usage", cubin], check=True, capture_output=True, text=True).stdout
    registers = re.search(r"REG:(\d+)", printed)
    assert registers, printed
    assert f"REGISTERS {registers[1]} {registers[1]}\n" in setting.log.read_text()


def baked_by_nothing(dir: Path, environment: dict[str, str]) -> Path:
    """A restored folder in which a program that compiles nothing was baked."""
    record = baked.record(dir, "true", "NVIDIA H200", environment)
    (dir / baked.FOLDER / "triton").mkdir(parents=True)
    (dir / baked.FOLDER / baked.RECORD).write_text(record.to_json())
    return dir


@pytest.mark.parametrize(
    ("changed", "line"),
    [
        ({"CXX": "/opt/gcc/bin/g++"}, "CXX: wanted not set, found /opt/gcc/bin/g++"),
        ({"HOME": "/home/other"}, "HOME: wanted /root, found /home/other"),
        ({"TORCHINDUCTOR_MAX_AUTOTUNE": "1"}, "TORCHINDUCTOR_MAX_AUTOTUNE: wanted not set, found 1"),
    ],
)
def test_a_variable_that_a_key_holds_is_compared(tmp_path: Path, changed: dict[str, str], line: str) -> None:
    dir = baked_by_nothing(tmp_path, {"HOME": "/root"})
    baked.require_fit(dir, {"HOME": "/root", "TRITON_CACHE_DIR": "/x"})
    with pytest.raises(CompatibilityError) as caught:
        baked.require_fit(dir, {"HOME": "/root"} | changed)
    assert line in str(caught.value)


def test_variables_that_vllm_hashed_are_compared_and_a_secret_is_not_kept(tmp_path: Path) -> None:
    folder = tmp_path / baked.FOLDER / "vllm" / "torch_compile_cache" / "0" / "rank_0_0" / "backbone"
    folder.mkdir(parents=True)
    names = {"VLLM_API_KEY": None, "VLLM_MLA_DISABLE": False}
    (folder / "cache_key_factors.json").write_text(json.dumps({"env": names}))
    dir = baked_by_nothing(tmp_path, {"VLLM_API_KEY": "hidden", "VLLM_PORT": "1"})
    assert "hidden" not in (dir / baked.FOLDER / baked.RECORD).read_text()
    baked.require_fit(dir, {"VLLM_API_KEY": "hidden", "VLLM_PORT": "2"})
    with pytest.raises(CompatibilityError, match="VLLM_MLA_DISABLE: wanted not set, found 1"):
        baked.require_fit(dir, {"VLLM_API_KEY": "hidden", "VLLM_MLA_DISABLE": "1"})


def test_env_leads_to_the_caches_and_refuses_another_folder(tmp_path: Path, run: Run) -> None:
    dir = baked_by_nothing(unpack(STORED, tmp_path / "restored"), dict(os.environ))
    done = run("env", dir, "--format", "json")
    assert json.loads(done.stdout)["TRITON_CACHE_DIR"] == str(dir / baked.FOLDER / "triton"), done.stderr
    moved = dir.rename(tmp_path / "moved")
    done = run("env", moved)
    assert done.returncode == CompatibilityError.exit_code
    assert f"folder: wanted {dir}, found {moved}" in done.stderr


@pytest.mark.slow
def test_run_refuses_another_folder_unless_it_is_forced(artifact: Path, tmp_path: Path, run: Run) -> None:
    dir = baked_by_nothing(unpack(artifact, tmp_path / "restored"), dict(os.environ))
    done = run("run", dir, "--", sys.executable, "-c", "import os; print(os.environ['TRITON_CACHE_DIR'])")
    assert done.stdout.strip() == str(dir / baked.FOLDER / "triton"), done.stderr
    moved = dir.rename(tmp_path / "moved")
    done = run("run", moved, "--", "true")
    assert done.returncode == CompatibilityError.exit_code
    assert f"folder: wanted {dir}, found {moved}" in done.stderr
    assert run("run", moved, "--force", "--", "true").returncode == 0


def test_a_command_for_several_gpus_cannot_be_baked(tmp_path: Path) -> None:
    with pytest.raises(RecordingError, match="wanted a command for one GPU, found --tensor-parallel-size 8"):
        bake(tmp_path, ["vllm", "serve", "m", "--tensor-parallel-size", "8"], gpus.find("H200"), {})


def test_what_is_changed_in_vllms_command_is_in_no_key(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    launch = engines.launch_to_bake(["vllm", "serve", str(tmp_path)], {})
    assert [change.what.split()[0] for change in launch.changes] == [
        "--load-format", "--skip-tokenizer-init", "--port", "VLLM_NO_USAGE_STATS=1",
    ]  # fmt: skip
