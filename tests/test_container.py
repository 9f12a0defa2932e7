"""A serving container: another user than the one that restored, a read-only root file system, a mount without exec."""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from cachebuilder import building
from cachebuilder.errors import CompatibilityError, RestoreError
from cachebuilder.restoring import serving
from cachebuilder.restoring.machine import Machine
from cachebuilder.restoring.restore import restore
from cachebuilder.virtual_gpu import library as virtual_gpu
from tests.conftest import ROOT, Run, own_cache
from tests.containers import USER, Container, needs_container
from tests.restored import copy_of, unpack
from tests.users import ground

__all__ = ["ground"]  # a fixture

pytestmark = pytest.mark.slow

DOCKERFILES = sorted((ROOT / "examples").glob("Dockerfile.*"))

ENTERED = "cachebuilder", "run"
SHOW = ("--", "sh", "-c", 'echo "$DG_JIT_CACHE_DIR" && "$DG_JIT_NVCC_COMPILER" --version | head -1')
#: Calls of DeepGEMM, for each argument after the folder that holds deep_gemm: a dense product with as many rows, or for
#: "another" a small kernel that no artifact holds. An argument NAME=VALUE sets a variable, which the next call of nvcc
#: inherits.
CALL = """
import ctypes, os, sys
sys.path.insert(0, sys.argv[1])
import deep_gemm, torch
from deep_gemm.utils.layout import get_mn_major_tma_aligned_tensor
empty = lambda *shape, dtype: torch.empty(shape, device="cuda", dtype=dtype)
fp8, scales = torch.float8_e4m3fn, torch.float32
for argument in sys.argv[2:]:
    name, is_variable, value = argument.partition("=")
    if is_variable:
        os.environ[name] = value
        continue
    try:
        if argument == "another":
            get_mn_major_tma_aligned_tensor(empty(64, 5, dtype=scales))
        else:
            m = int(argument)
            a, b = (empty(m, 512, dtype=fp8), empty(m, 4, dtype=scales)), (empty(576, 512, dtype=fp8), empty(5, 4, dtype=scales))
            deep_gemm.fp8_gemm_nt(a, b, empty(m, 576, dtype=torch.bfloat16))
        print("served", argument, flush=True)
    except Exception as error:
        print("not served", argument, error, flush=True)
ctypes.CDLL(None).fflush(None)  # legacy DeepGEMM prints nvcc's words with printf
os._exit(0)  # DeepGEMM's destructors would tidy up a GPU that does not exist
"""


@pytest.fixture
def dir(built: building.Built, ground: Path) -> Path:
    """Restored by root, in a folder that other users can enter and read but not write to."""
    restore([built.packed.path], ground / "dir", machine=Machine(built.inputs.installation))
    (ground / "tmp").mkdir()
    (ground / "tmp").chmod(0o1777)
    return ground / "dir"


def temporary(dir: Path) -> dict[str, str]:
    """A temporary folder as /tmp is, which no other test uses."""
    return {"TMPDIR": str(dir.parent / "tmp")}


def of_copy(built: building.Built) -> tuple[str, Path]:
    return "--deep-gemm", built.inputs.installation.imported_as


# Where the process writes


@needs_container
@pytest.mark.parametrize(
    ("container", "environment", "private"),
    [
        pytest.param(Container(), {}, f"{{ground}}/tmp/cachebuilder-{USER}/", id="another-user"),
        pytest.param(Container(), {"HOME": "/"}, f"{{ground}}/tmp/cachebuilder-{USER}/", id="home-that-is-roots"),
        pytest.param(Container(read_only=True), {}, f"/dev/shm/cachebuilder-{USER}/", id="read-only"),
        pytest.param(Container(user=0, read_only=True), {"HOME": "/"}, "/dev/shm/cachebuilder-0/", id="root-read-only"),
    ],
)
def test_run_takes_a_root_of_its_own_where_it_cannot_write_and_says_which(
    container: Container, environment: dict[str, str], private: str, built: building.Built, dir: Path
) -> None:
    done = container.run(*ENTERED, dir, *of_copy(built), *SHOW, **temporary(dir), **environment)
    assert done.returncode == 0, done.stderr
    root = done.stdout.splitlines()[0].split(":")[0]
    assert (
        root.startswith(private.format(ground=dir.parent)) and f" {root}" in done.stderr and "cannot be" in done.stderr
    )
    assert done.stderr.startswith("note ")


