"""A folder kept at what a source stands for: never half of it, never worse than before, whoever else writes it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from cachebuilder import building
from cachebuilder.artifact.trust import Trust
from cachebuilder.common.locks import lock
from cachebuilder.errors import RestoreError, TransferError
from cachebuilder.restoring.folder import open_folder
from cachebuilder.restoring.machine import Machine
from cachebuilder.ship import fetch
from cachebuilder.ship import generations as generations_module
from cachebuilder.ship.fetch import Located
from cachebuilder.ship.sync import SyncedFolder
from tests.archives import snapshot
from tests.conftest import Run
from tests.registries import Answer, Asked, Middleman, Registry, free_port
from tests.shipping import FEW, for_another, push_to, sync_file
from tests.test_signature import beside, keys, sign
from tests.users import STRANGER, as_user, ground, needs_root, owned

__all__ = ["ground", "keys"]


#: One of the two: what travels is bytes, whichever DeepGEMM made them.
GENERATIONS = ("deepjit",)

pytestmark = pytest.mark.slow


@pytest.fixture
def versions(artifact: Path) -> list[Path]:
    """Four artifacts for the same machine."""
    return [artifact, *(for_another(artifact, f"v{number}", "H200") for number in (2, 3, 4))]


@pytest.fixture
def folder(machine: Machine, tmp_path: Path) -> SyncedFolder:
    """DIR, which no sync has been in."""
    return SyncedFolder(tmp_path / "dir", machine)


def source(location: str) -> Callable[[], Located]:
    return lambda: fetch.look_up(location, Machine(None), FEW)


def after_fetch(look_up: Callable[[], Located], action: Callable[[], object]) -> Callable[[], Located]:
    """The same source; something happens each time that its artifact has been fetched."""

    def changed() -> Located:
        located = look_up()

        def get(to: Callable[[str], Path], trust: Trust | None) -> Path:
            path = located.get(to, trust)
            action()
            return path

        return replace(located, get=get)

    return changed


def generations(to: Path) -> list[str]:
    return sorted(os.listdir(to / "generations"))


def name_in(folder: Path) -> str:
    [index] = open_folder(folder).indexes
    return index.name


def test_it_fetches_only_what_changed(there: Registry, versions: list[Path], folder: SyncedFolder) -> None:
    push_to(there.host, "fleet", versions[0])
    with Middleman(there.host) as between:
        look_up, to = source(f"oci://{between.host}/fleet:v1"), folder.path
        first = folder.sync(look_up)
        assert first.changed and first.restored is not None and name_in(to / "current") == "small"
        assert sorted(os.listdir(to)) == ["current", "generations"]
        before = snapshot(to)
        between.asked.clear()
        again = folder.sync(look_up)
        assert not again.changed and again.restored is None and again.generation == first.generation
        assert not [asked for asked in between.asked if "/blobs/" in asked.path]
        assert snapshot(to) == before
        push_to(there.host, "fleet", versions[1])
        assert folder.sync(look_up).changed and name_in(to / "current") == "v2"
        assert (to / "current").readlink() == Path("generations") / generations(to)[-1]


def test_the_last_n_generations_stay_and_going_back_takes_the_one_that_is_there(
    there: Registry, versions: list[Path], folder: SyncedFolder
) -> None:
    to, look_up = folder.path, source(f"oci://{there.host}/last:v1")
    for version in versions:
        push_to(there.host, "last", version)
        done = folder.sync(look_up, keep=2)
        assert done.restored is not None
    assert [name_in(to / "generations" / name) for name in generations(to)] == ["v3", "v4"]
    assert len(done.removed) == 1
    push_to(there.host, "last", versions[2])
    assert folder.sync(look_up, keep=2).restored is None
    assert name_in(to / "current") == "v3"
    push_to(there.host, "last", versions[0])
    assert folder.sync(look_up, keep=1).restored is not None
    assert [name_in(to / "generations" / name) for name in generations(to)] == ["small"]


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


def test_a_damaged_current_generation_is_made_anew(there: Registry, artifact: Path, folder: SyncedFolder) -> None:
    push_to(there.host, "damaged", artifact)
    look_up = source(f"oci://{there.host}/damaged:v1")
    first = folder.sync(look_up).generation
    next(first.glob("cache/*/kernel.cubin")).write_bytes(b"")  # as a power cut leaves it
    assert folder.current() is None
    done = folder.sync(look_up)
    assert done.changed and done.generation != first and folder.current() == done.generation


def test_a_generation_that_does_not_fit_the_deepgemm_of_now_is_not_current(
    there: Registry, artifact: Path, folder: SyncedFolder
) -> None:
    push_to(there.host, "upgraded", artifact)
    assert folder.sync(source(f"oci://{there.host}/upgraded:v1")).changed
    assert folder.current() is not None
    assert SyncedFolder(folder.path, Machine(None)).current() is None


def test_what_is_in_the_way_is_left_alone(there: Registry, artifact: Path, folder: SyncedFolder) -> None:
    push_to(there.host, "way", artifact)
    (folder.path / "current").mkdir(parents=True)
    with pytest.raises(RestoreError, match="wanted a link of an earlier sync"):
        folder.sync(source(f"oci://{there.host}/way:v1"))
    assert os.listdir(folder.path) == ["current"]


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
    there: Registry, versions: list[Path], folder: SyncedFolder
) -> None:
    push_to(there.host, "crowd", versions[0])
    to, look_up = folder.path, source(f"oci://{there.host}/crowd:v1")
    folder.sync(look_up)
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
            assert not open_folder(Path(os.path.realpath(to / "current"))).damage()

    reader = guarded(read)
    for version in versions[1:]:
        push_to(there.host, "crowd", version)
        syncs = [guarded(lambda: folder.sync(look_up, keep=4)) for _ in range(6)]
        for thread in syncs:
            thread.join()
    over.set()
    reader.join()
    assert not failed, failed
    assert name_in(to / "current") == "v4" and sorted(os.listdir(to)) == ["current", "generations"]
    assert sorted(name_in(to / "generations" / name) for name in generations(to)) == ["small", "v2", "v3", "v4"]


def test_the_slower_of_two_does_not_put_the_older_one_back(
    there: Registry, versions: list[Path], folder: SyncedFolder
) -> None:
    push_to(there.host, "slow", versions[0])
    look_up = source(f"oci://{there.host}/slow:v1")
    overtaken: list[str] = []

    def overtake() -> None:
        """Once: the tag moves, and another sync is faster."""
        if not overtaken:
            push_to(there.host, "slow", versions[1])
            folder.sync(look_up)
            overtaken.append(name_in(folder.path / "current"))

    folder.sync(after_fetch(look_up, overtake))
    assert overtaken == ["v2"] and name_in(folder.path / "current") == "v2"


#: A sync that is killed when it has made a generation, right before the rename that puts it in place.
KILLED_BEFORE_THE_RENAME = """
import os, signal, sys
def kill(event, arguments):
    if event == "os.rename" and str(arguments[1]).startswith("000001-"):
        os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(kill)
