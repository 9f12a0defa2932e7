"""What another user can do who may write into DIR, into a shared temporary folder, or into the cache folder: nothing."""

from __future__ import annotations

import contextlib
import json
import os
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cachebuilder import building
from cachebuilder.common import kept, native
from cachebuilder.common.cache import own_folder, scratch_folder
from cachebuilder.compiling.store import CubinStore
from cachebuilder.errors import ArtifactError, InstallationError, RestoreError
from cachebuilder.planning.kept import KeptPlans, plan_key
from cachebuilder.restoring import misses, place
from cachebuilder.restoring.frozen import frozen_nvcc
from cachebuilder.restoring.machine import Machine
from cachebuilder.restoring.restore import Restored, restore
from tests.archives import snapshot
from tests.conftest import ROOT, SMALL, Run, own_cache
from tests.registries import program
from tests.users import STRANGER, VICTIM, as_user, ground, meanwhile_as, needs_root, owned

__all__ = ["ground"]

ARTIFACT = ROOT / "tests" / "data" / "v1-deepjit.tar.zst"


def forced(to: Path) -> Restored:
    return restore([ARTIFACT], to, machine=Machine(None), force=True)


@pytest.fixture
def elsewhere(ground: Path) -> Path:
    """A folder of root's that no restore may change: a file, and a folder that looks like a killed restore's."""
    (ground / "elsewhere" / "1-0123456789abcdef").mkdir(parents=True)
    (ground / "elsewhere" / "1-0123456789abcdef" / "file").write_text("x")
    (ground / "elsewhere" / "file").write_text("private")
    (ground / "elsewhere" / "file").chmod(0o600)
    return ground / "elsewhere"


