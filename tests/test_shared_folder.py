"""A file that is fetched into a folder where others write: nobody else ever had what becomes that file."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cachebuilder.errors import RestoreError, TransferError
from cachebuilder.ship.download import RemoteFile, Target, download
from cachebuilder.ship.retry import Retries

DATA = os.urandom(100_000)
ONCE = Retries(0)
ATTACKER, VICTIM = 12345, 12346

as_two_users = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become two other users")


def remote(read: Callable[[int], tuple[int, Iterator[bytes]]] | None = None) -> RemoteFile:
    read = read or (lambda offset: (offset, iter([DATA[offset:]])))
    return RemoteFile("oci://h/a:b", len(DATA), "v", hashlib.sha256(DATA).hexdigest(), read)


PART = f".a.tar.zst.{hashlib.sha256(b'v').hexdigest()[:16]}.part"


def fetch(folder: Path, one: RemoteFile | None = None) -> None:
    with Target.at(folder / "a.tar.zst") as target:
        download(one or remote(), target, ONCE)


@contextlib.contextmanager
def becoming(user: int) -> Iterator[None]:
    """Act as another user."""
    os.seteuid(user)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture(params=[0o777, 0o1777], ids=["all-may-write", "sticky"])
def shared(request: pytest.FixtureRequest) -> Iterator[Path]:
    """A folder that all users may write in, as /tmp or a volume of several pods."""
    folder = Path(tempfile.mkdtemp(prefix="cachebuilder-test-"))
    folder.chmod(request.param)
    yield folder
    shutil.rmtree(folder)


@as_two_users
@pytest.mark.parametrize("mode", [0o666, 0o600, 0o000], ids=oct)
def test_a_part_that_another_user_made_and_holds_open_is_not_continued(mode: int, shared: Path) -> None:
    with becoming(ATTACKER):
        held = os.open(shared / PART, os.O_RDWR | os.O_CREAT, 0o600)
        os.fchmod(held, mode)
    with becoming(VICTIM):
        fetch(shared)
    os.pwrite(held, b"evil", 0)
    os.ftruncate(held, 4)
    os.close(held)
    got = shared / "a.tar.zst"
    assert got.read_bytes() == DATA and got.stat().st_uid == VICTIM and got.stat().st_nlink == 1
    assert sorted(os.listdir(shared)) == sorted([PART, "a.tar.zst"])


@as_two_users
@pytest.mark.parametrize("kind", ["hard-link", "link", "dangling-link", "fifo", "folder"])
def test_what_another_user_put_in_a_parts_place_is_neither_written_nor_taken(kind: str, shared: Path) -> None:
    victims = shared / "private"
    with becoming(VICTIM):
        victims.write_bytes(b"mine")
        victims.chmod(0o600)
    with becoming(ATTACKER):
        part = shared / PART
        match kind:
            case "link":
                part.symlink_to(victims)
            case "dangling-link":
                part.symlink_to(shared / "new")
            case "fifo":
                os.mkfifo(part)
            case "folder":
                part.mkdir()
    if kind == "hard-link":  # where fs.protected_hardlinks is 0, the attacker may
        os.link(victims, shared / PART)
    with becoming(VICTIM):
        fetch(shared)
    assert (shared / "a.tar.zst").read_bytes() == DATA and victims.read_bytes() == b"mine"
    assert not (shared / "new").exists() and (shared / "a.tar.zst").stat().st_uid == VICTIM


@as_two_users
def test_the_file_itself_is_not_taken_from_another_user_though_it_has_the_right_bytes(shared: Path) -> None:
    with becoming(ATTACKER):
        held = os.open(shared / "a.tar.zst", os.O_RDWR | os.O_CREAT, 0o644)
        os.write(held, DATA)
    sticky = bool(shared.stat().st_mode & 0o1000)
    with becoming(VICTIM), pytest.raises(RestoreError) if sticky else contextlib.nullcontext():
        fetch(shared)
    os.pwrite(held, b"evil", 0)
    os.close(held)
    if not sticky:  # else nobody but its owner can replace it, and the error says so
        assert (shared / "a.tar.zst").read_bytes() == DATA


@as_two_users
def test_a_part_that_is_exchanged_while_it_is_fetched_does_not_become_the_file(shared: Path) -> None:
    def exchange(offset: int) -> tuple[int, Iterator[bytes]]:
        os.seteuid(0)  # the same process, as the attacker
        with becoming(ATTACKER), contextlib.suppress(PermissionError):
            (shared / "evil").write_bytes(b"evil")
            os.rename(shared / "evil", shared / PART)
        os.seteuid(VICTIM)
        return offset, iter([DATA[offset:]])

    sticky = bool(shared.stat().st_mode & 0o1000)
    with (
        becoming(VICTIM),
        contextlib.nullcontext() if sticky else pytest.raises(RestoreError, match="found another one"),
    ):
        fetch(shared, remote(exchange))
    assert (shared / "a.tar.zst").exists() is sticky
    if sticky:
        assert (shared / "a.tar.zst").read_bytes() == DATA


@pytest.mark.parametrize("mode", [0o600, 0o660, 0o666], ids=oct)
def test_only_a_part_that_nobody_else_could_open_is_continued(mode: int, tmp_path: Path) -> None:
    (tmp_path / PART).write_bytes(DATA[:1000])
    (tmp_path / PART).chmod(mode)
    offsets: list[int] = []

    def read(offset: int) -> tuple[int, Iterator[bytes]]:
        offsets.append(offset)
        return offset, iter([DATA[offset:]])

    fetch(tmp_path, remote(read))
    assert offsets == [1000 if mode == 0o600 else 0] and (tmp_path / "a.tar.zst").read_bytes() == DATA
    assert (tmp_path / "a.tar.zst").stat().st_mode & 0o777 == 0o644


def test_a_server_that_gives_much_and_then_little_in_turn_does_not_keep_us_for_ever(tmp_path: Path) -> None:
    """Each time from the start, and each second time more than the time before."""
    tries: list[int] = []

    def read(offset: int) -> tuple[int, Iterator[bytes]]:
        assert len(tries) < 30, "for ever"
        tries.append(1)
        return 0, iter([bytes((9 << 20) + len(tries))] if len(tries) % 2 else [b"0"])

    sick = RemoteFile("oci://h/a:b", 1 << 29, "v", "0" * 64, read)
    with Target.at(tmp_path / "a") as target, pytest.raises(TransferError, match="truncated"):
        download(sick, target, Retries(3, first_wait=0.001))
    assert len(tries) <= 5
