from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import zstandard

from cachebuilder import building
from cachebuilder.artifact.read import read_index
from cachebuilder.common import cache as paths
from cachebuilder.compiling.compiler import CompileOptions
from cachebuilder.compiling.store import CubinStore, NoStore
from cachebuilder.cuda import toolchain as toolchains
from cachebuilder.deepgemm import entries
from cachebuilder.errors import CompileError, ToolchainError
from cachebuilder.manifest.inputs import load_manifest
from tests.conftest import own_cache


def members(artifact: Path) -> dict[str, bytes]:
    """The artifact's members, in order. For artifacts of our own making only."""
    data = zstandard.ZstdDecompressor().decompress(artifact.read_bytes())
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]


def spy_nvcc(folder: Path) -> tuple[Path, Path]:
    """The real nvcc, behind a script that writes each command line to a log; returns the script and the log."""
    real, log, spy = toolchains.find().nvcc, folder / "calls.log", folder / "nvcc"
    spy.write_text(f'#!/bin/sh\necho "$*" >>{log}\nexec {real} "$@"\n')
    spy.chmod(0o755)
    return spy, log


def test_the_artifact_holds_each_planned_kernel_as_deepgemm_reads_it(built: building.Built) -> None:
    data_of = members(built.packed.path)
    names = list(data_of)
    assert names[:2] == ["artifact.json", "manifest.yaml"]
    assert data_of["manifest.yaml"] == built.inputs.manifest_bytes
    files = entries.FILES[built.plan.generation]
    expected = {f"cache/{kernel.entry}/{file}" for kernel in built.plan.kernels for file in files}
    assert set(names[2:]) == expected and len(names) == len(expected) + 2
    for kernel in built.plan.kernels:
        assert data_of[f"cache/{kernel.entry}/kernel.cu"].decode() == kernel.source
        assert data_of[f"cache/{kernel.entry}/kernel.cubin"][:4] == b"\x7fELF"


@pytest.mark.slow
def test_two_builds_in_different_folders_are_equal_byte_for_byte(
    built: building.Built, small: Path, tmp_path: Path
) -> None:
    deep_gemm = str(built.inputs.installation.imported_as)
    process = start_build(
        small, tmp_path, "--deep-gemm", deep_gemm, "-j", "1", HOME=str(tmp_path), TMPDIR=str(tmp_path)
    )
    output, errors = process.communicate()
    assert process.returncode == 0, errors
    assert built.packed.sha256 in output
    assert (tmp_path / "out.tar.zst").read_bytes() == built.packed.path.read_bytes()


@pytest.mark.slow
def test_a_build_after_a_build_runs_no_compiler(built: building.Built, tmp_path: Path) -> None:
    spy, log = spy_nvcc(tmp_path)
    manifest = tmp_path / "m.yaml"
    manifest.write_bytes(built.inputs.manifest_bytes)
    inputs = load_manifest(manifest, nvcc=spy, deep_gemm=built.inputs.installation.imported_as)
    again = building.build(inputs, tmp_path / "again.tar.zst")
    assert log.read_text().splitlines() == ["--version"]
    assert (again.compiled.compiled, again.compiled.reused) == ([], len(built.plan.kernels))
    assert again.packed.sha256 == built.packed.sha256


@pytest.mark.slow
@pytest.mark.parametrize("deep_gemm", ["deepjit"], indirect=True, scope="session")
def test_only_what_changed_is_compiled(built: building.Built, tmp_path: Path) -> None:
    text = built.inputs.manifest_bytes.decode().replace("max_tokens: 40", "max_tokens: 200")
    (tmp_path / "more.yaml").write_text(text)
    inputs = load_manifest(tmp_path / "more.yaml", deep_gemm=built.inputs.installation.imported_as)
    more = building.build(inputs, tmp_path / "more.tar.zst", options=CompileOptions(check_code=0))
    new = {kernel.entry for kernel in more.plan.kernels} - {kernel.entry for kernel in built.plan.kernels}
    assert 0 < len(new) < len(more.plan.kernels)
    assert {kernel.entry for kernel in more.compiled.compiled} == new


def test_a_damaged_cubin_in_the_store_counts_as_missing(tmp_path: Path) -> None:
    store = CubinStore(tmp_path)
    store.put("ab12", b"\x7fELF code")
    assert store.get("ab12") == b"\x7fELF code"
    (tmp_path / "ab" / "ab12").write_bytes((tmp_path / "ab" / "ab12").read_bytes()[:-1])
    assert store.get("ab12") is None


@pytest.mark.slow
def test_a_failed_build_leaves_the_old_artifact_alone(built: building.Built, tmp_path: Path) -> None:
    output = tmp_path / "a.tar.zst"
    output.write_text("the old one")
    broken = tmp_path / "nvcc"
    broken.write_text(
        f'#!/bin/sh\n[ "$1" = --version ] && exec {built.inputs.toolchain.nvcc} --version\necho no luck >&2\nexit 1\n'
    )
    broken.chmod(0o755)
    inputs = dataclasses.replace(built.inputs, toolchain=toolchains.find(broken))
    with pytest.raises(CompileError, match="no luck"):
        building.build(inputs, output, options=CompileOptions(use_store=False))
    assert output.read_text() == "the old one"
    assert sorted(os.listdir(tmp_path)) == ["a.tar.zst", "nvcc"]