@needs_container
def test_a_user_with_a_home_gets_the_root_in_its_cache_folder_and_finds_it_again(
    built: building.Built,
    dir: Path,
    ground: Path,
) -> None:
    home = ground / "home"
    home.mkdir()
    os.chown(home, USER, USER)
    roots = {
        Container().run(*ENTERED, dir, *of_copy(built), *SHOW, HOME=str(home)).stdout.splitlines()[0] for _ in range(2)
    }
    assert len(roots) == 1 and next(iter(roots)).startswith(f"{home}/.cache/cachebuilder/served/")


@needs_container
def test_where_nothing_can_be_written_run_says_what_it_tried_and_wants(built: building.Built, dir: Path) -> None:
    closed = ("sh", "-ec", 'mount -o remount,ro /dev/shm; exec "$@"', "sh")
    done = Container(user=0, read_only=True).run(*closed, *ENTERED, dir, *of_copy(built), *SHOW, HOME="/")
    assert done.returncode == RestoreError.exit_code, done.stderr
    for words in (f"for what {dir} does not allow", "/.cache", "/tmp", "/dev/shm", "emptyDir", "--scratch"):
        assert words in " ".join(done.stderr.split())


@needs_container
def test_a_scratch_folder_that_cannot_be_written_is_refused_with_its_user(
    built: building.Built, dir: Path, ground: Path
) -> None:
    (ground / "scratch").mkdir()
    done = Container().run(*ENTERED, dir, *of_copy(built), "--scratch", ground / "scratch", *SHOW, **temporary(dir))
    if built.plan.generation == "legacy":  # it has no scratch folder unless it needs one
        assert done.returncode == 0 and f"{ground}/tmp/cachebuilder-{USER}/" in done.stdout
        return
    assert done.returncode == RestoreError.exit_code
    assert f"{ground}/scratch cannot be written to by user {USER}" in " ".join(done.stderr.split())


@needs_container
def test_on_a_mount_without_exec_run_takes_a_copy_of_the_frozen_nvcc(built: building.Built, dir: Path) -> None:
    done = Container(user=0, noexec=[dir]).run(*ENTERED, dir, *of_copy(built), *SHOW, HOME="/root")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[1] == built.inputs.toolchain.version_text.splitlines()[0]
    assert f"{dir}/cachebuilder/bin/nvcc cannot be executed here" in " ".join(done.stderr.split())


@needs_container
def test_env_for_a_shell_names_what_this_user_can_use_and_for_a_dockerfile_warns(
    built: building.Built, dir: Path, run: Run
) -> None:
    done = Container().run("cachebuilder", "env", dir, **temporary(dir))
    assert done.returncode == 0, done.stderr
    assert (
        f"export DG_JIT_CACHE_DIR={dir.parent}/tmp/cachebuilder-{USER}/" in done.stdout and "cannot be" in done.stderr
    )
    for form in ("docker", "k8s"):
        done = run("env", dir, "--format", form)
        assert "only root can write to" in done.stderr and "cachebuilder run" in done.stderr
        assert not (dir / "scratch").exists(), "a Dockerfile's variables are for another machine"
        assert run("env", dir, "--format", form, "--scratch", "/tmp/deep_gemm").stderr == ""


@needs_container
def test_doctor_names_the_root_that_deepgemm_cannot_write_and_the_nvcc_that_it_cannot_run(
    built: building.Built, dir: Path
) -> None:
    variables = {"DG_JIT_CACHE_DIR": f"{dir}/scratch:{dir}", "DG_JIT_NVCC_COMPILER": f"{dir}/cachebuilder/bin/nvcc"}
    if built.plan.generation == "legacy":
        variables["DG_JIT_CACHE_DIR"] = str(dir)
    done = Container(noexec=[dir]).run("cachebuilder", "doctor", dir, *of_copy(built), **variables)
    said = " ".join(done.stdout.split())
    assert done.returncode == 0, done.stderr
    assert f"note: DeepGEMM cannot write to its first root, {variables['DG_JIT_CACHE_DIR'].split(':')[0]}: " in said
    assert f"note: DG_JIT_NVCC_COMPILER: {dir}/cachebuilder/bin/nvcc cannot be executed here" in said


