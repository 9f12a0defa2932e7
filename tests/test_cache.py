"""The user's cache folder: what is in it, and what `cache prune` and `cache clean` remove."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cachebuilder.building import Built
from cachebuilder.common import kept
from cachebuilder.common.cache import scratch_folder
from cachebuilder.compiling.store import CubinStore
from tests.conftest import Run

DAY = 86400


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder with an old and a new item of four kinds; each holds 1,000 bytes."""
    monkeypatch.setenv("CACHEBUILDER_CACHE_DIR", str(tmp_path))
    for name, days in (("old", 40), ("new", 1)):
        file_of = {
            f"plans/{name}.json": f"plans/{name}.json",
            f"cubins/ab/{name}": f"cubins/ab/{name}",
            f"restored/{name}": f"restored/{name}/cache/x",
            f"recordings/{name}": f"recordings/{name}/asked",
        }
        for item, file in file_of.items():
            (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / file).write_bytes(b"x" * 1000)
            last_used = time.time() - days * DAY
            os.utime(tmp_path / item, (last_used, last_used))
    return tmp_path


def items(folder: Path) -> set[str]:
    patterns = ("plans/*", "cubins/*/*", "restored/*", "recordings/*")
    return {str(path.relative_to(folder)) for pattern in patterns for path in folder.glob(pattern)}


def test_prune_removes_items_that_were_unused_for_long_and_nothing_else(folder: Path) -> None:
    removed = kept.prune(unused_seconds=30 * DAY)
    assert (removed.items, removed.bytes, removed.in_use) == (4, 4000, 0)
    assert items(folder) == {"plans/new.json", "cubins/ab/new", "restored/new", "recordings/new"}


def test_prune_removes_the_least_recently_used_items_until_the_rest_is_small_enough(folder: Path) -> None:
    os.utime(folder / "plans" / "new.json")
    kept.prune(max_bytes=1000)
    assert items(folder) == {"plans/new.json"}


def test_using_a_cubin_keeps_it_from_being_pruned(folder: Path) -> None:
    store = CubinStore()
    store.put("abcd", b"cubin")
    path = folder / "cubins" / "ab" / "abcd"
    os.utime(path, (0, 0))
    assert store.get("abcd") == b"cubin"
    kept.prune(unused_seconds=30 * DAY)
    assert path.exists()


def test_clean_leaves_the_folders_and_libraries_of_a_running_build(folder: Path, run: Run) -> None:
    library = folder / "virtual-gpu" / "0123" / "libcuda.so.1"
    library.parent.mkdir(parents=True)
    library.touch()
    with scratch_folder() as scratch:
        (scratch / "kernel.cu").touch()
        process = run("cache", "clean", CACHEBUILDER_CACHE_DIR=str(folder))
        assert process.returncode == 0 and "in use left alone" in process.stdout, process.stderr
        assert (scratch / "kernel.cu").exists() and library.exists()
        assert items(folder) == set()
    assert run("cache", "clean", CACHEBUILDER_CACHE_DIR=str(folder)).returncode == 0
    assert not library.exists()


def test_a_dry_run_removes_nothing(folder: Path, run: Run) -> None:
    before = items(folder)
    process = run("cache", "prune", "--older-than", "30d", "--dry-run", CACHEBUILDER_CACHE_DIR=str(folder))
    assert "would remove 4 items, 4.0 kB" in process.stdout and items(folder) == before


def test_dir_prints_the_folder_and_every_part_of_it(folder: Path, run: Run) -> None:
    printed = run("cache", "dir", CACHEBUILDER_CACHE_DIR=str(folder)).stdout
    usage = json.loads(run("cache", "dir", "--json", CACHEBUILDER_CACHE_DIR=str(folder)).stdout)
    assert printed.splitlines()[0] == usage["folder"] == str(folder)
    assert [line.split()[0] for line in printed.splitlines()[1:]] == [part["name"] for part in usage["parts"]]
    assert {part["name"]: (part["items"], part["bytes"]) for part in usage["parts"]}["cubins"] == (2, 2000)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        pytest.param((), "wanted --older-than AGE, --max-size SIZE, or both", id="nothing"),
        pytest.param(("--older-than", "soon"), "wanted a number and s, m, h, d or w", id="age"),
        pytest.param(("--max-size", "big"), "wanted a number and kB, MB, GB or TB", id="size"),
    ],
)
def test_a_wrong_prune_says_what_was_wanted(arguments: tuple[str, ...], words: str, folder: Path, run: Run) -> None:
    before = items(folder)
    process = run("cache", "prune", *arguments, CACHEBUILDER_CACHE_DIR=str(folder))
    assert process.returncode == 2 and words in process.stderr and items(folder) == before


@pytest.mark.parametrize("deep_gemm", ["deepjit"], indirect=True, scope="session")
def test_a_folder_that_a_program_serves_from_is_left_alone(built: Built, folder: Path) -> None:
    program = "import sys; print('serving', flush=True); sys.stdin.read()"
    command = [sys.executable, "-m", "cachebuilder", "run", built.packed.path, "--", sys.executable, "-c", program]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as serving:
        assert serving.stdout is not None and serving.stdout.readline() == b"serving\n"
        [served] = [path.parent for path in folder.glob("restored/*/cachebuilder")]
        assert kept.prune(unused_seconds=0).in_use == 1 and (served / "cache").is_dir()
        serving.communicate()
    kept.prune(unused_seconds=0)
    assert not served.exists()
