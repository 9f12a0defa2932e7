from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.shell_completion import ShellComplete

from cachebuilder import building
from cachebuilder.cli.main import cli
from cachebuilder.errors import EXIT_CODES
from tests.command_line import cachebuilder
from tests.conftest import Run

WITHOUT_TORCH = """
import sys
for name in ("torch", "deep_gemm", "elftools"):
    sys.modules[name] = None  # an import of it fails
from cachebuilder.cli.main import main
main()
"""


def run_without_torch(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", WITHOUT_TORCH, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_inspect_needs_no_torch(built: building.Built) -> None:
    process = run_without_torch("inspect", built.packed.path)
    assert process.returncode == 0, process.stderr
    assert built.packed.sha256 in process.stdout
    assert f"{len(built.plan.kernels)} kernels" in process.stdout
    assert json.loads(run_without_torch("inspect", built.packed.path, "--json").stdout)["name"] == "small"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        pytest.param(lambda data: data[: len(data) // 2], "truncated", id="truncated"),
        pytest.param(lambda data: data[:100], "truncated", id="almost-all-gone"),
        pytest.param(lambda data: data[:-1], "truncated", id="one-byte-short"),
        pytest.param(lambda data: data[:-9] + bytes([data[-9] ^ 1]) + data[-8:], "zstd", id="bit-flipped"),
        pytest.param(lambda data: b"", "wanted a zstd-compressed artifact", id="empty"),
        pytest.param(lambda data: b"PK" + data, "wanted a zstd-compressed artifact", id="not-zstd"),
    ],
)
def test_a_damaged_artifact_is_an_error_without_a_traceback(
    built: building.Built, change: Callable[[bytes], bytes], words: str, tmp_path: Path
) -> None:
    damaged = tmp_path / "damaged.tar.zst"
    damaged.write_bytes(change(built.packed.path.read_bytes()))
    process = cachebuilder("inspect", damaged, without=["torch", "deep_gemm"])
    assert process.returncode == 8
    assert words in process.stderr and "Traceback" not in process.stderr


def test_each_kind_of_failure_has_its_exit_code(run: Run, small: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.yaml"
    bad.write_text("name: x")
    (tmp_path / "empty").mkdir()
    assert run("build").returncode == 2
    assert run("plan", bad).returncode == 3
    assert run("plan", small, "--deep-gemm", tmp_path / "empty").returncode == 4
    assert run("plan", small, "--nvcc", tmp_path / "none").returncode == 5
    assert run("inspect", tmp_path / "none").returncode == 8
    listed = run("--help").stdout.partition("Exit codes:")[2].strip().splitlines()
    assert [line.split(maxsplit=1) for line in listed] == [[str(code), text] for code, text in EXIT_CODES.items()]


def test_an_output_that_cannot_be_written_is_an_error(run: Run, built: building.Built, small: Path) -> None:
    process = run("build", small, "-o", "/proc/none/a.tar.zst", "--deep-gemm", built.inputs.installation.imported_as)
    assert process.returncode == 8
    assert "/proc/none/a.tar.zst: cannot be written" in process.stderr


def test_the_summary_names_what_was_used_and_what_to_do_next(
    run: Run, built: building.Built, small: Path, tmp_path: Path
) -> None:
    process = run("build", small, "-o", tmp_path / "a.tar.zst", "--deep-gemm", built.inputs.installation.imported_as)
    for words in (
        f"DeepGEMM {built.inputs.installation.version}",
        f"nvcc {built.inputs.toolchain.release}",
        f"{len(built.plan.kernels)} kernels from 43 calls",
        f"sha256    {built.packed.sha256}",
        f"cachebuilder inspect {tmp_path}/a.tar.zst",
    ):
        assert words in process.stdout


def test_output_into_a_closed_pipe_is_no_error(built: building.Built) -> None:
    command = f"{sys.executable} -m cachebuilder inspect --json {built.packed.path} | head -1"
    process = subprocess.run(command, shell=True, capture_output=True, text=True, env=os.environ, check=False)
    assert process.stderr == ""


@pytest.mark.parametrize(
    ("words", "begun", "completed"),
    [
        ([], "ver", {"verify", "verify-signature"}),
        (["plan", "m.yaml"], "--de", {"--deep-gemm"}),
        (["manifest", "--gpu"], "H2", {"H20", "H200"}),
        (["env", "DIR", "--engine"], "v", {"vllm"}),
    ],
)
def test_tab_completes_verbs_options_and_names(words: list[str], begun: str, completed: set[str]) -> None:
    shell = ShellComplete(cli, {}, "cachebuilder", "_CACHEBUILDER_COMPLETE")
    assert {item.value for item in shell.get_completions(words, begun)} == completed