@needs_container
@pytest.mark.parametrize("condition", ["another-user", "read-only", "noexec"])
def test_deepgemm_serves_hits_there_and_names_a_miss_or_compiles_it(
    condition: str,
    built: building.Built,
    dir: Path,
    ground: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As reported: hits are served, but a miss dies as 'cannot create directories', with no kernel and no log line."""
    monkeypatch.setenv("CACHEBUILDER_CACHE_DIR", str(own_cache(ground / "libraries")))
    gpu = virtual_gpu.environment(built.plan.gpu) | temporary(dir)
    container = Container(read_only=condition == "read-only", noexec=[dir] if condition == "noexec" else [])
    nvcc = shutil.which("nvcc") or built.inputs.toolchain.nvcc
    compiling = ["CACHEBUILDER_ON_MISS=compile", f"CACHEBUILDER_REAL_NVCC={nvcc}"]
    if condition == "read-only":
        compiling.append("TMPDIR=/dev/shm")  # nvcc itself writes there
    call = (
        "--",
        "python",
        "-c",
        CALL,
        built.inputs.installation.imported_as.parent,
        "16",
        "another",
        *compiling,
        "another",
    )
    done = container.run("cachebuilder", "run", dir, *of_copy(built), *call, **gpu)
    said = done.stdout + done.stderr
    hit, _, compiled = done.stdout.partition("not served another")
    assert hit.endswith("served 16\n") and "\nserved another\n" in compiled, said
    assert "is not in the restored cache" in said and "cachebuilder misses" in said, said
    log = next(word for word in said.split() if word.endswith("misses.jsonl"))
    assert log.startswith(f"{'/dev/shm' if condition == 'read-only' else ground / 'tmp'}/cachebuilder-{USER}/")
    if condition != "read-only":  # its /dev/shm ended with it
        artifacts = [json.loads(line)["artifact"] for line in Path(log).read_text().splitlines()]
        assert artifacts == ["small"] * 2, "one miss was refused, and one compiled"


@needs_container
@pytest.mark.parametrize("deep_gemm", ["deepjit"], indirect=True, scope="session")
def test_a_root_that_another_user_made_does_not_end_a_hit_of_a_server_without_run(
    built: building.Built, dir: Path, ground: Path, monkeypatch: pytest.MonkeyPatch, run: Run
) -> None:
    """An init container checks as root by `run DIR -- true`; the server gets its variables from the pod's text."""
    assert run("run", dir, *of_copy(built), "--", "true").returncode == 0 and (dir / "scratch").is_dir()
    monkeypatch.setenv("CACHEBUILDER_CACHE_DIR", str(own_cache(ground / "libraries")))
    variables = virtual_gpu.environment(built.plan.gpu) | json.loads(run("env", dir, "--format", "json").stdout)
    done = Container().run(
        "python", "-c", CALL, built.inputs.installation.imported_as.parent, "16", **variables, **temporary(dir)
    )
    assert "served 16" in done.stdout, done.stderr


# What fits


def test_run_refuses_a_folder_that_would_miss_here_with_the_fields(built: building.Built, dir: Path, run: Run) -> None:
    command = ("run", dir, *of_copy(built), "--", "echo", "started")
    done = run(*command, DG_JIT_DEBUG="1")
    assert (done.returncode, done.stdout) == (CompatibilityError.exit_code, "")
    for words in ("DG_JIT_DEBUG", "wanted: not set", "found:  1", "unset DG_JIT_DEBUG", "--force"):
        assert words in done.stderr
    forced = run("run", dir, "--force", *command[2:], DG_JIT_DEBUG="1")
    assert (forced.returncode, forced.stdout) == (0, "started\n") and "forced" in forced.stderr
    assert run(*command).stdout == "started\n"


def test_run_refuses_another_deepgemm(built: building.Built, dir: Path, run: Run, tmp_path: Path) -> None:
    copy = copy_of(built.inputs.installation, tmp_path / "copy" / "deep_gemm")
    header = next((copy.path / "include" / "deep_gemm").rglob("*.cuh"))
    header.unlink()  # a link to the installed one
    header.write_text("// changed\n")
    done = run("run", dir, "--deep-gemm", copy.path, "--", "echo", "started")
    assert (done.returncode, done.stdout) == (CompatibilityError.exit_code, "") and "headers" in done.stderr


@pytest.mark.parametrize("deep_gemm", ["legacy"], indirect=True, scope="session")
def test_run_refuses_a_legacy_cache_of_another_install_path(built: building.Built, run: Run, tmp_path: Path) -> None:
    unpack(built.packed.path, tmp_path / "dir")
    copy = copy_of(built.inputs.installation, tmp_path / "elsewhere" / "deep_gemm")
    done = run("run", tmp_path / "dir", "--deep-gemm", copy.path, "--", "echo", "started")
    assert (done.returncode, done.stdout) == (CompatibilityError.exit_code, "")
    assert "install_include" in done.stderr and f"found:  {str(copy.include)[:60]}" in done.stderr


def test_without_a_deepgemm_beside_cachebuilder_run_compares_the_rest(dir: Path, built: building.Built) -> None:
    """cachebuilder may be in an environment of its own: `run` then knows nothing of the DeepGEMM that will serve."""
    folder = serving.open_whole(dir)
    assert serving.require_fit(folder, Machine(None), force=False).differences == ()
    with pytest.raises(CompatibilityError, match="DG_JIT_DEBUG"):
        serving.require_fit(folder, Machine(None, environment={"DG_JIT_DEBUG": "1"}), force=False)


def test_verify_replays_under_the_variables_that_are_set_here(built: building.Built, dir: Path, run: Run) -> None:
    done = run("verify", dir, *of_copy(built), DG_JIT_WITH_LINEINFO="1")
    assert done.returncode != 0 and " 0 kernels found, 5 missing" in done.stdout
    assert "DG_JIT_WITH_LINEINFO" in done.stdout and "unset DG_JIT_WITH_LINEINFO" in done.stdout
    harmless = run("verify", dir, *of_copy(built), DG_PRINT_CONFIGS="1")
    assert harmless.returncode == 0 and "0 missing" in harmless.stdout


@pytest.mark.parametrize("deep_gemm", ["legacy"], indirect=True, scope="session")
def test_verify_refuses_nvrtc_which_asks_no_compiler(built: building.Built, dir: Path, run: Run) -> None:
    done = run("verify", dir, *of_copy(built), DG_JIT_USE_NVRTC="1")
    assert done.returncode == CompatibilityError.exit_code and "unset DG_JIT_USE_NVRTC" in done.stderr


# The images of examples/


@needs_container
@pytest.mark.parametrize("deep_gemm", ["deepjit"], indirect=True, scope="session")
@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)
def test_an_examples_image_restored_as_root_serves_as_another_user_and_names_a_miss(
    dockerfile: Path,
    built: building.Built,
    ground: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    text = dockerfile.read_text().replace("/tmp/", f"{ground}/tmp/").replace("/opt/deep_gemm", f"{ground}/deep_gemm")
    (ground / "tmp").mkdir()
    (ground / "tmp").chmod(0o1777)
    shutil.copy(built.packed.path, ground / "tmp" / "artifact.tar.zst")
    monkeypatch.setenv("CACHEBUILDER_CACHE_DIR", str(own_cache(ground / "libraries")))
    gpu = virtual_gpu.environment(built.plan.gpu)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    for command in re.findall(r"^RUN (cachebuilder .*)$", text, re.MULTILINE):
        subprocess.run(["sh", "-ec", command], env=os.environ | {"PATH": path, "HOME": f"{ground}/home"}, check=True)
    variables = dict(re.findall(r"^ENV (\w+)=(.*)$", text, re.MULTILINE)) | {
        "CUDA_HOME": f"{ground}/deep_gemm",
        "TMPDIR": f"{ground}/tmp",
    }
    done = Container().run(
        "python", "-c", CALL, built.inputs.installation.imported_as.parent, "16", "another", **gpu, **variables
    )
    said = done.stdout + done.stderr
    assert "served 16" in said and "is not in the restored cache" in said, said
    assert stat.S_ISDIR((ground / "tmp" / "deep_gemm").stat().st_mode)
