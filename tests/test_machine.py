"""Would DeepGEMM find an artifact's kernels here? Each difference, and whether it causes a miss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from cachebuilder import building
from cachebuilder.artifact.index import Index
from cachebuilder.artifact.read import read_index
from cachebuilder.cuda.nvml import VisibleGpu
from cachebuilder.deepgemm import installation as installations
from cachebuilder.errors import CompatibilityError
from cachebuilder.restoring.machine import Machine
from cachebuilder.restoring.restore import restore
from tests.restored import copy_of

H200 = VisibleGpu("NVIDIA H200", (9, 0), 132)


def fields(machine: Machine, index: Index, relocates: bool = False) -> list[str]:
    return [one.field for one in machine.differences(index, relocates=relocates)]


def field_of(error: pytest.ExceptionInfo[CompatibilityError]) -> list[str]:
    return [line.split()[0] for line in str(error.value).splitlines() if line.startswith("  ") and line[2] != " "]


def change_header(path: Path) -> None:
    header = sorted((path / "include" / "deep_gemm").rglob("*.cuh"))[0]
    header.write_bytes(header.read_bytes() + b"\n")


def change_version(path: Path) -> None:
    (path / "VERSION").write_text("9.9.9")


def change_cutlass(path: Path) -> None:
    header = path / "include" / "cutlass" / "version.h"
    header.write_text(header.read_text().replace("#define CUTLASS_MAJOR ", "#define CUTLASS_MAJOR 9"))


def changed_copy(built: building.Built, change: Callable[[Path], None], folder: Path) -> Machine:
    copy_of(built.inputs.installation, folder / "deep_gemm")
    change(folder / "deep_gemm")
    return Machine(installations.find(folder / "deep_gemm"))


@pytest.mark.parametrize(
    ("change", "field", "deep_gemm"),
    [
        pytest.param(change_header, "headers", "deepjit", id="a-changed-header-deepjit"),
        pytest.param(change_header, "headers", "legacy", id="a-changed-header-legacy"),
        pytest.param(change_version, "deep_gemm", "deepjit", id="another-version-deepjit"),
        pytest.param(change_version, "deep_gemm", "legacy", id="another-version-legacy"),
        pytest.param(change_cutlass, "cutlass", "deepjit", id="another-cutlass-deepjit"),
    ],
    indirect=["deep_gemm"],
    scope="session",
)
def test_another_deepgemm_is_refused_before_anything_is_written(
    change: Callable[[Path], None], field: str, built: building.Built, tmp_path: Path
) -> None:
    other = changed_copy(built, change, tmp_path / "copy")
    [difference] = other.differences(read_index(built.packed.path), relocates=True)
    assert difference.field == field and difference.causes_miss
    with pytest.raises(CompatibilityError) as error:
        restore([built.packed.path], tmp_path / "dir", machine=other)
    assert field_of(error) == [field]
    assert f"wanted: {difference.wanted}\n    found:  {difference.found}" in str(error.value)
    assert "build with the DeepGEMM that serves" in " ".join(str(error.value).split())
    assert not (tmp_path / "dir").exists()


@pytest.mark.parametrize("deep_gemm", ["legacy"], indirect=True, scope="session")
def test_another_cutlass_is_worth_knowing_where_no_key_holds_it(built: building.Built, tmp_path: Path) -> None:
    other = changed_copy(built, change_cutlass, tmp_path / "copy")
    done = restore([built.packed.path], tmp_path / "dir", machine=other)
    assert [(one.field, one.causes_miss) for one in done.differences] == [("cutlass", False)]


@pytest.mark.parametrize(
    ("gpu", "differing"),
    [
        pytest.param(None, [], id="none-visible"),
        pytest.param(H200, [], id="the-card-itself"),
        pytest.param(VisibleGpu("NVIDIA H20", (9, 0), 78), ["sm_counts"], id="another-sm-count"),
        pytest.param(VisibleGpu("NVIDIA B200", (10, 0), 148), ["arch"], id="another-arch"),
        pytest.param(VisibleGpu("NVIDIA H200", (9, 0), None), [], id="nvml-does-not-say"),
    ],
)
def test_the_gpu_is_compared_where_one_is_visible(
    gpu: VisibleGpu | None, differing: list[str], built: building.Built
) -> None:
    machine = Machine(built.inputs.installation, gpu)
    differences = machine.differences(read_index(built.packed.path))
    assert [one.field for one in differences] == differing
    assert all(one.causes_miss and one.remedy for one in differences)


def test_an_engine_that_uses_fewer_sms_than_the_card_has_still_fits(built: building.Built) -> None:
    index = read_index(built.packed.path)
    index = index.model_copy(update={"fingerprint": index.fingerprint.model_copy(update={"sm_counts": (108,)})})
    machine = Machine(built.inputs.installation, H200)
    assert machine.fits(index)
    assert fields(replace(machine, gpu=replace(H200, sm_count=78)), index) == ["sm_counts"]


def test_the_compiler_and_the_sm_counts_are_compared_where_they_are_known(built: building.Built) -> None:
    index = read_index(built.packed.path)
    same = Machine(built.inputs.installation, compiler=index.fingerprint.compiler, sm_counts=(132,))
    assert same.fits(index)
    assert fields(replace(same, compiler="nvcc 1"), index) == ["compiler"]
    assert fields(replace(same, sm_counts=(132, 100)), index) == ["sm_counts"]


@pytest.mark.parametrize(
    ("planned", "here", "differing", "misses"),
    [
        pytest.param({}, {"DG_JIT_CACHE_DIR": "/x", "DG_PRINT_CONFIGS": "1"}, [], [], id="harmless"),
        pytest.param({}, {"DG_JIT_DEBUG": "0"}, [], [], id="switched-off"),
        pytest.param({}, {"DG_JIT_DEBUG": "1"}, ["DG_JIT_DEBUG"], ["DG_JIT_DEBUG"], id="set-here-only"),
        pytest.param({"DG_JIT_DEBUG": "1"}, {"DG_JIT_DEBUG": "1"}, [], [], id="set-in-both"),
        pytest.param({"DG_JIT_DEBUG": "1"}, {}, ["DG_JIT_DEBUG"], [], id="planned-only-env-sets-it"),
        pytest.param({"DG_X": "1"}, {"DG_X": "2"}, ["DG_X"], ["DG_X"], id="another-value"),
        pytest.param({}, {"DG_JIT_NVCC_COMPILER": "/x/nvcc"}, ["DG_JIT_NVCC_COMPILER"], [], id="another-nvcc"),
        pytest.param({}, {"DG_JIT_NVCC_COMPILER": "/dir/nvcc"}, [], [], id="the-frozen-nvcc"),
    ],
)
def test_variables_that_change_kernels_are_compared(
    planned: dict[str, str], here: dict[str, str], differing: list[str], misses: list[str], built: building.Built
) -> None:
    index = read_index(built.packed.path)
    index = index.model_copy(update={"fingerprint": index.fingerprint.model_copy(update={"environment": planned})})
    machine = Machine(built.inputs.installation, environment=here)
    differences = machine.differences(index, frozen_nvcc=Path("/dir/nvcc"))
    assert [one.field for one in differences] == differing
    assert [one.field for one in differences if one.causes_miss] == misses


@pytest.mark.parametrize("deep_gemm", ["legacy"], indirect=True, scope="session")
def test_another_install_path_causes_a_miss_unless_a_restore_relocates(built: building.Built, tmp_path: Path) -> None:
    index = read_index(built.packed.path)
    moved = Machine(copy_of(built.inputs.installation, tmp_path / "moved" / "deep_gemm"))
    assert fields(moved, index) == ["install_include"] and not moved.fits(index)
    assert moved.fits(index, relocates=True)
