"""FlashInfer's own code, built ahead, restored and served without a compiler, on the virtual GPU.

The module with the GEMM takes nvcc some minutes of CPU time, so it is built once for all tests.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cachebuilder import building
from cachebuilder.artifact.pack import pack
from cachebuilder.compiling import flashinfer as compiling
from cachebuilder.compiling.compiler import CompileOptions
from cachebuilder.compiling.store import CubinStore
from cachebuilder.errors import CompatibilityError, PlanError, RestoreError
from cachebuilder.flashinfer import entries
from cachebuilder.inspecting.explain import explain
from cachebuilder.inspecting.report import page
from cachebuilder.manifest.inputs import load_manifest
from cachebuilder.restoring import misses
from cachebuilder.restoring import place as places
from cachebuilder.restoring.environment import variables
from cachebuilder.restoring.machine import Machine
from cachebuilder.restoring.restore import restore
from cachebuilder.sweep import flashinfer as sweep
from cachebuilder.verifying.verify import verify
from tests.conftest import FLASHINFER, BuildSmall, Run, kept_cubins, one_at_a_time, own_cache
from tests.users import STRANGER, as_user, ground, needs_root, owned

__all__ = ["ground"]

pytestmark = pytest.mark.slow

MANIFEST = """\
name: with-flashinfer
target: {gpu: H200}
max_tokens: 8
ops: [{op: fp8_gemm_nt, n: 576, k: 512}]
flashinfer:
  modules: [concat_mla]
  gemms: [{n: 576, k: 512}, {n: 4096, k: 7168}]
