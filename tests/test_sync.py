"""A folder kept at what a source stands for: never half, never worse than before, whoever else is at it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from cachebuilder.errors import RestoreError, TransferError
from cachebuilder.restoring.entries import restore
from cachebuilder.restoring.folder import open_folder
from cachebuilder.ship import fetch
from cachebuilder.ship.fetch import Found, Wish
from cachebuilder.ship.retry import Retries
from cachebuilder.ship.sync import current, sync
from tests.archives import snapshot
from tests.conftest import Run
from tests.registries import Answer, Asked, Middleman, Registry, free_port
from tests.shipping import FEW, for_another, push_to
from tests.test_signature import keys, sign

__all__ = ["keys"]


#: One of the two: what travels is bytes, whichever DeepGEMM made them.
GENERATIONS = ("deepjit",)

pytestmark = pytest.mark.slow


@pytest.fixture
def versions(artifact: Path) -> list[Path]:
    """Four artifacts for the same machine."""
    return [artifact, *(for_another(artifact, f"v{number}", "H200") for number in (2, 3, 4))]


def put(artifact: Path, folder: Path) -> None:
    restore([artifact], folder, None, force=True)


def source(location: str, retries: Retries = FEW) -> Callable[[], Found]:
    return lambda: fetch.look_up(location, Wish(lambda index: []), retries)


def generations(to: Path) -> list[str]:
    return sorted(os.listdir(to / "generations"))


def name_in(folder: Path) -> str:
    [index] = open_folder(folder).indexes
    return index.name


def test_it_fetches_only_what_changed(there: Registry, versions: list[Path], tmp_path: Path) -> None:
    push_to(there.host, "fleet", versions[0])
    with Middleman(there.host) as between:
        look_up, to = source(f"oci://{between.host}/fleet:v1"), tmp_path / "dir"
        first = sync(look_up, to, put)
        assert first.changed and name_in(to / "current") == "small"
        assert sorted(os.listdir(to)) == ["current", "generations"]
        before = snapshot(to)
        between.asked.clear()
        again = sync(look_up, to, put)
        assert not again.changed and again.generation == first.generation
        assert not [asked for asked in between.asked if "/blobs/" in asked.path]
        assert snapshot(to) == before
        push_to(there.host, "fleet", versions[1])
        assert sync(look_up, to, put).changed and name_in(to / "current") == "v2"
        assert (to / "current").readlink() == Path("generations") / generations(to)[-1]


def test_the_last_n_generations_stay_and_going_back_takes_the_one_that_is_there(
    there: Registry, versions: list[Path], tmp_path: Path
) -> None:
    to, made = tmp_path / "dir", []

    def counted(artifact: Path, folder: Path) -> None:
        made.append(artifact)
        put(artifact, folder)

    for version in versions:
        push_to(there.host, "last", version)
        done = sync(source(f"oci://{there.host}/last:v1"), to, counted, keep=2)
    assert [name_in(to / "generations" / name) for name in generations(to)] == ["v3", "v4"]
    assert len(done.removed) == 1 and len(made) == 4
    push_to(there.host, "last", versions[2])
    sync(source(f"oci://{there.host}/last:v1"), to, counted, keep=2)
    assert name_in(to / "current") == "v3" and len(made) == 4
    push_to(there.host, "last", versions[0])
    sync(source(f"oci://{there.host}/last:v1"), to, counted, keep=1)
    assert [name_in(to / "generations" / name) for name in generations(to)] == ["small"] and len(made) == 5


@pytest.mark.parametrize("what", ["down", "broken-blob", "wrong-blob", "does-not-fit"])
def test_a_failed_sync_leaves_the_working_one(
    what: str, there: Registry, versions: list[Path], run: Run, tmp_path: Path
) -> None:
    push_to(there.host, f"fails-{what}", versions[0])
    to = tmp_path / "dir"
    with Middleman(there.host) as between:
        command = ("sync", f"oci://{between.host}/fails-{what}:v1", "--to", to)
        assert run(*command).returncode == 0
        before = snapshot(to)
        newer = for_another(versions[0], "newer", "H200", deep_gemm="9.9.9") if what == "does-not-fit" else versions[1]
        push_to(there.host, f"fails-{what}", newer)

        def change(asked: Asked, answer: Answer) -> Answer:
            if what == "down":
                return Answer(503, {"Retry-After": "0"}, b"")
            if "/blobs/" in asked.path and what == "broken-blob":
                return Answer(200, answer.headers, answer.body, cut=100)
            if "/blobs/" in asked.path and what == "wrong-blob":
                return Answer(200, {}, answer.body[::-1])
            return answer

        between.change = change
        done = run(*command, CACHEBUILDER_RETRIES="0")
        assert done.returncode == (9 if what == "does-not-fit" else 15), done.stderr
        after = {name: found for name, found in snapshot(to).items() if not name.startswith(".fetched")}
        assert after == before and name_in(to / "current") == "small"
        if what == "down":
            assert "kept      " in done.stderr
            done = run(*command, "--allow-stale", CACHEBUILDER_RETRIES="0")
            assert done.returncode == 0 and "stale     " in done.stderr, done.stderr
        between.change = lambda asked, answer: answer
        if what != "does-not-fit":
            assert run(*command).returncode == 0 and name_in(to / "current") == "v2"
            assert sorted(os.listdir(to)) == ["current", "generations"]


def test_allow_stale_is_no_excuse_where_nothing_is_there(run: Run, tmp_path: Path) -> None:
    location = f"oci://127.0.0.1:{free_port()}/a:b"
    done = run("sync", location, "--to", tmp_path / "dir", "--allow-stale", CACHEBUILDER_RETRIES="0")
    assert done.returncode == 15 and not (tmp_path / "dir" / "current").exists()


def test_a_damaged_current_generation_is_made_anew(there: Registry, artifact: Path, tmp_path: Path) -> None:
    push_to(there.host, "damaged", artifact)
    look_up, to = source(f"oci://{there.host}/damaged:v1"), tmp_path / "dir"
    first = sync(look_up, to, put).generation
    next(first.glob("cache/*/kernel.cubin")).write_bytes(b"")  # as a power cut leaves it
    assert current(to) is None
    done = sync(look_up, to, put)
    assert done.changed and done.generation != first and current(to) == done.generation


def test_what_is_in_the_way_is_left_alone(there: Registry, artifact: Path, tmp_path: Path) -> None:
    push_to(there.host, "way", artifact)
    (tmp_path / "dir" / "current").mkdir(parents=True)
    with pytest.raises(RestoreError, match="wanted a link of an earlier sync"):
        sync(source(f"oci://{there.host}/way:v1"), tmp_path / "dir", put)
    assert os.listdir(tmp_path / "dir") == ["current"]


def test_with_trust_a_generation_that_was_not_checked_does_not_count(
    there: Registry, artifact: Path, keys: Path, run: Run, tmp_path: Path
) -> None:
    push_to(there.host, "trust", artifact)
    command = ("sync", f"oci://{there.host}/trust:v1", "--to", tmp_path / "dir")
    assert run(*command).returncode == 0
    done = run(*command, "--trust", keys / "ours.pub")
    assert done.returncode == 14 and "not signed" in done.stderr, done.stderr
    sign(artifact, keys)
    push_to(there.host, "trust", artifact)
    done = run(*command, "--trust", keys / "ours.pub")
    assert done.returncode == 0 and "now       " in done.stdout, done.stderr
    done = run(*command, "--trust", keys / "ours.pub")
    assert done.returncode == 0 and "unchanged " in done.stdout, done.stderr
    assert run(*command, "--trust", keys / "other.pub").returncode == 14


# Several at once


def test_syncs_at_once_into_one_folder_all_end_well_and_no_reader_sees_half(
    there: Registry, versions: list[Path], tmp_path: Path
) -> None:
    push_to(there.host, "crowd", versions[0])
    to = tmp_path / "dir"
    sync(source(f"oci://{there.host}/crowd:v1"), to, put)
    failed: list[BaseException] = []
    over = threading.Event()

    def guarded(action: Callable[[], object]) -> threading.Thread:
        def body() -> None:
            try:
                action()
            except BaseException as error:
                failed.append(error)

        thread = threading.Thread(target=body)
        thread.start()
        return thread

    def read() -> None:
        while not over.is_set():
            folder = open_folder(Path(os.path.realpath(to / "current")))
            assert not folder.damage()

    reader = guarded(read)
    for version in versions[1:]:
        push_to(there.host, "crowd", version)
        syncs = [guarded(lambda: sync(source(f"oci://{there.host}/crowd:v1"), to, put, keep=4)) for _ in range(6)]
        for thread in syncs:
            thread.join()
    over.set()
    reader.join()
    assert not failed, failed
    assert name_in(to / "current") == "v4" and sorted(os.listdir(to)) == ["current", "generations"]
    assert sorted(name_in(to / "generations" / name) for name in generations(to)) == ["small", "v2", "v3", "v4"]


def test_the_slower_of_two_does_not_put_the_older_one_back(
    there: Registry, versions: list[Path], tmp_path: Path
) -> None:
    push_to(there.host, "slow", versions[0])
    location, to = f"oci://{there.host}/slow:v1", tmp_path / "dir"

    def slow(artifact: Path, folder: Path) -> None:
        put(artifact, folder)
        if name_in(folder) == "small":  # meanwhile the tag moves, and another sync overtakes
            push_to(there.host, "slow", versions[1])
            sync(source(location), to, put)
            assert name_in(to / "current") == "v2"

    sync(source(location), to, slow)
    assert name_in(to / "current") == "v2"


def test_one_that_was_killed_leaves_nothing_that_counts_and_its_rest_goes_after_a_day(
    there: Registry, artifact: Path, tmp_path: Path
) -> None:
    push_to(there.host, "killed", artifact)
    to, location = tmp_path / "dir", f"oci://{there.host}/killed:v1"
    code = (
        "import os, sys\nfrom pathlib import Path\n"
        "from tests.test_sync import put, source, sync\n"
        "def die(artifact, folder):\n    put(artifact, folder)\n    os._exit(9)\n"
        "sync(source(sys.argv[1]), Path(sys.argv[2]), die)"
    )
    done = subprocess.run([sys.executable, "-c", code, location, str(to)], cwd=Path(__file__).parents[1], check=False)
    assert done.returncode == 9 and not (to / "current").exists()
    [left] = generations(to)
    assert left.startswith(".aside-")
    assert sync(source(location), to, put).changed and left in generations(to)
    old = (to / "generations" / left).stat().st_mtime - 2 * 86400
    os.utime(to / "generations" / left, (old, old))
    sync(source(location), to, put)
    assert left not in generations(to)


def test_a_registry_that_goes_away_right_after_the_fetch_does_not_spoil_it(
    there: Registry, artifact: Path, tmp_path: Path
) -> None:
    push_to(there.host, "gone", artifact)
    asked: list[int] = []
    real = source(f"oci://{there.host}/gone:v1")

    def look_up() -> Found:
        asked.append(1)
        if len(asked) > 1:
            raise TransferError("gone")
        return real()

    assert sync(look_up, tmp_path / "dir", put).changed


def test_a_file_is_a_source_too(versions: list[Path], run: Run, tmp_path: Path) -> None:
    file, to = tmp_path / "published.tar.zst", tmp_path / "dir"
    for number, version in enumerate(versions[:2]):
        shutil.copy(version, tmp_path / "aside")
        os.replace(tmp_path / "aside", file)
        done = run("sync", file if number else f"file://{file}", "--to", to)
        assert done.returncode == 0 and "now       " in done.stdout, done.stderr
    assert name_in(to / "current") == "v2"
