"""Access below an open folder stays below it, whatever another user puts there."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from cachebuilder.common.folders import Folder, MadeFolder


@pytest.fixture
def umask() -> Iterator[None]:
    """The umask that lets everybody write."""
    before = os.umask(0)
    yield
    os.umask(before)


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """A folder that nothing may change."""
    path = tmp_path / "elsewhere"
    path.mkdir()
    (path / "file").write_text("private")
    (path / "file").chmod(0o600)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Folder]:
    with Folder.make_at(tmp_path / "folder") as folder:
        yield folder


def mode(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


def test_a_link_in_place_of_a_folder_is_neither_entered_nor_written_through(folder: Folder, elsewhere: Path) -> None:
    (folder.path / "link").symlink_to(elsewhere)
    for enter in (folder.open, folder.make):
        with pytest.raises(OSError, match=r"wanted a folder, found a link: '.*/link'"):
            enter("link")
    folder.remove("link")
    assert (elsewhere / "file").read_text() == "private" and folder.names() == []


def test_a_link_in_place_of_a_file_is_not_read_and_is_replaced(folder: Folder, elsewhere: Path) -> None:
    (folder.path / "file").symlink_to(elsewhere / "file")
    with pytest.raises(OSError, match="wanted a file, found a link"):
        folder.read("file", 100)
    with pytest.raises(FileExistsError):
        folder.write_new("file", b"ours", 0o644)
    folder.write("file", b"ours", 0o644)
    assert folder.read("file", 100) == b"ours"
    assert (elsewhere / "file").read_text() == "private" and mode(elsewhere / "file") == 0o600


def test_a_fifo_and_a_file_that_is_too_large_are_not_read(folder: Folder) -> None:
    os.mkfifo(folder.path / "fifo")
    with pytest.raises(OSError, match="wanted a regular file"):
        folder.read("fifo", 100)
    with (folder.path / "sparse").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(OSError, match="wanted at most 100 bytes"):
        folder.read("sparse", 100)


def test_whatever_the_umask_nobody_else_can_write(folder: Folder, umask: None) -> None:
    with folder.make("a") as a, a.make("private", 0o700):
        a.write("file", b"x", 0o644)
        a.write_new("new", b"x", 0o755)
    found = {path.name: mode(path) for path in folder.path.rglob("*")}
    assert found == {"a": 0o755, "private": 0o700, "file": 0o644, "new": 0o755}


def test_another_users_file_with_the_right_bytes_is_replaced(folder: Folder) -> None:
    if os.geteuid():
        pytest.skip("wants root, who can give a file to another user")
    folder.write("file", b"right", 0o644)
    inode = (folder.path / "file").stat().st_ino
    folder.write("file", b"right", 0o644)
    assert (folder.path / "file").stat().st_ino == inode  # ours is left alone
    os.chown(folder.path / "file", 12345, 12345)
    folder.write("file", b"right", 0o644)
    assert (folder.path / "file").stat().st_uid == 0


def test_a_folder_is_foreign_if_another_user_owns_it(folder: Folder) -> None:
    if os.geteuid():
        pytest.skip("wants root, who can give a folder to another user")
    assert folder.is_ours() and not folder.is_foreign()
    os.chown(folder.handle, 12345, 12345)
    assert not folder.is_ours() and folder.is_foreign() and folder.names() == []


def test_removing_a_tree_leaves_what_its_links_lead_to(folder: Folder, elsewhere: Path) -> None:
    with folder.make("tree") as tree, tree.make("inner") as inner:
        inner.write("file", b"x", 0o644)
        (tree.path / "link").symlink_to(elsewhere)
        (inner.path / "link").symlink_to(elsewhere / "file")
    folder.remove("tree")
    folder.remove("none")
    assert folder.names() == [] and (elsewhere / "file").read_text() == "private"


def test_the_folders_that_were_made_can_be_removed_again(tmp_path: Path) -> None:
    made: list[MadeFolder] = []
    Folder.make_at(tmp_path / "a" / "b", made=made).close()
    Folder.make_at(tmp_path / "a" / "b", made=made).close()
    assert [one.name for one in made] == ["a", "b"]
    for one in reversed(made):
        one.remove()
    assert list(tmp_path.iterdir()) == []