"""
ENTRIES = ["gemm_swapAB_4096_7168_128_16_128_1_81_8_1_Normal", "gemm_swapAB_576_512_128_16_128_1_81_8_1_Normal"]


@pytest.fixture(scope="module")
def whole(build_small: BuildSmall, tmp_path_factory: pytest.TempPathFactory, shared_folder: Path) -> building.Built:
    """An artifact with DeepGEMM's kernels, two modules and two kernels of FlashInfer's GEMM."""
    build_small(None)  # it has DeepGEMM's kernels as well
    folder = tmp_path_factory.mktemp("flashinfer")
    (folder / "m.yaml").write_text(MANIFEST)
    inputs = load_manifest(folder / "m.yaml", flashinfer=FLASHINFER)
    own, kept = CubinStore(), kept_cubins("flashinfer")
    with one_at_a_time(shared_folder, "flashinfer"):
        for key in compiling.module_keys(inputs).values():
            if (module := kept.get(key)) is not None:
                own.put(key, module)
        for name, module in compiling.build_modules(inputs, CompileOptions()).items():
            kept.put(compiling.module_keys(inputs)[name], module)
        return building.build(inputs, folder / "a.tar.zst")


@pytest.fixture
def machine(whole: building.Built) -> Machine:
    return Machine(whole.inputs.installation, flashinfer=whole.inputs.flashinfer)


@pytest.fixture
def restored(whole: building.Built, machine: Machine, tmp_path: Path) -> Path:
    restore([whole.packed.path], tmp_path / "dir", machine=machine)
    return tmp_path / "dir"


def test_flashinfers_own_gemm_says_which_kernels_every_small_m_needs(whole: building.Built) -> None:
    plan = whole.plan.flashinfer
    assert plan is not None and plan.modules == ("concat_mla", entries.GEMM_MODULE)
    assert [kernel.entry for kernel in plan.kernels] == ENTRIES
    points = {s.op: s.ranges for kernel in plan.kernels for s in kernel.selected_by}
    assert {op: [(r.first, r.last) for r in ranges] for op, ranges in points.items()} == {0: [(1, 31)], 1: [(1, 31)]}
    assert plan.calls == 62


def test_a_second_build_in_other_folders_has_the_same_bytes(
    whole: building.Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs, plan = whole.inputs, whole.plan.flashinfer
    assert inputs.flashinfer is not None and plan is not None
    with_store = CompileOptions()
    one_kernel = plan.kernels[:1]
    first = compiling.build_modules(inputs, with_store) | compiling.compile_gemms(inputs, one_kernel, with_store)
    (tmp_path / "another").mkdir()
    monkeypatch.setenv("CACHEBUILDER_CACHE_DIR", str(own_cache(tmp_path / "another" / "cache")))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.symlink_to(FLASHINFER.parent)
    (tmp_path / "m.yaml").write_text(MANIFEST)
    other = load_manifest(tmp_path / "m.yaml", flashinfer=elsewhere / "flashinfer")
    assert other.flashinfer is not None
    gpu = inputs.manifest.target.gpu
    second = sweep.build_modules(other.flashinfer, other.toolchain, gpu, ["concat_mla"], jobs=1)
    second |= compiling.compile_gemms(other, one_kernel, with_store)
    for name, data in second.items():
        assert hashlib.sha256(data).hexdigest() == hashlib.sha256(first[name]).hexdigest(), name
        assert str(tmp_path).encode() not in data and str(FLASHINFER).encode() not in data


def test_flashinfer_serves_from_what_was_restored_with_a_compiler_that_refuses(restored: Path) -> None:
    report = verify(restored, flashinfer=FLASHINFER)
    [replay] = report.replays
    assert report.complete and replay.flashinfer is not None
    assert replay.flashinfer.calls == 62 and list(replay.flashinfer.hits) == ENTRIES
    assert replay.flashinfer.modules == ("concat_mla", entries.GEMM_MODULE)


def test_what_is_missing_or_damaged_is_named(restored: Path, run: Run) -> None:
    shutil.rmtree(restored / "flashinfer/cache" / ENTRIES[1])
    module = restored / "flashinfer/modules/concat_mla/concat_mla.so"
    module.write_bytes(module.read_bytes()[:-1])
    report = verify(restored, flashinfer=FLASHINFER)
    [replay] = report.replays
    assert not report.complete and replay.flashinfer is not None
    assert replay.flashinfer.missing == ("concat_mla", ENTRIES[1])
    assert sorted(item.entry for item in report.damage) == [
        f"flashinfer/cache/{ENTRIES[1]}",
        "flashinfer/modules/concat_mla",
    ]
    refused = run("run", restored, "--", "true")
    assert refused.returncode and "damaged: flashinfer/" in refused.stderr


def test_verify_fails_for_a_shape_of_the_gemm_that_the_artifact_lacks(
    whole: building.Built, tmp_path: Path, run: Run
) -> None:
    (tmp_path / "more.yaml").write_text(MANIFEST.replace("gemms: [", "gemms: [{n: 64, k: 128}, "))
    arguments = ("verify", whole.packed.path, "--manifest", tmp_path / "more.yaml", "--flashinfer", FLASHINFER)
    done = run(*arguments)
    assert done.returncode == 11 and "wanted a complete cache, found missing for FlashInfer: 1" in done.stderr
    assert "gemm_swapAB_64_128_" in done.stdout and "differs" not in done.stdout


def test_a_kernel_that_flashinfers_gemm_misses_is_named_in_the_log(
    whole: building.Built, restored: Path, tmp_path: Path
) -> None:
    shutil.rmtree(restored / "flashinfer/cache" / ENTRIES[0])
    inputs, needs = whole.inputs, whole.inputs.manifest.flashinfer
    assert inputs.flashinfer is not None and needs is not None
    nvcc = restored / "cachebuilder/bin/nvcc"
    compiler = sweep.Compiler(nvcc, tmp_path, {"VIRTUAL_GPU_CHECK_CUBINS": "1"})
    with pytest.raises(PlanError, match="n=4096 k=7168 at m 1"):
        sweep.call_gemms(
            inputs.flashinfer, inputs.manifest.target.gpu, needs.gemms[::-1], restored / "flashinfer", compiler
        )
    [miss] = [json.loads(line) for line in (restored / "cachebuilder/misses.jsonl").read_text().splitlines()]
    assert miss["kernel"] == "fp8_gemm_kernel_swapAB" and ENTRIES[0] in miss["command"]
    [told] = misses.read(restored / "cachebuilder/misses.jsonl").misses
    assert told.advice.endswith("under flashinfer: gemms:, add - {n: 4096, k: 7168}") and not told.can_be_added


def test_another_flashinfer_is_refused_before_anything_is_written(
    whole: building.Built, machine: Machine, tmp_path: Path
) -> None:
    copy = tmp_path / "flashinfer"
    shutil.copytree(FLASHINFER, copy, ignore=shutil.ignore_patterns("cutlass", "cccl", "spdlog", "__pycache__"))
    header = next((copy / "data" / "include").rglob("*.cuh"))
    header.write_text(header.read_text() + "// changed\n")
    other = load_manifest(whole.packed.path.parent / "m.yaml", flashinfer=copy).flashinfer
    with pytest.raises(CompatibilityError, match="flashinfer_headers"):
        restore([whole.packed.path], tmp_path / "dir", machine=Machine(machine.installation, flashinfer=other))
    assert not (tmp_path / "dir").exists()


def test_two_artifacts_of_different_flashinfers_do_not_share_a_folder(
    whole: building.Built, machine: Machine, restored: Path
) -> None:
    stand_in = restored / "flashinfer/python/flashinfer_jit_cache/__init__.py"
    stand_in.write_text(stand_in.read_text().replace("0.6.13", "0.6.12"))
    with pytest.raises(RestoreError, match=r"what is built from FlashInfer 0\.6\.13"):
        restore([whole.packed.path], restored, machine=machine)


def test_the_serving_process_gets_the_variables_and_keeps_flashinfers_gemm(
    whole: building.Built, restored: Path
) -> None:
    index = restore([whole.packed.path], restored, machine=Machine(whole.inputs.installation), force=True).index
    place = places.usual(restored, [index], None)
    serving = {one.name: one.value for one in variables(place, [index], "vllm", {"PYTHONPATH": "/mine"})}
    assert serving["TRTLLM_DG_CACHE_DIR"] == f"{restored}/flashinfer"
    assert serving["TRTLLM_DG_NVCC_COMPILER"] == f"{restored}/cachebuilder/bin/nvcc"
    assert serving["PYTHONPATH"] == f"{restored}/flashinfer/python:/mine"
    assert "VLLM_BLOCKSCALE_FP8_GEMM_FLASHINFER" not in serving


def test_python_takes_the_stand_in_and_writes_no_bytecode_beside_it(restored: Path) -> None:
    code = "import flashinfer_jit_cache as one; print(one.get_jit_cache_dir())"
    environment = {"PYTHONPATH": f"{restored}/flashinfer/python", "PATH": os.environ["PATH"]}
    shown = subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True)
    assert shown.stdout.strip() == f"{restored}/flashinfer/modules"
    package = restored / "flashinfer/python/flashinfer_jit_cache"
    assert (package / "__pycache__").is_file() and not (package / "__pycache__").stat().st_size


def test_where_flashinfers_own_package_is_installed_its_modules_serve_beside_ours(
    whole: building.Built, restored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "site" / "flashinfer_jit_cache"
    for name in ("concat_mla", "page"):
        (package / "jit_cache" / name).mkdir(parents=True)
        (package / "jit_cache" / name / f"{name}.so").write_bytes(b"its own")
    (package / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(package.parent))
    index = restore([whole.packed.path], restored, machine=Machine(whole.inputs.installation), force=True).index
    place = places.usable(restored, [index], None)
    assert place.flashinfer is not None and place.flashinfer != restored / "flashinfer"
    modules = place.flashinfer / "modules"
    assert sorted(path.name for path in modules.iterdir()) == ["concat_mla", entries.GEMM_MODULE, "page"]
    for name in ("concat_mla", "page"):
        assert (modules / name / f"{name}.so").read_bytes() == b"its own"
    assert (modules / entries.GEMM_MODULE).resolve() == restored / "flashinfer/modules" / entries.GEMM_MODULE


@needs_root
def test_a_server_that_cannot_write_into_the_folder_gets_one_of_its_own_with_links(
    whole: building.Built, machine: Machine, ground: Path
) -> None:
    index = restore([whole.packed.path], ground / "dir", machine=machine).index
    own = owned(ground / "own")

    def serve() -> None:
        os.environ |= {"TMPDIR": str(own), "HOME": "/nowhere", "CACHEBUILDER_CACHE_DIR": str(own / "cache")}
        for _ in range(2):  # a server starts again
            place = places.usable(ground / "dir", [index], None)
            assert place.flashinfer is not None and place.flashinfer.is_relative_to(own)
            (place.flashinfer / "tmp").mkdir(exist_ok=True)  # FlashInfer does, and makes kernels in cache/
            (place.flashinfer / "cache" / "new").mkdir(exist_ok=True)
            cubin = place.flashinfer / "cache" / ENTRIES[0] / entries.CUBIN
            assert cubin.read_bytes() == (ground / "dir/flashinfer/cache" / ENTRIES[0] / entries.CUBIN).read_bytes()
            assert (place.flashinfer / "modules" / "concat_mla" / "concat_mla.so").is_file()
            assert (place.flashinfer / "python/flashinfer_jit_cache/__init__.py").is_file()
            assert any("flashinfer" in note for note in place.notes)

    as_user(STRANGER, serve)


def test_a_kernel_of_the_gemm_is_explained_and_reported(whole: building.Built, restored: Path, tmp_path: Path) -> None:
    inside, on_disk = explain(ENTRIES[0], whole.packed.path), explain(ENTRIES[0], restored)
    assert inside.template == "fp8_gemm_kernel_swapAB" and inside.generation is None
    values = {parameter.plain_name: parameter.value for parameter in inside.parameters}
    assert (values["SHAPE_K"], values["BLOCK_N"], values["NumStages"]) == ("7168", "16", "8")
    (asker,) = inside.asked_by
    assert (asker.op, asker.shape) == ("fp8_blockscale_gemm_sm90", "n=4096 k=7168")
    assert inside.resources is not None and inside.resources.registers > 32, "those of the dummy beside it"
    assert on_disk.model_copy(update={"where": inside.where}) == inside
    facts, size = page.write(tmp_path / "page.html", whole.packed.path)
    assert size == (tmp_path / "page.html").stat().st_size
    assert len(facts.kernels) == len(whole.plan.kernels) + 2 and set(facts.modules) == {
        "concat_mla",
        entries.GEMM_MODULE,
    }
    text = (tmp_path / "page.html").read_text()
    assert "fp8_blockscale_gemm_sm90 n=576 k=512" in text and "FlashInfer's modules" in text


def test_a_module_that_flashinfer_does_not_have_is_named(tmp_path: Path) -> None:
    (tmp_path / "m.yaml").write_text(MANIFEST.replace("concat_mla", "no_such_module").replace("  gemms", "  # gemms"))
    with pytest.raises(PlanError, match="describes no module no_such_module"):
        compiling.build_modules(load_manifest(tmp_path / "m.yaml", flashinfer=FLASHINFER), CompileOptions())


def test_an_artifact_packed_again_is_equal(whole: building.Built) -> None:
    inputs, plan = whole.inputs, whole.plan
    assert plan.flashinfer is not None
    options = CompileOptions()
    modules = compiling.build_modules(inputs, options)
    cubins = compiling.compile_gemms(inputs, plan.flashinfer.kernels, options)
    again = pack(inputs, plan, whole.compiled.cubins, building.flashinfer_files_of(inputs, plan, modules, cubins))
    assert hashlib.sha256(again.data).hexdigest() == whole.packed.sha256
