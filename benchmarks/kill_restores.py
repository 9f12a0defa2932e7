"""Kill restores at random moments, then run many at once. Is there ever half an entry, and is the result always the same?

    python benchmarks/kill_restores.py ARTIFACT [--kills N] [--kernels N] [--seed N] >> benchmarks/results/kill-restores.jsonl

ARTIFACT is one for the DeepGEMM installed here. Its kernels are repeated with other names, as `restore.py` does, so that a
restore takes long enough to be killed inside. Every second restore begins with an empty DIR, the others with what the
killed one before has left. After each kill, every entry in ``cache/`` must be one of the artifact's, whole and with its
modes. Then ten restores run at once into what is left, and ten into nothing. `tests/test_restores_at_once.py` kills a
restore at each kind of step. Prints one JSON object; ends with an AssertionError at the first thing that is wrong.
"""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click
from restore import file_system, grow

from cachebuilder.artifact.index import CACHE

AT_ONCE = 10
Tree = dict[str, tuple[int, bytes]]


def tree(folder: Path) -> Tree:
    """Every path below ``folder``: mode, and a file's bytes."""
    paths = sorted(folder.rglob("*"))
    return {
        str(path.relative_to(folder)): (path.stat().st_mode, path.read_bytes() if path.is_file() else b"")
        for path in paths
    }


def at_once(command: list[str]) -> None:
    processes = [
        subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) for _ in range(AT_ONCE)
    ]
    said = [process.communicate()[1] for process in processes]
    assert not any(process.returncode for process in processes), said


@click.command()
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option("--kills", default=120, show_default=True)
@click.option("--kernels", default=1000, show_default=True)
@click.option("--seed", default=1, show_default=True)
def main(artifact: Path, kills: int, kernels: int, seed: int) -> None:
    chance = random.Random(seed)
    killed, found = 0, dict.fromkeys(("nothing", "some", "all"), 0)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        grown = grow(artifact, kernels, folder / "grown.tar.zst").path
        dir = folder / "dir"

        def restore(to: Path) -> list[str]:
            return [sys.executable, "-m", "cachebuilder", "restore", str(grown), "--to", str(to)]

        started = time.monotonic()
        subprocess.run(restore(folder / "reference"), check=True, capture_output=True)
        seconds = time.monotonic() - started
        reference = tree(folder / "reference")
        entries = {name for name in reference if name.startswith(f"{CACHE}/") and name.count("/") == 1}
        for number in range(kills):
            if number % 2 == 0:
                shutil.rmtree(dir, ignore_errors=True)
            process = subprocess.Popen(restore(dir), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            if number % 3:  # most kills: inside the renames, which are short
                while not (dir / CACHE).exists() and process.poll() is None:
                    time.sleep(0.0005)
                time.sleep(chance.random() * seconds / 15)
            else:
                time.sleep(chance.random() * seconds)
            process.kill()
            killed += process.wait() == -signal.SIGKILL
            there = {f"{CACHE}/{name}": what for name, what in tree(dir / CACHE).items()} if dir.exists() else {}
            whole = {name for name in entries if name in there}
            wanted = {
                name: what for name, what in reference.items() if name.rsplit("/", 1)[0] in whole or name in whole
            }
            assert there == wanted, sorted(there.items() ^ wanted.items())[:3]
            found["all" if whole == entries else "some" if whole else "nothing"] += 1
        at_once(restore(dir))
        assert tree(dir) == reference
        shutil.rmtree(dir)
        at_once(restore(dir))
        assert tree(dir) == reference
        figures = {"command": "benchmarks/kill_restores.py", "kernels": kernels, "restores": kills, "killed": killed}
        figures |= {"left": found, "at_once": AT_ONCE, "file_system": file_system(folder), "seed": seed}
        print(json.dumps(figures))


if __name__ == "__main__":
    main()
