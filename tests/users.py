"""Other users of this machine, for tests of what they can do."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

STRANGER, VICTIM = 12345, 12346

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="wants root, which can act as two other users")


@pytest.fixture
def ground() -> Iterator[Path]:
    """A folder that every user may enter, which pytest's own are not."""
    path = Path(tempfile.mkdtemp(prefix="ground-"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


def owned(path: Path, user: int = STRANGER, mode: int = 0o755) -> Path:
    """A folder of another user, made if it is missing."""
    path.mkdir(exist_ok=True)
    path.chmod(mode)
    os.chown(path, user, user)
    return path


def _start(user: int, act: Callable[[], object]) -> int:
    """Run ``act`` in a fork of this process that has become another user; returns the fork's number.

    A fork, since another user may not be allowed to run this Python or to read its modules.
    """
    if child := os.fork():
        return child
    try:
        os.setgroups([])
        os.setgid(user)
        os.setuid(user)
        act()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def as_user(user: int, act: Callable[[], object]) -> None:
    """Run ``act`` as another user, to its end."""
    assert os.waitpid(_start(user, act), 0)[1] == 0


@contextmanager
def meanwhile_as(user: int, act: Callable[[], object]) -> Iterator[None]:
    """Run ``act`` as another user again and again, until the context ends."""

    def act_for_ever() -> None:
        while True:
            act()

    child = _start(user, act_for_ever)
    try:
        yield
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
