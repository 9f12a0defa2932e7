"""Many restores at once, and killed ones: whole entries only."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cachebuilder import building
from cachebuilder.restoring.machine import Machine
from cachebuilder.restoring.restore import restore
from tests.archives import snapshot

pytestmark = pytest.mark.slow


def restore_command(built: building.Built, to: Path) -> list[str]:
    here = built.inputs.installation.imported_as
    command = [sys.executable, "-m", "cachebuilder", "restore", built.packed.path, "--to", to, "--deep-gemm", here]
    return list(map(str, command))


def test_ten_restores_at_once_end_with_one_whole_cache(built: building.Built, machine: Machine, tmp_path: Path) -> None:
    alone = tmp_path / "alone"
    restore([built.packed.path], alone, machine=machine)
    together = [
        subprocess.Popen(restore_command(built, tmp_path / "dir"), stderr=subprocess.PIPE, text=True) for _ in range(10)
    ]
    said = [process.communicate()[1] for process in together]
    assert [process.returncode for process in together] == [0] * 10, said
    assert sum(int(text.split(": ")[1].split()[0]) for text in said) == len(built.plan.kernels)
    assert snapshot(tmp_path / "dir") == snapshot(alone)


#: A restore that kills itself at its N-th new file, folder or rename; if it ends, it prints how many there were.
KILLED_AT_ITS_NTH_STEP = """
import os, signal, sys
n, seen = int(sys.argv.pop(1)), 0
sys.dont_write_bytecode = True
def count(event, arguments):
    global seen
    new_file = event == "open" and isinstance(arguments[0], str) and arguments[2] & os.O_CREAT
    if new_file or event in ("os.mkdir", "os.rename", "os.chmod", "os.remove", "os.rmdir"):
        seen += 1
        if seen == n:
            os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(count)
from cachebuilder.cli.main import main
try:
    main()
finally:
    print(seen)
"""


def test_a_restore_killed_at_any_of_its_steps_leaves_whole_entries_only(
    built: building.Built, machine: Machine, tmp_path: Path
) -> None:
    reference, dir = tmp_path / "whole", tmp_path / "dir"
    restore([built.packed.path], reference, machine=machine)
    whole = snapshot(reference)

    def run_until(step: int) -> subprocess.CompletedProcess[str]:
        _, *command = restore_command(built, dir)
        command[:2] = ["-c", KILLED_AT_ITS_NTH_STEP, str(step)]
        return subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False)

    def check() -> None:
        left = snapshot(dir) if dir.exists() else {}
        for name, content in left.items():
            if name.startswith("cache/") or (name.startswith("cachebuilder/artifacts/") and "/." not in name):
                assert content == whole[name], name
        for entry in (dir / "cache").iterdir() if (dir / "cache").exists() else ():
            assert snapshot(entry) == snapshot(reference / "cache" / entry.name)

    steps = int(run_until(0).stdout)
    assert steps > 4 * len(built.plan.kernels)
    for number in range(6):
        shutil.rmtree(dir, ignore_errors=True)
        step = 1 + number * (steps - 1) // 6
        assert run_until(step).returncode == -signal.SIGKILL, "from nothing, it makes as many steps each time"
        check()
        run_until(steps // 2)  # another one, which goes on from what the first one left, and may end
        check()
    restore([built.packed.path], dir, machine=machine)
    left = snapshot(dir)
    assert {name: left[name] for name in whole} == whole
    assert not (dir / "cachebuilder" / "tmp").exists(), "what killed restores left is removed"
