"""What an engine would compile beside DeepGEMM: what `env`, `run`, `doctor` and `verify` do and say about it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from cachebuilder import building
from cachebuilder.artifact.index import Index
from cachebuilder.restoring import environment, place
from cachebuilder.restoring.folder import open_folder
from tests.command_line import cachebuilder
from tests.conftest import Run
from tests.restored import copy_of, unpack

GEMM, SAMPLER = environment.FLASHINFER_GEMM, environment.FLASHINFER_SAMPLER
NO_CUDA = {"CUDA_HOME": "/nonexistent", "PATH": "/nonexistent"}


@pytest.fixture
def restored(built: building.Built, tmp_path: Path) -> Path:
    return unpack(built.packed.path, tmp_path / "root")


def variables(restored: Path, machine: dict[str, str], indexes: list[Index] | None = None) -> dict[str, str]:
    """What `env --engine vllm` prints on a machine with these variables."""
    indexes = indexes or open_folder(restored).indexes
    found = environment.variables(place.usual(restored, indexes, Path("/scratch")), indexes, "vllm", machine)
    return {variable.name: variable.value for variable in found}


def package(folder: Path, name: str) -> Path:
    """An installed package of this name, as far as an import statement's search goes."""
    (folder / name).mkdir(parents=True)
    (folder / name / "__init__.py").touch()
    return folder / name


def words(text: str) -> str:
    """The text on one line."""
    return " ".join(text.split())


def test_env_keeps_vllm_on_sm90_from_flashinfers_kernels_and_says_what_that_costs(run: Run, restored: Path) -> None:
    done = run("env", restored, "--engine", "vllm", "--format", "docker")
    comment, line = next(
        pair for pair in zip(done.stdout.splitlines(), done.stdout.splitlines()[1:], strict=False) if GEMM in pair[1]
    )
    assert line == f"ENV {GEMM}=0"
    for text in (
        "M < 32",
        "compiles with ninja and nvcc at the first tokens",
        "this artifact does not hold",
        "5 to 8 %",
    ):
        assert text in comment


def test_other_gpus_do_not_get_the_variable_of_sm90(restored: Path) -> None:
    [index] = open_folder(restored).indexes
    other = index.model_copy(update={"fingerprint": index.fingerprint.model_copy(update={"arch": "sm_100f"})})
    assert GEMM not in variables(restored, NO_CUDA, [other])
    assert GEMM in variables(restored, NO_CUDA, [other, index])


@pytest.mark.parametrize(("mine", "stays"), [("1", "1"), ("0", "0"), ("00", "0"), ("", "0")])
def test_the_users_own_choice_stays(mine: str, stays: str, restored: Path) -> None:
    assert variables(restored, NO_CUDA | {GEMM: mine})[GEMM] == stays


def test_run_and_env_say_what_the_users_own_choice_does(built: building.Built, run: Run, restored: Path) -> None:
    here = ("--deep-gemm", built.inputs.installation.imported_as)
    done = run("run", restored, *here, "--engine", "vllm", "--", "sh", "-c", f"echo ${GEMM}", **{GEMM: "1"})
    assert done.stdout == "1\n", done.stderr
    assert f"{GEMM}=1 is set and stays" in done.stderr and "this artifact does not hold them" in done.stderr
    printed = run("env", restored, "--engine", "vllm", **{GEMM: "1"}).stdout
    assert f"export {GEMM}=1" in printed and "0 takes those of the cache" in printed
    assert run("run", restored, *here, "--engine", "vllm", "--", "true").stderr == ""


@pytest.mark.parametrize("option", ["--fp8-gemm-backend flashinfer_deepgemm", "--fp8-gemm-backend=flashinfer_deepgemm"])
def test_run_says_what_sglangs_flashinfer_backend_compiles(
    option: str, built: building.Built, run: Run, restored: Path
) -> None:
    here = ("--deep-gemm", built.inputs.installation.imported_as)
    command = ("--engine", "sglang", "--", "echo", "sglang.launch_server", *option.split())
    done = run("run", restored, *here, *command)
    assert done.stdout.startswith("sglang.launch_server") and "deep_gemm serves every M from the cache" in done.stderr


def test_the_cuda_home_that_env_names_shows_nobody_a_compiler(restored: Path) -> None:
    # vLLM 0.32.0 and later look exactly here (_flashinfer_nvcc_path, vllm/utils/flashinfer.py), and then do without
    # FlashInfer. That DeepGEMM itself loads with this CUDA home: test_frozen.call_deepgemm.
    home = variables(restored, NO_CUDA)["CUDA_HOME"]
    assert os.path.isdir(home) and shutil.which(os.path.join(home, "bin", "nvcc")) is None


@pytest.mark.parametrize(
    ("prepared", "machine", "value"),
    [
        pytest.param((), NO_CUDA, "0", id="no-nvcc"),
        pytest.param((), {"CUDA_HOME": "FROZEN"}, "0", id="the-frozen-nvcc-only"),
        pytest.param((), {"PATH": "REAL/bin"}, None, id="nvcc-on-path"),
        pytest.param((), {"CUDA_HOME": "REAL"}, None, id="nvcc-in-cuda-home"),
        pytest.param(("flashinfer_jit_cache",), NO_CUDA, None, id="flashinfer-jit-cache"),
        pytest.param(("flashinfer/data/aot/sampling/sampling.so",), NO_CUDA, None, id="the-module-itself"),
        pytest.param((), NO_CUDA | {SAMPLER: "1"}, None, id="the-user-s-choice"),
    ],
)
def test_without_nvcc_vllm_samples_without_flashinfer(
    prepared: tuple[str, ...],
    machine: dict[str, str],
    value: str | None,
    restored: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    site = tmp_path / "site"
    package(site, "flashinfer")
    for name in prepared:
        if name.endswith(".so"):
            (site / name).parent.mkdir(parents=True)
            (site / name).touch()
        else:
            package(site, name)
    nvcc = tmp_path / "real" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text("#!/bin/sh\n")
    nvcc.chmod(0o755)
    places = {"FROZEN": str(restored / "cachebuilder"), "REAL": str(tmp_path / "real")}
    for mark, path in places.items():
        machine = {name: text.replace(mark, path) for name, text in machine.items()}
    monkeypatch.syspath_prepend(site)
    assert variables(restored, machine).get(SAMPLER) == value


def test_doctor_and_verify_name_what_no_artifact_holds_where_vllm_serves(
    run: Run, built: building.Built, tmp_path: Path
) -> None:
    sentence = f"unless {GEMM}=0: cachebuilder env --engine vllm sets it"
    here = built.inputs.installation
    for name in ("vllm", "flashinfer"):
        package(tmp_path / "site", name)
    arguments = ("doctor", built.packed.path, "--deep-gemm", here.imported_as)
    path = os.pathsep.join(filter(None, (str(tmp_path / "site"), os.environ.get("PYTHONPATH"))))
    done = cachebuilder(*arguments, environment=os.environ | {"PYTHONPATH": path})
    assert sentence in words(done.stdout), done.stderr
    for quiet in (os.environ | {"PYTHONPATH": path, GEMM: "0"}, os.environ):
        assert GEMM not in cachebuilder(*arguments, environment=quiet).stdout

    copy = copy_of(here, tmp_path / "vllm" / "third_party" / "deep_gemm")
    done = run("verify", unpack(built.packed.path, tmp_path / "dir"), "--deep-gemm", copy.path)
    assert sentence in words(done.stdout), done.stdout + done.stderr