from cachebuilder.cli.main import main
main()
"""


def test_one_that_was_killed_leaves_nothing_that_counts_and_the_next_one_removes_it(
    there: Registry, built: building.Built, artifact: Path, folder: SyncedFolder
) -> None:
    push_to(there.host, "killed", artifact)
    to, location = folder.path, f"oci://{there.host}/killed:v1"
    command = ["sync", location, "--to", to, "--deep-gemm", built.inputs.installation.imported_as]
    code = [sys.executable, "-c", KILLED_BEFORE_THE_RENAME]
    done = subprocess.run([*code, *map(str, command)], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL and not (to / "current").exists(), done.stderr
    [left] = generations(to)
    assert left.startswith(".aside-")
    assert folder.sync(source(location)).changed and left not in generations(to)


def test_what_a_sync_works_on_is_not_removed_and_what_another_machine_left_goes_after_a_day(
    artifact: Path, folder: SyncedFolder
) -> None:
    sync = lambda: folder.sync(lambda: fetch.look_up(str(artifact), Machine(None), FEW))  # noqa: E731
    sync()
    aside = folder.path / "generations"
    of_this, of_another = aside / generations_module.aside_name(), aside / ".aside-00000000-0123456789abcdef"
    for path in (of_this, of_another):
        (path / "cache").mkdir(parents=True)
    handle = os.open(of_this, os.O_RDONLY)
    assert lock(handle)
    sync()
    assert of_this.exists() and of_another.exists()
    os.close(handle)
    day_old = of_another.stat().st_mtime - 2 * 86400
    os.utime(of_another, (day_old, day_old))
    sync()
    assert not of_this.exists() and not of_another.exists()


# Strangers


@needs_root
@pytest.mark.parametrize("whose", ["root", "generations", ".fetched"])
def test_a_folder_that_another_user_owns_is_refused_unless_forced(
    whose: str, there: Registry, artifact: Path, machine: Machine, ground: Path
) -> None:
    push_to(there.host, "owned", artifact)
    to = ground / "dir"
    to.mkdir(mode=0o755)
    owned(to if whose == "root" else to / whose, mode=0o755)
    look_up = source(f"oci://{there.host}/owned:v1")
    with pytest.raises(RestoreError, match=f"wanted a folder of this user or root, found one of user {STRANGER}"):
        SyncedFolder(to, machine).sync(look_up)
    assert not (to / "current").exists() and not any(path.is_file() for path in to.rglob("*"))
    assert SyncedFolder(to, machine, force=True).sync(look_up).changed


@needs_root
@pytest.mark.parametrize("name", ["generations", ".fetched"])
def test_a_link_in_dir_leads_a_sync_of_root_nowhere(
    name: str, there: Registry, artifact: Path, machine: Machine, ground: Path
) -> None:
    push_to(there.host, "linked", artifact)
    elsewhere, to = ground / "elsewhere", ground / "dir"
    (elsewhere / "old").mkdir(parents=True)
    (elsewhere / "old" / "file").write_text("root's")
    (elsewhere / ".aside-00000000-0123456789abcdef").mkdir()
    for path in (elsewhere / "old", *elsewhere.iterdir()):
        os.utime(path, (0, 0))
    to.mkdir()
    to.chmod(0o777)
    as_user(STRANGER, lambda: (to / name).symlink_to(elsewhere))
    before = snapshot(elsewhere)
    with pytest.raises(RestoreError, match="found a link"):
        SyncedFolder(to, machine).sync(source(f"oci://{there.host}/linked:v1"))
    assert snapshot(elsewhere) == before


@needs_root
def test_a_generation_that_another_user_put_there_does_not_become_current(
    artifact: Path, machine: Machine, ground: Path
) -> None:
    """Whole and fitting, with the right record, in folders of ours that all may write in."""
    folder = SyncedFolder(ground / "dir", machine)
    planted = sync_file(folder, artifact).generation
    for path in (folder.path, planted.parent):
        path.chmod(0o777)
    for path in (planted, *planted.rglob("*")):
        os.chown(path, STRANGER, STRANGER, follow_symlinks=False)
    assert folder.current() is None
    done = sync_file(folder, artifact)
    assert done.changed and done.generation != planted and done.generation.stat().st_uid == 0


@needs_root
def test_what_is_not_ours_by_name_and_owner_is_not_removed(artifact: Path, machine: Machine, ground: Path) -> None:
    folder = SyncedFolder(ground / "dir", machine)
    sync_file(folder, artifact)
    kept = [".aside-mine", "000000-notes", ".aside-00000000-0123456789abcdef"]
    for name in kept:
        (folder.path / "generations" / name).mkdir()
        os.utime(folder.path / "generations" / name, (0, 0))
    os.chown(folder.path / "generations" / kept[2], STRANGER, STRANGER)
    sync_file(folder, artifact)
    assert set(kept) <= set(generations(folder.path))


def forge(generation: Path, **record: str | None) -> None:
    """Write a record as a trusted sync would have."""
    file = generation / "synced.json"
    file.write_text(json.dumps(json.loads(file.read_bytes()) | record))


@pytest.mark.parametrize("kept", ["no-artifact", "a-signed-artifact-of-another", "a-broken-signature", "a-link"])
def test_a_planted_generation_that_says_who_signed_it_does_not_become_current(
    kept: str, versions: list[Path], keys: Path, machine: Machine, tmp_path: Path
) -> None:
    """Its bytes are those of an unsigned artifact; its record is that of the signed one, which the source names."""
    signed, evil = versions[:2]
    to, trust = tmp_path / "dir", Trust.load([keys / "ours.pub"])
    sign(signed, keys)
    sync_file(SyncedFolder(to, machine), evil)
    planted = to / "generations" / generations(to)[0]
    located = fetch.look_up(str(signed), Machine(None), FEW)
    forge(planted, version=located.version, source=located.name, signed_by=trust.keys[0].fingerprint)
    name = f"000001-{generations_module.key_of(located.version)}"
    planted = planted.rename(planted.with_name(name))
    (to / "current").unlink()
    (to / "current").symlink_to(f"generations/{name}")
    kept_file = planted / "signed.tar.zst"
    if kept == "a-link":
        kept_file.symlink_to(signed)
    elif kept != "no-artifact":
        shutil.copy(signed, kept_file)
    if kept != "no-artifact":
        for suffix in (".sig", ".intoto.json"):
            shutil.copy(beside(signed, suffix), beside(kept_file, suffix))
    if kept == "a-broken-signature":
        shutil.copy(evil, kept_file)
    folder = SyncedFolder(to, machine, trust)
    assert folder.current() is None
    done = sync_file(folder, signed)
    assert done.changed and done.restored is not None and name_in(to / "current") == "small"
    assert folder.current() == done.generation != planted


def evil_nvcc(generation: Path) -> None:
    (generation / "cachebuilder" / "bin" / "nvcc").write_text("#!/bin/sh\necho evil\n")


def another_entry(generation: Path) -> None:
    entry = next((generation / "cache").iterdir())
    shutil.copytree(entry, entry.with_name("kernel.evil." + "0" * 32))


def another_file(generation: Path) -> None:
    (next((generation / "cache").iterdir()) / "evil.cubin").write_bytes(b"evil")


def another_index(generation: Path) -> None:
    for file in (generation / "cachebuilder" / "artifacts").iterdir():
        shutil.copy(file, file.with_name("0" * 64 + "." + "0" * 16 + file.suffix))


def a_link_for_an_entry(generation: Path) -> None:
    entry = next((generation / "cache").iterdir())
    entry.rename(generation.parent.parent / "moved")
    entry.symlink_to(generation.parent.parent / "moved")


@pytest.mark.parametrize("change", [evil_nvcc, another_entry, another_file, another_index, a_link_for_an_entry])
def test_with_trust_a_generation_with_a_change_is_made_anew(
    change: Callable[[Path], None], artifact: Path, keys: Path, machine: Machine, tmp_path: Path
) -> None:
    sign(artifact, keys)
    folder = SyncedFolder(tmp_path / "dir", machine, Trust.load([keys / "ours.pub"]))
    first = sync_file(folder, artifact)
    assert not sync_file(folder, artifact).changed and folder.current() == first.generation
    change(first.generation)
    assert folder.current() is None
    again = sync_file(folder, artifact)
    assert again.restored is not None and again.generation != first.generation


def test_current_is_compared_whole_and_not_by_its_last_name(artifact: Path, machine: Machine, tmp_path: Path) -> None:
    folder = SyncedFolder(tmp_path / "dir", machine)
    first = sync_file(folder, artifact)
    evil = tmp_path / "evil" / "generations" / first.generation.name
    shutil.copytree(first.generation, evil)
    for target in (evil, Path("../evil/generations") / evil.name):
        (folder.path / "current").unlink()
        (folder.path / "current").symlink_to(target)
        assert folder.current() is None
        assert sync_file(folder, artifact).changed
        assert (folder.path / "current").readlink() == Path("generations") / first.generation.name


def test_a_registry_that_goes_away_right_after_the_fetch_does_not_spoil_it(
    there: Registry, artifact: Path, folder: SyncedFolder
) -> None:
    push_to(there.host, "gone", artifact)
    asked: list[int] = []
    real = source(f"oci://{there.host}/gone:v1")

    def look_up() -> Located:
        asked.append(1)
        if len(asked) > 1:
            raise TransferError("gone")
        return real()

    assert folder.sync(look_up).changed


def test_a_file_is_a_source_too(versions: list[Path], run: Run, tmp_path: Path) -> None:
    file, to = tmp_path / "published.tar.zst", tmp_path / "dir"
    for number, version in enumerate(versions[:2]):
        shutil.copy(version, tmp_path / "aside")
        os.replace(tmp_path / "aside", file)
        done = run("sync", file if number else f"file://{file}", "--to", to)
        assert done.returncode == 0 and "now       " in done.stdout, done.stderr
    assert name_in(to / "current") == "v2"
