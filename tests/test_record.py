"""Records programs: what they ask for is in the manifest, and the cache that is built from it serves them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cachebuilder import building
from cachebuilder.authoring import record as recording
from cachebuilder.common import kept
from cachebuilder.compiling.compiler import CompileOptions
from cachebuilder.deepgemm import installation
from cachebuilder.manifest import schema as manifests
from cachebuilder.manifest.inputs import load_manifest
from cachebuilder.restoring import frozen, misses
from tests.conftest import ROOT, SMALL, Run
from tests.restored import check, unpack


def program(deep_gemm: Path | None, *requests: str) -> list[str]:
    """The command of ``tests/asking.py``."""
    folder = installation.find(deep_gemm).path.parent
    return [sys.executable, "-m", "tests.asking", str(folder), *requests]


def names(manifest: Path) -> list[str | None]:
    return [source.kernel for source in manifests.load(manifest)[0].sources]


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """The program is a module of this repository."""
    monkeypatch.chdir(ROOT)


@pytest.mark.slow
def test_a_program_is_served_from_the_cache_built_of_its_recording(
    built: building.Built, deep_gemm: Path | None, run: Run, tmp_path: Path
) -> None:
    recorded, output = tmp_path / "recorded.yaml", tmp_path / "recorded.tar.zst"
    result = run("record", "-o", recorded, "--gpu", "H200", "--", *program(deep_gemm, "dense", "0"))
    assert result.returncode == 0, result.stderr
    assert "2 kernels of python" in result.stdout and "- {op: fp8_gemm_nt, n: 576, k: 512}" in result.stdout
    text = recorded.read_text()
    assert sorted(filter(None, names(recorded))) == ["sm90_fp8_gemm_1d2d", "transpose_fp32"]
    assert "an op for it: {op: fp8_gemm_nt, n: 576, k: 512}" in text and str(tmp_path) not in text

    here = installation.find(deep_gemm)
    building.build(load_manifest(recorded, deep_gemm=here.path), output, options=CompileOptions(check_code=0))
    assert check(output, here).complete
    served = unpack(output, tmp_path / "served")
    asked = run("run", served, "--deep-gemm", here.path, "--", *program(deep_gemm, "dense", "refused", "0"))
    assert asked.returncode == 0, asked.stderr
    assert "is not in the restored cache" in asked.stderr + asked.stdout
    missed = {miss.kernel for miss in misses.read(served / "cachebuilder" / "misses.jsonl").misses}
    assert missed == {"sm90_fp8_gemm_1d1d"}, "and neither of the two that were recorded"


@pytest.mark.slow
@pytest.mark.parametrize("deep_gemm", ["deepjit"], indirect=True, scope="session")
def test_what_the_ops_of_a_manifest_cover_is_not_added_to_it(deep_gemm: Path | None, run: Run, tmp_path: Path) -> None:
    manifest = tmp_path / "m.yaml"
    manifest.write_text(f"# ours\n{SMALL}")  # its K is 512, which is 4 scales
    result = run("record", "--add-to", manifest, "--", *program(deep_gemm, "layout4", "layout5", "0"))
    assert result.returncode == 0, result.stderr
    said = " ".join(result.stdout.split())  # a long path breaks its line
    assert "covered 1 kernels" in said and "1 sources added" in said
    [source] = manifests.load(manifest)[0].sources
    assert source.kernel == "transpose_fp32" and "64, 5" in source.source
    assert manifest.read_text().startswith(f"# ours\n{SMALL.splitlines()[0]}\n")


@pytest.mark.slow
@pytest.mark.parametrize("deep_gemm", ["deepjit"], indirect=True, scope="session")
def test_a_recording_against_another_generations_deepgemm_is_refused_and_kept(
    deep_gemm: Path | None, small: Path, run: Run, tmp_path: Path
) -> None:
    from tests.conftest import LEGACY

    manifest = tmp_path / "m.yaml"
    manifest.write_text(SMALL)
    result = run("record", "--add-to", manifest, "--deep-gemm", LEGACY, "--", *program(deep_gemm, "layout4", "0"))
    assert result.returncode == 16 and "wanted kernels of the legacy generation" in result.stderr
    assert manifest.read_text() == SMALL
    folder = Path(result.stderr.split("what was recorded is kept in ")[1].split()[0])
    assert run("misses", folder / "asked.jsonl", "--add-to", manifest).returncode == 0, "nothing is lost"
    assert len(manifests.load(manifest)[0].sources) == 1


@pytest.mark.slow
@pytest.mark.parametrize("deep_gemm", ["deepjit"], indirect=True, scope="session")
@pytest.mark.parametrize("how", ["ctrl-c", "sigterm"])
def test_ending_a_server_is_the_normal_end_of_a_recording(how: str, deep_gemm: Path | None, tmp_path: Path) -> None:
    manifest = tmp_path / "m.yaml"
    command = [sys.executable, "-m", "cachebuilder", "record", "-o", str(manifest), "--gpu", "H200", "--"]
    recorder = subprocess.Popen(
        [*command, *program(deep_gemm, "layout4", "stay")],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # a terminal's: Ctrl-C reaches all of it
    )
    assert recorder.stdout is not None
    assert any("asked" in line for line in recorder.stdout)
    if how == "ctrl-c":
        os.killpg(recorder.pid, signal.SIGINT)
    else:
        recorder.terminate()
    output = recorder.stdout.read()
    assert recorder.wait(60) == 0, output
    assert names(manifest) == ["transpose_fp32"] and "1 kernels of python" in output


@pytest.mark.slow
@pytest.mark.parametrize("deep_gemm", ["legacy"], indirect=True, scope="session")
def test_a_kernel_that_does_not_compile_is_named_and_left_out(deep_gemm: Path | None, run: Run, tmp_path: Path) -> None:
    manifest = tmp_path / "m.yaml"
    result = run("record", "-o", manifest, "--gpu", "H200", "--", *program(deep_gemm, "layout4", "refused", "3"))
    assert result.returncode == 3, "the program's own exit code"
    assert "sm90_fp8_gemm_1d1d: left out, because its compilation failed" in result.stdout
    assert set(names(manifest)) == {"transpose_fp32"}


@pytest.mark.slow
@pytest.mark.parametrize("deep_gemm", ["deepjit"], indirect=True, scope="session")
def test_several_processes_are_recorded_together(deep_gemm: Path | None, run: Run, tmp_path: Path) -> None:
    ask = " ".join(program(deep_gemm, "layout4", "0"))
    manifest = tmp_path / "m.yaml"
    result = run("record", "-o", manifest, "--gpu", "H200", "--", "sh", "-c", f"{ask} & {ask} & wait")
    assert result.returncode == 0, result.stderr
    assert names(manifest) == ["transpose_fp32"] and "1 kernels of sh, 2 compilations" in result.stdout


@pytest.mark.parametrize(
    ("options", "environment", "code", "words"),
    [
        pytest.param([], {}, 2, "wanted -o FILE for a new manifest, or --add-to", id="neither"),
        pytest.param(["-o", "NEW", "--add-to", "OLD"], {}, 2, "and not both", id="both"),
        pytest.param(["--add-to", "OLD", "--gpu", "H200"], {}, 2, "has its target", id="gpu-twice"),
        pytest.param(["-o", "OLD", "--gpu", "H200"], {}, 3, "exists already", id="would-overwrite"),
        pytest.param(["-o", "none/NEW", "--gpu", "H200"], {}, 3, "cannot be written", id="no-folder"),
        pytest.param(["-o", "NEW", "--gpu", "A100"], {}, 16, "wanted one of", id="unknown-gpu"),
        pytest.param(["-o", "NEW", "--gpu", "H200"], {"DG_JIT_USE_NVRTC": "1"}, 16, "unset DG_JIT_USE_NVRTC", id="nvrtc"),
        pytest.param(["-o", "NEW", "--gpu", "H200", "--name", "a/b"], {}, 3, "name: wanted", id="bad-name"),
        pytest.param(["-o", "NEW", "--gpu", "H200"], {}, 16, "CMD", id="no-such-program"),
    ],
)  # fmt: skip
def test_what_cannot_be_recorded_is_refused_before_the_program_runs(
    options: list[str], environment: dict[str, str], code: int, words: str, run: Run, tmp_path: Path
) -> None:
    (tmp_path / "OLD").write_text(SMALL)
    arguments = [str(tmp_path / option) if option.endswith(("NEW", "OLD")) else option for option in options]
    command = ["CMD"] if words == "CMD" else ["touch", str(tmp_path / "ran")]
    result = run("record", *arguments, "--", *command, **environment)
    assert result.returncode == code and words in result.stderr, result.stderr
    assert not (tmp_path / "ran").exists() and not (tmp_path / "NEW").exists()
    assert (tmp_path / "OLD").read_text() == SMALL


def test_a_program_that_asks_for_nothing_leaves_no_manifest(run: Run, tmp_path: Path) -> None:
    result = run("record", "-o", tmp_path / "m.yaml", "--gpu", "H200", "--", "sh", "-c", "exit 7")
    assert result.returncode == 16
    assert "sh (exit code 7) asked DeepGEMM's compiler for nothing" in result.stderr
    assert not (tmp_path / "m.yaml").exists()


def test_a_frozen_nvcc_is_no_compiler_to_record_with(run: Run, tmp_path: Path) -> None:
    nvcc = frozen.write(tmp_path / frozen.FOLDER, "Cuda compilation tools, release 13.0, V13.0.88\n", "x", "0")
    result = run("record", "-o", tmp_path / "m.yaml", "--gpu", "H200", "--nvcc", nvcc, "--", "true")
    assert result.returncode == 5 and "found the frozen one of a restored cache" in result.stderr


def test_cleaning_the_cache_leaves_a_running_recording_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CACHEBUILDER_CACHE_DIR", str(tmp_path / "cache"))
    with recording.open_recorder(recording.new_manifest(tmp_path / "m.yaml", "new", "H200")) as recorder:
        assert kept.prune(unused_seconds=0).in_use == 1
        assert recorder.folder.is_dir()
    assert not recorder.folder.exists()
