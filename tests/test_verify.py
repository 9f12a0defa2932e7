from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest

from cachebuilder import building
from cachebuilder.artifact.index import File
from cachebuilder.deepgemm import installation as installations
from cachebuilder.errors import ArtifactError
from cachebuilder.restoring import frozen
from cachebuilder.restoring.folder import open_folder
from cachebuilder.restoring.frozen import frozen_nvcc
from cachebuilder.restoring.machine import Machine
from cachebuilder.restoring.restore import restore
from cachebuilder.verifying.report import Report
from tests.conftest import SMALL, Run
from tests.restored import check, unpack


@pytest.fixture
def folder(built: building.Built, tmp_path: Path) -> Path:
    """The small artifact, restored into another path."""
    return unpack(built.packed.path, tmp_path / "elsewhere")


def listing(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Every path below ``folder`` with its mode and bytes; times are DeepJIT's to touch."""
    return {
        str(path.relative_to(folder)): (path.lstat().st_mode, path.read_bytes() if path.is_file() else b"")
        for path in sorted(folder.rglob("*"))
    }


def copy_of(installation: installations.Installation, to: Path) -> installations.Installation:
    """The same DeepGEMM at another path."""
    shutil.copytree(installation.path, to / "deep_gemm", ignore=shutil.ignore_patterns("__pycache__"))
    beside = installation.path.parent / "tvm_ffi"  # legacy's copy imports it from the folder that it is in
    if beside.exists():
        (to / "tvm_ffi").symlink_to(beside)
    return installations.find(to / "deep_gemm")


def gemms(folder: Path) -> list[Path]:
    return sorted(path for path in (folder / "cache").iterdir() if "gemm" in path.name)


def a_gemm(folder: Path) -> Path:
    return gemms(folder)[0]


def missing(report: Report) -> set[str]:
    return {kernel.entry for replay in report.replays for kernel in replay.missing}


def different(report: Report) -> set[str]:
    return {difference.field for replay in report.replays for difference in replay.differences}


@pytest.mark.slow
def test_every_call_hits_in_a_read_only_cache_with_no_compiler_in_reach(
    built: building.Built, folder: Path, run: Run, tmp_path: Path
) -> None:
    # What a serving container has: a PATH without nvcc, CUDA_HOME an empty folder, a cache that nobody may write.
    tools, empty = tmp_path / "tools", tmp_path / "no-cuda"
    tools.mkdir()
    empty.mkdir()
    for name in ("sh", "cat", "cc", "as", "ld"):
        (tools / name).symlink_to(shutil.which(name) or "")
    for path in (folder, *folder.rglob("*")):
        path.chmod(path.stat().st_mode & 0o555)
    before = listing(folder)
    done = run(
        "verify",
        folder,
        "--deep-gemm",
        built.inputs.installation.imported_as,
        "--json",
        PATH=str(tools),
        CUDA_HOME=str(empty),
    )
    assert done.returncode == 0, done.stderr
    [replay] = json.loads(done.stdout)["replays"]
    assert replay["calls"] == built.plan.calls == 43
    assert set(replay["hits"]) == {kernel.entry for kernel in built.plan.kernels}
    assert not replay["missing"] and not replay["refusals"] and not replay["differences"]
    assert listing(folder) == before and not list(empty.iterdir())
    for path in (folder, *folder.rglob("*")):
        path.chmod(path.stat().st_mode | 0o200)


@pytest.mark.slow
def test_a_removed_kernel_is_named_with_the_points_that_need_it(built: building.Built, folder: Path, run: Run) -> None:
    removed = a_gemm(folder)
    shutil.rmtree(removed)
    before = listing(folder)
    done = run("verify", folder, "--deep-gemm", built.inputs.installation.imported_as)
    assert done.returncode == 11
    kernel = next(kernel for kernel in built.plan.kernels if kernel.entry == removed.name)
    [selection] = kernel.selected_by
    [points] = selection.ranges
    assert f"missing   {removed.name}" in done.stdout
    assert f"ops[0] fp8_gemm_nt n=576 k=512, 132 SMs: m {points.first}–{points.last}" in done.stdout
    assert f"{len(built.plan.kernels) - 1} kernels found, 1 missing" in done.stdout
    assert "hint: remove what is damaged and restore the artifact again" in done.stderr
    assert listing(folder) == before  # a miss is not compiled into it


@pytest.mark.slow
def test_damaged_entries_are_named_and_count_as_missing(built: building.Built, folder: Path) -> None:
    truncated, flipped, gone = (gemm / "kernel.cubin" for gemm in gemms(folder)[:3])
    truncated.write_bytes(truncated.read_bytes()[:-1])
    flipped.write_bytes(b"\x7fELX" + flipped.read_bytes()[4:])
    gone.unlink()
    report = check(folder, built.inputs.installation)
    words = {truncated: "bytes, found", flipped: "wanted sha256", gone: "wanted a file, found none"}
    said = {damage.entry: str(damage) for damage in report.damage}
    assert said.keys() == {cubin.parent.name for cubin in words}
    for cubin, expected in words.items():
        assert said[cubin.parent.name].startswith(f"{cubin.parent.name}/kernel.cubin: ")
        assert expected in said[cubin.parent.name]
    assert missing(report) == said.keys() and not report.complete
    assert all(kernel.damaged for replay in report.replays for kernel in replay.missing)


@pytest.mark.slow
def test_a_placeholder_cubin_is_refused_even_where_the_index_lists_it(built: building.Built, folder: Path) -> None:
    cubin = a_gemm(folder) / "kernel.cubin"
    cubin.write_bytes(b"to be compiled\n")
    (index_file,) = (folder / "cachebuilder" / "artifacts").glob("*.json")
    index = open_folder(folder).artifacts[0].index
    placeholder = cubin.read_bytes()
    lying = File(name=cubin.name, size=len(placeholder), sha256=hashlib.sha256(placeholder).hexdigest())
    entries = tuple(
        entry.model_copy(update={"files": tuple(lying if f.name == lying.name else f for f in entry.files)})
        if entry.name == cubin.parent.name
        else entry
        for entry in index.entries
    )
    index_file.write_text(index.model_copy(update={"entries": entries}).model_dump_json(exclude_none=True))
    report = check(folder, built.inputs.installation)
    assert not report.damage and not missing(report) and not report.complete
    refusal = report.replays[0].refusals[0]
    assert refusal.op == 0 and "device kernel image is invalid" in refusal.text


@pytest.mark.slow
def test_a_changed_header_is_named(built: building.Built, folder: Path, tmp_path: Path) -> None:
    changed = copy_of(built.inputs.installation, tmp_path / "changed")
    header = next((changed.include / "deep_gemm").rglob("sm90_fp8_gemm_1d2d.cuh"))
    header.write_text(header.read_text() + "\n// one more line\n")
    report = check(folder, changed)
    assert "headers" in different(report)
    kernels = {kernel.entry for kernel in built.plan.kernels}
    assert missing(report) and not missing(report) & kernels and not report.complete


@pytest.mark.slow
def test_another_compiler_text_is_named(built: building.Built, folder: Path, run: Run) -> None:
    text = (frozen_nvcc(folder).parent / "version.txt").read_text()
    frozen.write(folder / frozen.FOLDER, text.replace("release 13.", "release 14."), "small", "0" * 64)
    done = run("verify", folder, "--deep-gemm", built.inputs.installation.imported_as)
    assert done.returncode == 11
    assert "0 kernels found" in done.stdout and "differs   compiler" in done.stdout
    assert "  wanted: Cuda compilation tools, release 13." in done.stdout
    assert "  found:  Cuda compilation tools, release 14." in done.stdout
    assert "damaged   cachebuilder/bin/version.txt: wanted what this version" in done.stdout


@pytest.mark.slow
def test_another_sm_count_is_named(built: building.Built, folder: Path, run: Run, tmp_path: Path) -> None:
    other = tmp_path / "other.yaml"
    other.write_text(SMALL.replace("{gpu: H200}", "{gpu: H200, sm_counts: [132, 100]}"))
    done = run("verify", folder, "--manifest", other, "--deep-gemm", built.inputs.installation.imported_as)
    assert done.returncode == 11
    assert "100 SMs: m " in done.stdout and "132 SMs: m " not in done.stdout.replace("100 SMs", "")
    assert "differs   sm_counts" in done.stdout
    assert "target.sm_counts" in done.stderr


@pytest.mark.slow
def test_an_ops_own_sm_count_is_replayed_for_that_op_alone(built: building.Built, folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.yaml"
    other.write_text(SMALL.replace("k: 512}", "k: 512, sm_counts: [100]}", 1))
    report = check(folder, built.inputs.installation, other)
    [replay] = report.replays
    assert different(report) == {"sm_counts"} and not report.complete
    assert replay.calls == built.plan.calls
    assert {(s.op, s.sm_count) for kernel in replay.missing for s in kernel.selected_by} == {(0, 100)}


@pytest.mark.slow
def test_another_install_path_matters_to_the_legacy_generation_only(
    built: building.Built, folder: Path, tmp_path: Path
) -> None:
    elsewhere = copy_of(built.inputs.installation, tmp_path / "install")
    report = check(folder, elsewhere)
    if built.plan.generation == "deepjit":
        assert report.complete and not different(report)
        return
    [difference] = report.replays[0].differences
    assert difference.field == "install_include"
    assert (difference.wanted, difference.found) == (built.plan.include, str(elsewhere.include))
    assert "restore again" in difference.remedy
    assert len(missing(report)) == len(built.plan.kernels)


@pytest.mark.slow
@pytest.mark.parametrize("deep_gemm", ["legacy"], indirect=True, scope="session")
def test_a_cache_for_a_copy_behind_a_link_is_the_one_that_the_copy_asks_for(
    built: building.Built, tmp_path: Path
) -> None:
    (tmp_path / "deep_gemm").symlink_to(built.inputs.installation.imported_as)
    linked = installations.find(tmp_path / "deep_gemm")
    restored = restore([built.packed.path], tmp_path / "to", machine=Machine(linked))
    assert restored.relocated and check(tmp_path / "to", linked).complete


@pytest.mark.slow
def test_another_manifest_is_enough_or_not(built: building.Built, folder: Path, tmp_path: Path) -> None:
    less, more = tmp_path / "less.yaml", tmp_path / "more.yaml"
    less.write_text(SMALL.replace("max_tokens: 40", "max_tokens: 20"))
    more.write_text(SMALL.replace("max_tokens: 40", "max_tokens: 200"))
    assert check(folder, built.inputs.installation, less).complete
    report = check(folder, built.inputs.installation, more)
    assert missing(report) and not different(report)
    points = [
        r.first
        for replay in report.replays
        for kernel in replay.missing
        for selection in kernel.selected_by
        if selection.op == 0
        for r in selection.ranges
    ]
    assert points and min(points) > 40


@pytest.mark.slow
def test_an_entry_that_no_index_lists_is_a_hit_of_unknown_bytes(built: building.Built, folder: Path) -> None:
    (index_file,) = (folder / "cachebuilder" / "artifacts").glob("*.json")
    index = open_folder(folder).artifacts[0].index
    index_file.write_text(index.model_copy(update={"entries": index.entries[1:]}).model_dump_json(exclude_none=True))
    report = check(folder, built.inputs.installation)
    assert report.complete and report.replays[0].unlisted == (index.entries[0].name,)


def test_a_manifest_that_was_changed_in_the_folder_proves_nothing(built: building.Built, tmp_path: Path) -> None:
    """Fewer tokens there would need fewer kernels, and a cache that misses would pass."""
    folder = unpack(built.packed.path, tmp_path / "restored")
    [manifest] = (folder / "cachebuilder" / "artifacts").glob("*.yaml")
    manifest.write_bytes(manifest.read_bytes().replace(b"max_tokens: 40", b"max_tokens: 4"))
    with pytest.raises(ArtifactError, match=f"{manifest.name}: wanted sha256"):
        check(folder, built.inputs.installation)
    unpack(built.packed.path, folder)  # restored again, it is the packed one again
    assert open_folder(folder).artifacts[0].manifest == built.inputs.manifest_bytes


def test_a_folder_that_was_not_restored_is_one_sentence(built: building.Built, run: Run, tmp_path: Path) -> None:
    done = run("verify", tmp_path, "--deep-gemm", built.inputs.installation.imported_as)
    assert done.returncode == 8
    assert "found no cachebuilder/artifacts" in done.stderr and "cachebuilder restore" in done.stderr


def test_a_frozen_compilers_text_that_is_gone_is_one_sentence(built: building.Built, folder: Path) -> None:
    frozen_nvcc(folder).with_name("version.txt").unlink()
    with pytest.raises(ArtifactError, match="the frozen nvcc's text cannot be read: there is none") as error:
        check(folder, built.inputs.installation)
    assert error.value.hint == "restore the artifact again"


@pytest.mark.slow
def test_an_artifact_is_restored_aside_and_checked(built: building.Built, run: Run) -> None:
    done = run("verify", built.packed.path, "--deep-gemm", built.inputs.installation.imported_as)
    assert done.returncode == 0, done.stderr
    assert f"43 calls, {len(built.plan.kernels)} kernels found, 0 missing" in done.stdout
