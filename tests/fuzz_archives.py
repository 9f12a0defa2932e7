"""Fuzz the reader and the restore: mutated artifacts must be refused or restored right, never crash, hang or stray.

    python tests/fuzz_archives.py ARTIFACT [MUTATIONS] [SEED] [DEEP_GEMM]

Three kinds in turn: bytes of the compressed file; bytes of the tar inside, compressed again; bytes of the index, its
size and checksum right again. An audit hook sees every file that is opened for writing, made, renamed or linked, and
ends the run at one outside the folder; an alarm ends it at a mutation that takes ten seconds. Half of the mutations
restore into an empty folder, half into a filled one. Prints one JSON object.
"""

from __future__ import annotations

import collections
import hashlib
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

from cachebuilder.deepgemm import installation as installations
from cachebuilder.deepgemm.installation import Installation
from cachebuilder.errors import CacheBuilderError
from cachebuilder.restore import Restored, restore
from tests.archives import compress, join, snapshot, tar_of, unpack

_INTERESTING = (b"\0", b"\xff", b"/", b"..", b"../", b"0", b"7", b"\x80", b'"', b"{", b"-", b"ustar\x0000", bytes(512))


def mutate(data: bytes, chance: random.Random, start: int = 0) -> bytes:
    """One to four edits: bits, bytes, something interesting, a cut, a copy, a swap."""
    out = bytearray(data)
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        if len(out) <= start + 1:
            break
        at, length = chance.randrange(start, len(out)), chance.choice((1, 1, 4, 64, 512))
        match chance.randrange(7):
            case 0:
                out[at] ^= 1 << chance.randrange(8)
            case 1:
                out[at] = chance.randrange(256)
            case 2:
                some = chance.choice(_INTERESTING)
                out[at : at + len(some)] = some
            case 3:
                del out[at : at + length]
            case 4:
                out[at:at] = out[at : at + length]
            case 5:
                other = chance.randrange(start, len(out))
                a, b = bytes(out[at : at + length]), bytes(out[other : other + length])
                out[at : at + len(b)], out[other : other + len(a)] = b, a
            case _:
                del out[chance.choice((at, len(out) - 1)) :]
    return bytes(out)


class Fuzz:
    """One artifact's mutations."""

    def __init__(self, artifact: Path, seed: int, installation: Installation | None, folder: Path) -> None:
        self.chance = random.Random(seed)
        self.installation = installation
        self.packed, self.tar, self.members = artifact.read_bytes(), tar_of(artifact), unpack(artifact)
        self.headers = [m.start() for m in re.finditer(rb"ustar\x0000", self.tar)]
        self.input, self.empty, self.filled = folder / "in.tar.zst", folder / "empty" / "dir", folder / "filled"
        self.empty.parent.mkdir()
        restore([artifact], self.filled, installation, force=True)
        shutil.rmtree(sorted((self.filled / "cache").iterdir())[0])
        self.before = snapshot(self.filled)
        self.input.touch()
        self.outcomes: collections.Counter[str] = collections.Counter()

    def mutation(self, kind: int) -> bytes:
        if kind == 0:
            return mutate(self.packed, self.chance)
        if kind == 1:
            tar = self.tar
            if self.chance.random() < 0.5:  # a header, else any byte
                header = self.chance.choice(self.headers) - 257
                edited = mutate(tar[header : header + 512], self.chance)
                if len(edited) == 512 and self.chance.random() < 0.7:
                    total = sum(edited[:148]) + 8 * 32 + sum(edited[156:])
                    edited = edited[:148] + b"%06o\0 " % total + edited[156:]
                return compress(tar[:header] + edited + tar[header + 512 :])
            return compress(mutate(tar, self.chance))
        index = self.members[0]
        data = mutate(index.data, self.chance)
        index.info.size, kept = len(data), index.data
        index.data = data
        made = compress(join(self.members))
        index.data, index.info.size = kept, len(kept)
        return made

    def one(self, number: int) -> None:
        self.input.write_bytes(self.mutation(number % 3))
        to = self.filled if number % 2 else self.empty
        try:
            done = restore([self.input], to, self.installation, force=True)
        except CacheBuilderError as error:
            self.outcomes[type(error).__name__] += 1
            if number % 2:
                assert snapshot(self.filled) == self.before, f"{number}: {error}"
            else:
                assert not self.empty.exists(), f"{number}: {error}"
        else:
            self.outcomes["restored"] += 1
            self.check(done)
            if to is self.empty:
                shutil.rmtree(self.empty)
            else:
                for name in snapshot(self.filled).keys() - self.before.keys():
                    path = self.filled / name
                    if path.is_file():
                        path.unlink()
                for path in sorted(self.filled.rglob("*"), reverse=True):
                    if path.is_dir() and str(path.relative_to(self.filled)) not in self.before:
                        path.rmdir()
                for name in ("cachebuilder/bin/nvcc", "cachebuilder/bin/version.txt"):
                    (self.filled / name).write_bytes(self.before[name][1])  # type: ignore[arg-type]

    def check(self, done: Restored) -> None:
        """What was restored is what the index says."""
        for entry in done.index.entries:
            for file in entry.files:
                data = (done.dir / "cache" / entry.name / file.name).read_bytes()
                assert (len(data), hashlib.sha256(data).hexdigest()) == (file.size, file.sha256)


def guard(folder: Path) -> None:
    """End the process at the first file made outside ``folder``."""
    root = str(folder)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            if not isinstance(flags, int) or not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                return
            paths = [path]
        elif event in ("os.mkdir", "os.rmdir", "os.remove", "os.chmod", "os.truncate"):
            paths = [arguments[0]]
        elif event in ("os.rename", "os.link", "os.symlink"):
            paths = list(arguments[:2])
        else:
            return
        for path in paths:
            text = os.fsdecode(path) if isinstance(path, str | bytes | os.PathLike) else ""
            # A relative name is below a folder that the restore holds open; it must stay there.
            if ".." in text.split("/") or (text.startswith("/") and text != root and not text.startswith(root + "/")):
                sys.stderr.write(f"outside the folder: {event} {arguments}\n")
                os._exit(3)

    sys.addaudithook(hook)


def main() -> None:
    artifact, count = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 1000
    seed = int(sys.argv[3]) if len(sys.argv) > 3 else 0
    installation = installations.find(Path(sys.argv[4])) if len(sys.argv) > 4 else None
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary).resolve()
        fuzz = Fuzz(artifact, seed, installation, folder)
        guard(folder)
        slowest = 0.0
        for number in range(count):
            signal.alarm(10)
            begun = time.monotonic()
            fuzz.one(number)
            slowest = max(slowest, time.monotonic() - begun)
            signal.alarm(0)
        assert {path.name for path in folder.iterdir()} == {"in.tar.zst", "empty", "filled"}
    figures = {"mutations": count, "seed": seed, "seconds": round(time.monotonic() - started, 1)}
    print(json.dumps(figures | {"slowest_seconds": round(slowest, 3)} | dict(fuzz.outcomes)))


if __name__ == "__main__":
    main()