def start_build(manifest: Path, folder: Path, *options: str, **environment: str) -> subprocess.Popen[str]:
    """A build as a program, with a cache folder of its own; test_entry_points.py compares its code with nvcc's own."""
    if not (cache := folder / "cache").exists():
        own_cache(cache)
    environment = os.environ | {"CACHEBUILDER_CACHE_DIR": str(cache)} | environment
    command = [sys.executable, "-m", "cachebuilder", "build", str(manifest), "-o", str(folder / "out.tar.zst")]
    command += ["--check-code", "0", *options]
    return subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell makes its background jobs, which may include this test, ignore SIGINT.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def planned_cache(manifest: Path, folder: Path) -> None:
    """Make a cache folder with the plan of ``manifest``: a build there imports no torch, and starts its compilers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CACHEBUILDER_CACHE_DIR", str(own_cache(folder)))
        building.plan(load_manifest(manifest))


def compilers_under(folder: Path) -> list[str]:
    """The names of the processes whose working folder is inside ``folder``."""
    names = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended meanwhile, or it is another user's
            if (process / "cwd").readlink().is_relative_to(folder):
                names.append((process / "comm").read_text().strip())
    return names


def wait_for_compilers(folder: Path, process: subprocess.Popen[str]) -> None:
    while not compilers_under(folder):
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)


@pytest.mark.slow
def test_ctrl_c_ends_the_compilers_and_leaves_nothing_broken(tiny: Path, tmp_path: Path) -> None:
    planned_cache(tiny, tmp_path / "cache")
    process = start_build(tiny, tmp_path)
    wait_for_compilers(tmp_path, process)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "interrupted" in errors and "Traceback" not in errors
    assert compilers_under(tmp_path) == []
    assert not (tmp_path / "out.tar.zst").exists()
    assert os.listdir(tmp_path / "cache" / "scratch") == []


@pytest.mark.slow
def test_a_build_after_killed_ones_makes_the_same_bytes(tiny: Path, tmp_path: Path) -> None:
    expected = building.build(load_manifest(tiny), tmp_path / "expected.tar.zst").packed.sha256
    planned_cache(tiny, tmp_path / "cache")
    for seconds in (0.0, 4.0):
        process = start_build(tiny, tmp_path)
        wait_for_compilers(tmp_path, process)
        time.sleep(seconds)
        process.kill()
        process.communicate()
        while compilers_under(tmp_path):  # they end by themselves
            time.sleep(0.05)
    process = start_build(tiny, tmp_path)
    output, errors = process.communicate()
    assert process.returncode == 0, errors
    assert expected in output


@pytest.mark.slow
def test_two_builds_at_once_share_a_store(tiny: Path, tmp_path: Path) -> None:
    one, two = start_build(tiny, tmp_path), start_build(tiny, tmp_path)
    outputs = [process.communicate() for process in (one, two)]
    assert (one.returncode, two.returncode) == (0, 0), outputs
    digests = [line for output, _ in outputs for line in output.splitlines() if line.startswith("sha256")]
    assert len(digests) == 2 and len(set(digests)) == 1


def test_no_store_keeps_nothing() -> None:
    store = NoStore()
    store.put("ab12", b"x")
    assert store.get("ab12") is None


def test_the_mtime_is_source_date_epoch(built: building.Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    again = building.build(built.inputs, tmp_path / "dated.tar.zst")
    data = zstandard.ZstdDecompressor().decompress(again.packed.path.read_bytes())
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        headers = {(member.mtime, member.uid, member.gid, member.mode, member.uname) for member in tar}
    assert headers == {(1700000000, 0, 0, 0o644, "")}


def test_the_index_says_which_points_select_a_kernel(built: building.Built) -> None:
    index = read_index(built.packed.path)
    planned = {kernel.entry: kernel.selected_by for kernel in built.plan.kernels}
    assert {entry.name: entry.selected_by for entry in index.entries} == planned
    assert index.fingerprint.digest() == index.fingerprint_digest
    legacy = index.fingerprint.generation == "legacy"
    assert (index.fingerprint.install_include == str(built.inputs.installation.include)) is legacy


@pytest.mark.parametrize("release", ["11.0", "13.9"])
def test_a_release_that_is_not_installed_is_an_error(release: str) -> None:
    with pytest.raises(ToolchainError, match=f"wants nvcc {release}, found"):
        toolchains.find(release=release)


def test_an_nvcc_that_does_not_run_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ToolchainError, match="does not run"):
        toolchains.find(tmp_path / "nvcc")


def test_cuda_home_comes_before_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bin").mkdir()
    spy, _ = spy_nvcc(tmp_path / "bin")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert (toolchains.find().nvcc, toolchains.find().origin) == (spy, "CUDA_HOME")


def test_ctrl_c_while_a_scratch_folder_is_removed_leaves_nothing_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CACHEBUILDER_CACHE_DIR", str(tmp_path))
    remove, calls = shutil.rmtree, []

    def interrupted_at_first(folder: Path, **options: bool) -> None:
        calls.append(folder)
        if len(calls) == 1:
            (folder / "first").unlink()
            raise KeyboardInterrupt
        remove(folder, **options)

    monkeypatch.setattr(shutil, "rmtree", interrupted_at_first)
    with pytest.raises(KeyboardInterrupt), paths.scratch_folder() as folder:
        (folder / "first").touch()
        (folder / "second").touch()
    assert os.listdir(tmp_path / "scratch") == []
