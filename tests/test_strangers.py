"""What another user can do who may write into DIR, into a shared temporary folder, or into the cache folder: nothing."""

from __future__ import annotations

import contextlib
import os
import stat
import time
from pathlib import Path

import pytest

from cachebuilder import building
from cachebuilder.errors import RestoreError
from cachebuilder.restoring.machine import Machine
from cachebuilder.restoring.restore import Restored, restore
from tests.archives import snapshot
from tests.conftest import ROOT
from tests.users import STRANGER, as_user, ground, meanwhile_as, needs_root, owned

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
