"""Every change in a restored folder is found by each verb that takes one, and nothing in the folder is run."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from cachebuilder.compiling import record as build_record
from cachebuilder.errors import ArtifactError, VerifyError
from cachebuilder.inspecting import diff
from cachebuilder.restoring import serving
from cachebuilder.restoring.folder import open_folder
from cachebuilder.restoring.frozen import frozen_nvcc
from cachebuilder.restoring.machine import Machine
from cachebuilder.restoring.restore import restore
from cachebuilder.verifying import report
from tests.conftest import ROOT, Run

ARTIFACT = ROOT / "tests" / "data" / "v1-deepjit.tar.zst"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    restore([ARTIFACT], tmp_path / "dir", machine=Machine(None), force=True)
    return tmp_path / "dir"


def entry(folder: Path) -> Path:
    return min((folder / "cache").iterdir())


def append(path: Path, text: str) -> None:
    path.write_text(path.read_text() + text)


def link_to_copy(path: Path) -> None:
    """Move it out of the restored folder, and put a link in its place."""
    root = next(parent for parent in path.parents if parent.name == "dir").parent
    path.rename(root / "elsewhere")
    path.symlink_to(root / "elsewhere")


def sparse(path: Path) -> None:
    path.unlink()
    with path.open("wb") as file:
        file.truncate(1 << 40)


def fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def zeros(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


OWN_TEXT = "wanted what this version of cachebuilder writes, found another version's or a changed one"
CHANGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "changed-nvcc": (lambda dir: append(frozen_nvcc(dir), "\n"), f"bin/nvcc: {OWN_TEXT}"),
    "nvcc-of-other-code": (lambda dir: frozen_nvcc(dir).write_text("#!/bin/sh\ntouch PWNED\n"), f"nvcc: {OWN_TEXT}"),
    "nvcc-that-is-gone": (lambda dir: frozen_nvcc(dir).unlink(), "bin/nvcc: wanted a file, found none"),
    "nvcc-that-cannot-be-executed": (lambda dir: frozen_nvcc(dir).chmod(0o644), "wanted a file that can be executed"),
    "nvcc-is-a-link": (lambda dir: link_to_copy(frozen_nvcc(dir)), "bin/nvcc: wanted what .*, found a link"),
    "changed-text": (lambda dir: append(dir / "cachebuilder/bin/version.txt", "x"), "version.txt: wanted what this"),
    "more-in-bin": (lambda dir: (dir / "cachebuilder/bin/ptxas").write_text(""), "ptxas: wanted no such file"),
    "more-in-cachebuilder": (lambda dir: (dir / "cachebuilder/lib64").mkdir(), "lib64: wanted no such file, found a f"),
    "more-in-artifacts": (lambda dir: (dir / "cachebuilder/artifacts/x").write_text(""), "artifacts/x: wanted no such"),
    "more-in-an-entry": (lambda dir: (entry(dir) / "more").write_text(""), "more: wanted no such file, found a file"),
    "an-entry-is-a-link": (lambda dir: link_to_copy(entry(dir)), "wanted a folder, found a link"),
    "a-cubin-is-a-link": (lambda dir: link_to_copy(entry(dir) / "kernel.cubin"), "kernel.cubin: .* found a link"),
    "a-cubin-is-a-fifo": (lambda dir: fifo(entry(dir) / "kernel.cubin"), "found another kind of file"),
    "a-cubin-is-a-terabyte": (lambda dir: sparse(entry(dir) / "kernel.cubin"), "bytes, found 1099511627776"),
    "a-cubin-is-dev-zero": (lambda dir: zeros(entry(dir) / "kernel.cubin"), "found a link"),
    "the-nvcc-is-a-fifo": (lambda dir: fifo(frozen_nvcc(dir)), "nvcc: wanted what .*, found another kind of file"),
    "the-cache-is-a-link": (lambda dir: link_to_copy(dir / "cache"), "cache: wanted a folder, found a link"),
    "an-entry-is-gone": (lambda dir: shutil.rmtree(entry(dir)), "wanted an entry, found none"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_found_as_damage(name: str, folder: Path) -> None:
    change, words = CHANGES[name]
    assert open_folder(folder).damage() == []
    change(folder)
    with pytest.raises(VerifyError, match=f"(?s)damaged: .*{words}"):
        serving.open_whole(folder)


def test_a_log_of_misses_and_what_restores_leave_is_no_damage(folder: Path) -> None:
    own = folder / "cachebuilder"
    (own / "misses.jsonl").write_text("{}")
    for name in ("misses.jsonl.d", "tmp/1-0123456789abcdef"):
        (own / name).mkdir(parents=True)
    (own / "bin" / ".nvcc.0123456789abcdef").write_text("half")
    (own / "artifacts" / f"{'0' * 64}.{'1' * 16}.yaml").write_text("of a restore that was killed")
    (folder / "cache" / "somebody_elses").mkdir()
    (folder / "scratch").mkdir()
    assert serving.open_whole(folder).damage() == []


@pytest.mark.parametrize("verb", ["run", pytest.param("verify", marks=pytest.mark.slow), "doctor"])
def test_a_changed_nvcc_is_found_and_not_run(verb: str, folder: Path, run: Run, tmp_path: Path) -> None:
    frozen_nvcc(folder).write_text(f"#!/bin/sh\ntouch {tmp_path}/PWNED\n")
    more = {"run": ["--", "true"], "verify": [], "doctor": []}[verb]
    done = run(verb, folder, *more, DG_JIT_NVCC_COMPILER=str(frozen_nvcc(folder)))
    text = " ".join((done.stdout + done.stderr).split())
    assert "cachebuilder/bin/nvcc: wanted what this version of cachebuilder writes" in text
    assert not (tmp_path / "PWNED").exists()


def peak_kib() -> int:
    """The most memory that this process had at once."""
    [peak] = re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(peak)


@pytest.mark.parametrize("kind", [fifo, sparse, zeros])
@pytest.mark.parametrize("suffix", ["json", "yaml"])
def test_an_index_that_never_ends_neither_hangs_nor_fills_memory(
    kind: Callable[[Path], None], suffix: str, folder: Path
) -> None:
    kind(next((folder / "cachebuilder" / "artifacts").glob(f"*.{suffix}")))
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten: proc(5)
    before = peak_kib()
    with pytest.raises(ArtifactError, match=r"found|wanted"):
        open_folder(folder)
    assert peak_kib() < before + (100 << 10)


@pytest.mark.parametrize("kind", [fifo, sparse, zeros])
def test_a_diff_of_a_folder_with_a_file_that_never_ends_neither_hangs_nor_fills_memory(
    kind: Callable[[Path], None], folder: Path
) -> None:
    kind(entry(folder) / "kernel.cubin")
    with pytest.raises(ArtifactError, match=r"kernel\.cubin: cannot be read: wanted"):
        diff.read(folder)


@pytest.mark.parametrize("kind", [fifo, sparse, zeros])
def test_a_record_or_a_report_beside_an_artifact_that_never_ends_counts_as_none(
    kind: Callable[[Path], None], tmp_path: Path
) -> None:
    artifact = tmp_path / "a.tar.zst"
    for path in (build_record.path_for(artifact), report.path_for(artifact)):
        path.touch()
        kind(path)
    assert build_record.read(artifact, "0" * 64) is None
    assert report.read(report.path_for(artifact), "0" * 64) is None