def link(path: Path, to: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(to)


# DIR


@needs_root
@pytest.mark.parametrize("name", ["cache", "cachebuilder", "cachebuilder/bin", "cachebuilder/artifacts"])
def test_a_link_in_place_of_a_folder_does_not_make_root_write_elsewhere(
    name: str, ground: Path, elsewhere: Path
) -> None:
    dir = owned(ground / "dir")
    as_user(STRANGER, lambda: link(dir / name, elsewhere))
    before = snapshot(elsewhere)
    with pytest.raises(RestoreError, match=f"{name}: wanted a folder, found a link"):
        forced(dir)
    assert snapshot(elsewhere) == before


@needs_root
@pytest.mark.parametrize("behind", ["tmp", "tmp/1-0123456789abcdef"])
def test_the_sweep_of_dead_working_folders_deletes_nothing_behind_a_link(
    behind: str, ground: Path, elsewhere: Path
) -> None:
    dir = owned(ground / "dir")
    as_user(STRANGER, lambda: link(dir / "cachebuilder" / behind, elsewhere))
    before = snapshot(elsewhere)
    if behind == "tmp":
        with pytest.raises(RestoreError, match="tmp: wanted a folder, found a link"):
            forced(dir)
    else:
        forced(dir)
    assert snapshot(elsewhere) == before


@needs_root
def test_the_sweep_removes_only_what_is_ours_by_name_and_by_owner(ground: Path) -> None:
    tmp = ground / "dir" / "cachebuilder" / "tmp"
    for name in ("1-0123456789abcdef", "2-0123456789abcdef", "notes"):
        (tmp / name / "inner").mkdir(parents=True)
    os.chown(tmp / "2-0123456789abcdef", STRANGER, STRANGER)
    forced(ground / "dir")
    assert sorted(os.listdir(tmp)) == ["2-0123456789abcdef", "notes"]


@needs_root
def test_a_user_who_exchanges_folders_meanwhile_does_not_have_roots_file_opened_to_all(
    ground: Path, elsewhere: Path
) -> None:
    dir, private = owned(ground / "dir"), elsewhere / "file"

    def exchange() -> None:
        """Move each folder that root makes away, and put a link to root's private file there."""
        for name in ("cache", "cachebuilder", "cachebuilder/tmp", "cachebuilder/bin", "cachebuilder/artifacts"):
            with contextlib.suppress(OSError):
                if not (dir / name).is_symlink():
                    (dir / name).rename(dir / f"gone-{time.monotonic_ns()}")
                    (dir / name).symlink_to(private)
                (dir / name).unlink()

    with meanwhile_as(STRANGER, exchange):
        for _ in range(25):
            with contextlib.suppress(RestoreError):
                forced(dir)
            assert stat.S_IMODE(private.stat().st_mode) == 0o600 and private.read_text() == "private"


@needs_root
@pytest.mark.parametrize("name", ["", "cache", "cachebuilder", "cachebuilder/bin", "cachebuilder/tmp"])
def test_a_folder_of_another_user_is_refused_unless_forced(
    name: str, built: building.Built, machine: Machine, ground: Path
) -> None:
    dir = ground / "dir"
    (dir / name).mkdir(parents=True)
    owned(dir / name)
    before = snapshot(dir)
    with pytest.raises(RestoreError, match=f"wanted a folder of this user or root, found one of user {STRANGER}") as e:
        restore([built.packed.path], dir, machine=machine)
    assert "--force" in str(e.value.hint) and snapshot(dir) == before
    assert restore([built.packed.path], dir, machine=machine, force=True).written == len(built.plan.kernels)


@needs_root
def test_an_equal_entry_of_another_user_is_a_different_one(
    built: building.Built, machine: Machine, ground: Path
) -> None:
    restore([built.packed.path], ground / "dir", machine=machine)
    entry = next((ground / "dir" / "cache").iterdir())
    os.chown(entry, STRANGER, STRANGER)
    with pytest.raises(RestoreError, match=f"found a different {entry.name}"):
        restore([built.packed.path], ground / "dir", machine=machine)


@needs_root
def test_a_user_restores_into_a_folder_of_roots_that_all_may_write(ground: Path) -> None:
    """Such is an emptyDir of Kubernetes."""
    dir = ground / "dir"
    dir.mkdir()
    dir.chmod(0o777)
    as_user(STRANGER, lambda: forced(dir))
    assert len(os.listdir(dir / "cache")) == 2


def test_whatever_the_umask_no_other_user_can_write_into_what_a_restore_made(ground: Path) -> None:
    before = os.umask(0)
    try:
        forced(ground / "dir")
    finally:
        os.umask(before)
    modes = {stat.S_IMODE(path.lstat().st_mode) for path in [ground / "dir", *(ground / "dir").rglob("*")]}
    assert modes == {0o755, 0o644}


# The frozen nvcc's log of misses


@pytest.fixture
def temporary(ground: Path) -> Path:
    """A temporary folder that all users share."""
    path = ground / "tmp"
    path.mkdir()
    path.chmod(0o1777)
    return path


@pytest.fixture
def kernel(ground: Path) -> Path:
    (ground / "kernel.cu").write_text("auto ptr = (&missed_impl<1>);\n")
    return ground / "kernel.cu"


def miss(ground: Path, kernel: Path, temporary: Path, shell: str = "sh", log: str = "") -> str:
    """Ask a frozen nvcc, as the victim, for a kernel; returns what it said."""
    name, *arguments = shell.split()
    shell_command = [program(name), *arguments]
    if not (ground / "dir").exists():
        forced(ground / "dir")
    said = temporary.parent / "said"
    said.touch()
    said.chmod(0o666)

    def ask() -> None:
        clean = {"PATH": os.defpath, "TMPDIR": str(temporary), "CACHEBUILDER_MISS_LOG": log}
        with said.open("w") as file:
            command = [*shell_command, str(frozen_nvcc(ground / "dir")), str(kernel)]
            done = subprocess.run(command, env=clean, stderr=file, timeout=20, check=False)
        assert done.returncode == 1

    as_user(VICTIM, ask)
    text = said.read_text()
    assert "missed is not in the restored cache" in text
    return text


IN_NO_LOG = "frozen nvcc: the miss is in no log"


def plant_fifo(folder: Path, outside: Path) -> None:
    folder.mkdir(mode=0o777)
    os.mkfifo(folder / "misses.jsonl")


def plant_fifo_for_the_folder(folder: Path, outside: Path) -> None:
    os.mkfifo(folder)


def plant_link(folder: Path, outside: Path) -> None:
    folder.mkdir()
    folder.chmod(0o777)
    (folder / "misses.jsonl").symlink_to(outside / "file")


def plant_link_for_the_folder(folder: Path, outside: Path) -> None:
    folder.symlink_to(outside)


def plant_source(folder: Path, outside: Path) -> None:
    (folder / "misses.jsonl.d").mkdir(parents=True)
    (folder / "misses.jsonl.d" / "missed-1.cu").write_text("planted")
    for path in (folder, folder / "misses.jsonl.d"):
        path.chmod(0o777)


@needs_root
@pytest.mark.parametrize("shell", ["dash", "bash", "busybox sh", "mksh", "zsh --emulate sh"])
@pytest.mark.parametrize(
    "plant", [plant_fifo, plant_fifo_for_the_folder, plant_link, plant_link_for_the_folder, plant_source]
)
def test_what_another_user_plants_in_the_temporary_folder_gets_no_line_and_hangs_no_miss(
    plant: Callable[[Path, Path], None], shell: str, ground: Path, kernel: Path, temporary: Path
) -> None:
    outside = owned(ground / "outside", VICTIM, 0o700)  # private, as the log's folder should be
    (outside / "file").write_text("the victim's")
    as_user(STRANGER, lambda: plant(temporary / f"cachebuilder-misses-{VICTIM}", outside))
    before = snapshot(outside)
    assert IN_NO_LOG in miss(ground, kernel, temporary, shell)
    assert snapshot(outside) == before


@needs_root
@pytest.mark.parametrize("shell", ["dash", "bash", "busybox sh"])
def test_a_miss_is_logged_in_a_private_folder_whatever_the_umask(
    shell: str, ground: Path, kernel: Path, temporary: Path
) -> None:
    before = os.umask(0)
    try:
        for _ in range(2):
            assert IN_NO_LOG not in miss(ground, kernel, temporary, shell)
    finally:
        os.umask(before)
    folder = temporary / f"cachebuilder-misses-{VICTIM}"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert not any(path.stat().st_mode & 0o022 for path in folder.rglob("*"))
    [read] = misses.read(folder / "misses.jsonl").misses
    assert (read.count, read.source) == (2, kernel.read_text())


@needs_root
@pytest.mark.parametrize("kind", ["fifo", "link"])
def test_a_fifo_or_a_link_in_place_of_dirs_own_log_hangs_no_miss_and_gets_no_line(
    kind: str, ground: Path, kernel: Path, temporary: Path
) -> None:
    forced(ground / "dir")
    own = owned(ground / "dir" / "cachebuilder", mode=0o777)
    victims = owned(ground / "victims", VICTIM)
    (victims / "file").write_text("the victim's")
    os.chown(victims / "file", VICTIM, VICTIM)
    if kind == "fifo":
        as_user(STRANGER, lambda: os.mkfifo(own / "misses.jsonl"))
    else:
        as_user(STRANGER, lambda: (own / "misses.jsonl").symlink_to(victims / "file"))
    assert IN_NO_LOG not in miss(ground, kernel, temporary)
    assert (temporary / f"cachebuilder-misses-{VICTIM}" / "misses.jsonl").exists()
    assert (victims / "file").read_text() == "the victim's"


@needs_root
def test_a_source_that_another_user_planted_does_not_reach_a_manifest(ground: Path, temporary: Path, run: Run) -> None:
    """The victim's log is in a shared folder, and another user made the folder of sources beside it first."""
    log, planted = temporary / "own.jsonl", temporary / "own.jsonl.d" / "missed-1.cu"

    def plant() -> None:
        planted.parent.mkdir()
        planted.write_text("planted")

    as_user(STRANGER, plant)
    line = {"time": 1, "kernel": "missed", "policy": "refuse", "artifact": "small", "source": str(planted)}
    as_user(VICTIM, lambda: log.write_text(json.dumps(line)))
    [read] = misses.read(log).misses
    assert read.source is None
    (ground / "m.yaml").write_text(SMALL)
    done = run("misses", log, "--add-to", ground / "m.yaml")
    assert done.returncode == 0 and "0 sources added" in done.stderr, done.stderr
    assert (ground / "m.yaml").read_text() == SMALL
    os.chown(planted.parent, VICTIM, VICTIM)  # a folder of the victim's into which the other user put a link
    planted.unlink()
    planted.symlink_to(ground / "m.yaml")
    assert misses.read(log).misses[0].source is None


@pytest.mark.parametrize("kind", ["fifo", "zero", "folder"])
def test_a_log_that_is_no_regular_file_is_one_sentence(kind: str, tmp_path: Path, run: Run) -> None:
    log = tmp_path / "log"
    if kind == "fifo":
        os.mkfifo(log)
    else:
        log = Path("/dev/zero") if kind == "zero" else tmp_path
    with pytest.raises(ArtifactError, match="wanted a regular file, found"):
        misses.read(log)


# The writable root, which DeepGEMM reads first


@needs_root
@pytest.mark.parametrize("named", [True, False])
def test_run_refuses_a_writable_root_that_another_user_owns(named: bool, ground: Path, run: Run) -> None:
    forced(ground / "dir")
    scratch = owned(ground / "shared" if named else ground / "dir" / "scratch", mode=0o777)
    more = ["--scratch", scratch] if named else []
    done = run("run", ground / "dir", *more, "--", "echo", "started")
    assert (done.returncode, done.stdout) == (RestoreError.exit_code, ""), done.stderr
    assert f"with files of user {STRANGER}, which DeepGEMM would load first" in done.stderr
    assert "--scratch" in done.stderr


@needs_root
def test_run_refuses_a_writable_root_with_kernels_of_another_user(ground: Path) -> None:
    planted = ground / "scratch" / "cache" / "planted"
    planted.mkdir(parents=True)
    os.chown(planted, STRANGER, STRANGER)
    with pytest.raises(RestoreError, match=f"files of user {STRANGER}"):
        place.private_root(ground / "scratch")


@needs_root
def test_in_a_folder_that_all_may_write_the_writable_root_is_a_private_one(temporary: Path) -> None:
    root = place.private_root(temporary)
    assert root == temporary / "private-0" and stat.S_IMODE(root.stat().st_mode) == 0o700
    os.chown(root, STRANGER, STRANGER)
    with pytest.raises(RestoreError, match=f"files of user {STRANGER}"):
        place.private_root(temporary)


def test_a_writable_root_that_is_missing_is_made_for_this_user_alone_to_write(tmp_path: Path) -> None:
    assert place.private_root(tmp_path / "scratch") == tmp_path / "scratch"
    assert stat.S_IMODE((tmp_path / "scratch").stat().st_mode) == 0o755


# The cache folder


@pytest.fixture
def cache(ground: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CACHEBUILDER_CACHE_DIR", str(ground / "user" / "cache"))
    return owned(ground / "user", mode=0o777) / "cache"


@needs_root
def test_under_any_umask_nobody_else_can_write_to_the_cache_folder_or_the_libraries(cache: Path) -> None:
    before = os.umask(0)
    try:
        library = native.shared_library("x.so", "virtual GPU", ["int x;"])
        CubinStore().put("abcd", b"cubin")
        with scratch_folder():
            pass
        own_folder("plans")
    finally:
        os.umask(before)
    assert library.is_file()
    assert not [path for path in (cache, *cache.rglob("*")) if path.stat().st_mode & 0o022]


@needs_root
@pytest.mark.parametrize("names", [(), ("virtual-gpu",), ("virtual-gpu", "digest")])
def test_a_cache_folder_of_another_user_is_refused(names: tuple[str, ...], cache: Path) -> None:
    library = native.shared_library("x.so", "virtual GPU", ["int x;"])
    names = tuple(library.parent.name if name == "digest" else name for name in names)
    os.chown(cache.joinpath(*names), STRANGER, STRANGER)
    with pytest.raises(InstallationError, match=f"wanted a cache folder of this user, found one of user {STRANGER}"):
        native.shared_library("x.so", "virtual GPU", ["int x;"])


@needs_root
@pytest.mark.parametrize("how", ["owner", "mode", "link"])
def test_a_library_that_another_user_could_have_changed_is_built_anew(how: str, cache: Path) -> None:
    library = native.shared_library("x.so", "virtual GPU", ["int x;"])
    library.unlink() if how == "link" else library.write_text("planted")
    if how == "owner":
        os.chown(library, STRANGER, STRANGER)
    elif how == "mode":
        library.chmod(0o777)
    else:
        (cache.parent / "planted").write_text("planted")
        library.symlink_to(cache.parent / "planted")
    again = native.shared_library("x.so", "virtual GPU", ["int x;"])
    assert again == library and library.read_bytes()[:4] == b"\x7fELF"
    assert library.stat().st_uid == 0 and not library.is_symlink()


@needs_root
def test_a_cubin_that_another_user_could_have_changed_is_not_taken(cache: Path) -> None:
    store = CubinStore()
    for change in (lambda path: os.chown(path, STRANGER, STRANGER), lambda path: path.chmod(0o666)):
        store.put("abcd", b"cubin")
        assert store.get("abcd") == b"cubin"
        change(cache / "cubins" / "ab" / "abcd")
        assert store.get("abcd") is None


@needs_root
def test_a_plan_that_another_user_could_have_changed_is_not_taken(
    built: building.Built, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = plan_key(built.inputs)
    KeptPlans().put(key, built.plan)
    assert KeptPlans().get(key) == built.plan
    (cache / "plans" / f"{key}.json").chmod(0o666)
    assert KeptPlans().get(key) is None


@needs_root
def test_a_cache_folder_that_all_may_write_is_refused_but_one_like_tmp_is_not(cache: Path) -> None:
    cache.mkdir()
    for mode, fits in ((0o1777, True), (0o777, False)):
        cache.chmod(mode)
        if fits:
            CubinStore().put("abcd", b"cubin")
        else:
            with pytest.raises(InstallationError, match="found mode 0777") as caught:
                CubinStore().put("abcd", b"cubin")
            assert f"chmod go-w {cache}" in str(caught.value.hint)


@needs_root
def test_a_folder_that_an_earlier_version_left_open_to_all_is_closed(cache: Path) -> None:
    CubinStore().put("abcd", b"cubin")
    (cache / "cubins").chmod(0o777)
    assert CubinStore().get("abcd") == b"cubin"
    assert stat.S_IMODE((cache / "cubins").stat().st_mode) == 0o755


@needs_root
@pytest.mark.parametrize("part", ["plans", "cubins", "restored", "scratch"])
def test_cleaning_the_cache_folder_removes_nothing_behind_a_link(part: str, cache: Path, elsewhere: Path) -> None:
    cache.mkdir()
    (elsewhere / "x.json").write_text("x")
    (cache / part).symlink_to(elsewhere)
    for inside in ("cubins/ab", "restored/x"):
        if not inside.startswith(part):
            link(cache / inside, elsewhere)
    before = snapshot(elsewhere)
    kept.prune(unused_seconds=0)
    assert snapshot(elsewhere) == before


@pytest.mark.slow
def test_a_planted_module_in_the_working_folder_is_not_imported(small: Path, tmp_path: Path) -> None:
    """The child process of a sweep must not look for modules where the user happens to be."""
    for name in ("torch", "deep_gemm", "numpy"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'PWNED')!r}, 'w')")
    command = [sys.executable, "-P", "-m", "cachebuilder", "plan", small]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "CACHEBUILDER_CACHE_DIR": str(own_cache(tmp_path / "cache"))}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and not (tmp_path / "PWNED").exists(), done.stderr
