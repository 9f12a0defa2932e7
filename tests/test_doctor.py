from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from cachebuilder import building
from cachebuilder.deepgemm.environment import cache_roots, kernel_variables
from cachebuilder.deepgemm.installation import Generation
from cachebuilder.manifest.inputs import load_manifest
from tests.command_line import cachebuilder
from tests.conftest import LEGACY
from tests.restored import unpack
from tests.test_cli import WITHOUT_TORCH


def environment_of(variables: Mapping[str, str]) -> dict[str, str]:
    """This process's variables without DeepGEMM's, and ``variables``."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("DG_", "DJ_"))} | variables


def doctor(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """The verb in a process where torch cannot be imported."""
    return cachebuilder("doctor", *arguments, environment=environment_of(environment), without=["torch"])


def test_it_imports_neither_torch_nor_elftools(built: building.Built, tmp_path: Path) -> None:
    # Finding the copy looks its package up, which the blocked import would answer instead.
    code = WITHOUT_TORCH.replace('"torch", "deep_gemm"', '"torch"')
    command = [sys.executable, "-c", code, "doctor", "--deep-gemm", str(built.inputs.installation.path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment_of({"HOME": str(tmp_path)}))
    assert done.returncode == 0, done.stderr


def test_one_screen_says_what_is_here(built: building.Built, tmp_path: Path) -> None:
    here = built.inputs.installation
    done = doctor("--deep-gemm", here.path, HOME=str(tmp_path))
    assert done.returncode == 0, done.stderr
    for words in (
        f"deep_gemm    {here.version} ",
        f"{here.generation} cache",
        str(here.path),
        f"headers {here.headers_digest[:16]}…, CUTLASS {here.cutlass_version}",
        f"nvcc         {built.inputs.toolchain.release} (",
        str(tmp_path / (".dj" if here.generation == "deepjit" else ".deep_gemm")),
        "does not exist",
        "none set that changes kernels",
    ):
        assert words in done.stdout
    assert len(done.stdout.splitlines()) < 25


def test_cache_roots_are_counted_and_damaged_entries_named(built: building.Built, tmp_path: Path) -> None:
    folder = unpack(built.packed.path, tmp_path / "restored")
    (tmp_path / "empty").mkdir()
    first, second, *_ = sorted(path for path in (folder / "cache").iterdir())
    (first / "kernel.cubin").write_bytes(b"to be compiled")
    shutil.rmtree(second)
    generation = built.plan.generation
    roots = str(folder) if generation == "legacy" else f"{tmp_path / 'empty'}:{folder}"
    done = doctor("--deep-gemm", built.inputs.installation.imported_as, "--json", DG_JIT_CACHE_DIR=roots)
    findings = json.loads(done.stdout)
    assert findings["roots_from"] == "DG_JIT_CACHE_DIR"
    root = findings["roots"][-1]
    assert root["path"] == str(folder) and root["artifacts"] == ["small"]
    assert root["entries"] == {generation: len(built.plan.kernels) - 1}
    assert root["damaged"] == [
        f"{first.name}/kernel.cubin: wanted an ELF file, found one that begins with b'to b'",
        f"{second.name}: wanted an entry, found none",
    ]


def test_a_note_names_the_other_root_that_sglang_would_take(built: building.Built, tmp_path: Path) -> None:
    for root, differs in ((tmp_path / "x", True), (tmp_path, False)):
        done = doctor(DG_JIT_CACHE_DIR=str(tmp_path), SGLANG_DG_CACHE_DIR=str(root))
        assert ("SGLang would take SGLANG_DG_CACHE_DIR=" in done.stdout) == differs, done.stdout


def test_a_folder_whose_index_is_damaged_still_gets_its_screen(built: building.Built, tmp_path: Path) -> None:
    folder = unpack(built.packed.path, tmp_path / "restored")
    next((folder / "cachebuilder" / "artifacts").glob("*.json")).write_text("{")
    done = doctor(folder)
    assert done.returncode == 0 and "torch " in done.stdout
    assert "wanted JSON" in done.stdout and "restore its artifact into" in " ".join(done.stdout.split())


def test_damage_in_the_folder_that_was_asked_about_is_named(built: building.Built, tmp_path: Path) -> None:
    folder = unpack(built.packed.path, tmp_path / "restored")
    entry = min(path for path in (folder / "cache").iterdir())
    cubin = (entry / "kernel.cubin").read_bytes()
    (entry / "kernel.cubin").write_bytes(cubin[:-1])
    done = doctor(folder, "--deep-gemm", built.inputs.installation.imported_as)
    damage = f"damaged: {entry.name}/kernel.cubin: wanted {len(cubin)} bytes, found {len(cubin) - 1}"
    assert f"folder       {folder}" in done.stdout and damage in " ".join(done.stdout.split()), done.stdout


def test_an_artifact_fits_the_deepgemm_it_was_built_with_and_no_other(built: building.Built, tmp_path: Path) -> None:
    path = built.inputs.installation.imported_as
    for target in (built.packed.path, unpack(built.packed.path, tmp_path / "restored")):
        done = doctor(target, "--deep-gemm", path)
        assert "artifact     small: fits" in done.stdout, done.stdout
    other = None if path.resolve() == LEGACY.resolve() else LEGACY
    done = doctor(built.packed.path, *(["--deep-gemm", other] if other else []), "--json")
    [verdict] = json.loads(done.stdout)["artifacts"]
    assert not verdict["fits"] and done.returncode == 0
    fields = [difference["field"] for difference in verdict["differences"]]
    assert fields[0] == "generation"


def test_a_variable_that_changes_keys_is_a_difference(built: building.Built) -> None:
    done = doctor(built.packed.path, "--deep-gemm", built.inputs.installation.imported_as, DG_JIT_WITH_LINEINFO="1")
    assert "variables    DG_JIT_WITH_LINEINFO=1" in done.stdout
    assert "  DG_JIT_WITH_LINEINFO\n    wanted: not set\n    found:  1\n" in done.stdout, done.stdout


@pytest.mark.parametrize(
    ("generation", "environment", "expected"),
    [
        ("deepjit", {"DG_JIT_DEBUG": "1", "DJ_JIT_DEBUG": "0"}, {"DG_JIT_DEBUG"}),
        ("deepjit", {"DG_JIT_DEBUG": "false", "DJ_JIT_DEBUG": "1"}, set()),
        ("deepjit", {"DJ_JIT_CHECK_NO_SPILLS": "yes", "DG_JIT_DUMP_PTX": "1"}, {"DJ_JIT_CHECK_NO_SPILLS"}),
        ("deepjit", {"DG_JIT_CPP_STANDARD": "20", "DG_JIT_PTXAS_CHECK": "1"}, set()),
        ("legacy", {"DG_JIT_CPP_STANDARD": "17", "DJ_JIT_DEBUG": "1"}, {"DG_JIT_CPP_STANDARD"}),
        ("deepjit", {"DG_SM90_FP8_SWAP_AB": "0", "DG_PRINT_CONFIGS": "1", "DGX": "1"}, {"DG_SM90_FP8_SWAP_AB"}),
        ("legacy", {"DG_JIT_PTXAS_CHECK": "1", "DG_JIT_PRINT_LOAD_TIME": "1"}, {"DG_JIT_PTXAS_CHECK"}),
    ],
)
def test_only_variables_that_change_keys_are_listed(
    generation: Generation, environment: dict[str, str], expected: set[str]
) -> None:
    assert kernel_variables(generation, environment).keys() == expected


@pytest.mark.slow
@pytest.mark.parametrize(
    "variable", ["DG_JIT_PTXAS_VERBOSE", "DG_JIT_WITH_LINEINFO", "DG_JIT_DUMP_PTX", "DG_JIT_CPP_STANDARD"]
)
def test_deepgemm_itself_agrees_which_variables_change_keys(
    variable: str, built: building.Built, tmp_path: Path
) -> None:
    from cachebuilder.planning import make as planning

    value = "17" if variable.endswith("STANDARD") else "1"
    (tmp_path / "m.yaml").write_text(built.inputs.manifest_bytes.decode() + f'environment: {{{variable}: "{value}"}}\n')
    inputs = load_manifest(tmp_path / "m.yaml", deep_gemm=built.inputs.installation.imported_as)
    plan = planning.make(inputs)
    kept = {kernel.entry for kernel in plan.kernels} == {kernel.entry for kernel in built.plan.kernels}
    assert kept == (not kernel_variables(plan.generation, {variable: value}))


@pytest.mark.parametrize(
    ("generation", "environment", "expected"),
    [
        ("deepjit", {}, ("default", ["/home/x/.dj"])),
        ("deepjit", {"DJ_JIT_CACHE_DIR": "/a:/b"}, ("DJ_JIT_CACHE_DIR", ["/a", "/b"])),
        ("deepjit", {"DJ_JIT_CACHE_DIR": "/a", "DG_JIT_CACHE_DIR": "/c"}, ("DG_JIT_CACHE_DIR", ["/c"])),
        ("legacy", {"DG_JIT_CACHE_DIR": ""}, ("default", ["/home/x/.deep_gemm"])),
        ("legacy", {"DG_JIT_CACHE_DIR": "/a:/b", "DJ_JIT_CACHE_DIR": "/c"}, ("DG_JIT_CACHE_DIR", ["/a:/b"])),
        ("deepjit", {"HOME": ""}, ("default", [])),
    ],
)
def test_cache_roots_are_those_that_deepgemm_takes(
    generation: Generation, environment: dict[str, str], expected: tuple[str, list[str]]
) -> None:
    variable, roots = cache_roots(generation, {"HOME": "/home/x"} | environment)
    assert (variable, list(map(str, roots))) == expected
