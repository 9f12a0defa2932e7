"""A serving container's conditions, made of a mount namespace and another user: no container engine is needed."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conftest import ROOT

#: A user that no line of /etc/passwd names, as Kubernetes' ``runAsUser`` and OpenShift choose one.
USER = 1001


@dataclass(frozen=True)
class Container:
    """How the process runs.

    Attributes:
        user: its number; it has no home, and no group but the one of that number.
        read_only: the root file system is, ``/tmp`` included; ``/dev/shm`` is not.
        noexec: folders in which nothing can be executed.
    """

    user: int = USER
    read_only: bool = False
    noexec: Sequence[Path] = ()

    def run(self, *command: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run ``command`` there to its end, with no variables but PATH and these."""
        lines = _opened([Path(sys.base_prefix), Path(sys.prefix).resolve(), ROOT])
        for folder in self.noexec:
            lines += [f"mount --bind {folder} {folder}", f"mount -o remount,bind,noexec {folder}"]
        lines += ["mount -t tmpfs none /dev/shm"]
        lines += ["mount -o remount,bind,ro /"] if self.read_only else []
        lines += [f'exec setpriv --reuid={self.user} --regid={self.user} --clear-groups -- "$@"']
        path = f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin"
        return subprocess.run(
            ["unshare", "--mount", "sh", "-ec", "\n".join(lines), "sh", *command],
            capture_output=True,
            text=True,
            env={"PATH": path, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"} | environment,
            cwd="/",
            check=False,
        )


def _opened(paths: Iterable[Path]) -> list[str]:
    """Commands that let every user reach the folders, even where one above them is closed, as ``/root`` is."""
    closed: dict[Path, list[Path]] = {}
    for path in paths:
        above = next((folder for folder in reversed(path.parents) if not folder.stat().st_mode & 0o001), None)
        if above is not None:
            closed.setdefault(above, []).append(path)
    lines = ["mount -t tmpfs none /mnt"]
    for folder, (above, below) in enumerate(closed.items()):
        kept = [f"/mnt/{folder}-{number}" for number, _ in enumerate(below)]
        lines += [
            f"mkdir {to} && mount --rbind {shlex.quote(str(path))} {to}" for path, to in zip(below, kept, strict=True)
        ]
        lines += [f"mount -t tmpfs -o mode=755 none {shlex.quote(str(above))}"]
        for path, to in zip(below, kept, strict=True):
            lines += [f"mkdir -p {shlex.quote(str(path))} && mount --rbind {to} {shlex.quote(str(path))}"]
    return lines


def _allowed() -> bool:
    """Whether this machine lets the tests mount folders and act as another user."""
    try:
        return (
            os.geteuid() == 0 and subprocess.run(["unshare", "--mount", "setpriv", "true"], check=False).returncode == 0
        )
    except OSError:
        return False


needs_container = pytest.mark.skipif(not _allowed(), reason="wants root, and mount namespaces (unshare --mount)")
