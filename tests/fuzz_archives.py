"""Fuzz the reader and the restore: mutated artifacts must be refused or restored right, never crash, hang or stray.

    python tests/fuzz_archives.py ARTIFACT [MUTATIONS] [SEED] [DEEP_GEMM]

Five kinds in turn, from the outside in:

- bytes of the compressed file, or the same tar in another frame: window, content size, checksum, further frames;
- bytes of the tar inside, or of one header with its checksum right again;
- members: hostile names and kinds, links, other orders, copies, other bytes that the index may know of;
- values in the index's tree: of other types, sizes and names, from elsewhere, left out; the digest right again;
- bytes of the index's text.

What is inside is compressed again, so that no checksum of zstd's answers for the reader. An audit hook sees every file
that is opened for writing, made, renamed or linked, and ends the run at one outside the folder; an alarm ends it at a
mutation that takes half a minute, a limit at one that takes 2 GiB. Half of the mutations restore into an empty folder, half
into a filled one. Prints one JSON object; ``refusals`` counts the different sentences with which one was refused.
"""

from __future__ import annotations

import collections
import hashlib
import json
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

from cachebuilder.artifact.index import CACHE
from cachebuilder.deepgemm import installation as installations
from cachebuilder.deepgemm.installation import Installation
from cachebuilder.errors import CacheBuilderError
from cachebuilder.restoring.machine import Machine
from cachebuilder.restoring.restore import Restored, restore
from tests.archives import Member, compress, edit_index, join, member, replace, snapshot, tar_of, unpack

_MEMORY_BYTES = 2 << 30
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


_NAMES = (
    "",
    ".",
    "..",
    "../../x",
    "/etc/passwd",
    "cache",
    "cache/..",
    "a/../../b." + "0" * 32,
    "A" * 99,
    "a\0b",
    "\u00e9",
)
_KINDS = (b"\0", b"1", b"2", b"3", b"4", b"5", b"6", b"7", b"x", b"g", b"L", b"K", b"S", b"Z")
_VALUES: tuple[object, ...] = (
    *(None, True, False, -1, 0, 1, 63, 2**40, 2**64, 10**400, 0.5, 1e308, "", [], {}, [[]], [None], {"": ""}),
    *(
        *_NAMES,
        "0" * 64,
        "f" * 64,
        "F" * 64,
        "0" * 100_000,
        "legacy",
        "deepjit",
        "kernel.cubin",
        "-I/x",
        "release 9.9,",
    ),
)


def reframe(tar: bytes, chance: random.Random) -> bytes:
    """The same bytes in another frame, or in more than one."""
    frame = compress(
        tar,
        window_log=chance.choice((10, 17, 20, 23, 24, 27)),
        write_content_size=chance.random() < 0.7,
        force_max_window=chance.random() < 0.3,
    )
    match chance.randrange(5):
        case 0:
            half = chance.randrange(len(tar))
            return compress(tar[:half]) + compress(tar[half:])
        case 1:
            size = chance.choice((0, 4, 100))
            skippable = (
                (0x184D2A50 + chance.randrange(16)).to_bytes(4, "little") + size.to_bytes(4, "little") + bytes(size)
            )
            return skippable + frame if chance.random() < 0.5 else frame + skippable
        case 2:  # the frame's own header: magic, descriptor, window, content size
            return mutate(frame[:14], chance) + frame[14:]
    return frame


def edit_members(members: list[Member], chance: random.Random) -> list[Member]:
    """One or two edits of whole members."""
    out = list(members)
    for _ in range(chance.choice((1, 1, 2))):
        at, other = chance.randrange(len(out)), chance.randrange(len(out))
        old = out[at]
        name = chance.choice(
            (*_NAMES[:-2], old.info.name.upper(), f"{old.info.name}/x", f"cache/{old.info.name}", out[other].info.name)
        )
        data = mutate(old.data, chance) if old.data and chance.random() < 0.5 else old.data
        match chance.randrange(7):
            case 0:
                out[at] = member(name[:99], data)
            case 1:
                kind = chance.choice(_KINDS)
                out[at] = member(chance.choice((name[:99], old.info.name)), data, kind=kind, linkname=name[:99])
            case 2:
                out[at], out[other] = out[other], out[at]
            case 3:
                del out[at]
            case 4:
                out.insert(other, old)
            case 5:
                out[at] = member(
                    old.info.name, data, mode=chance.choice((0, 0o4777, 0o7777777)), uid=chance.randrange(2**21)
                )
            case _:
                honest = at > 1 and len(out) == len(members) and old.info.name == members[at].info.name
                out = replace(out, at, data, honest and out[0].data == members[0].data)
        if not out:
            break
    return out


def edit_tree(index: dict[str, Any], chance: random.Random) -> None:
    """One to three edits of values, anywhere in the index."""
    for _ in range(chance.choice((1, 1, 2, 3))):
        places: list[tuple[Any, Any]] = []
        todo: list[Any] = [index]
        while todo:
            node = todo.pop()
            keys = list(node) if isinstance(node, dict) else range(len(node))
            places += [(node, key) for key in keys]
            todo += [node[key] for key in keys if isinstance(node[key], dict | list)]
        if not places:
            return
        (node, key), (donor, from_) = chance.choice(places), chance.choice(places)
        value = node[key]
        match chance.randrange(6):
            case 0:
                del node[key]
            case 1:
                node[key] = chance.choice(_VALUES)
            case 2:
                node[key] = json.loads(json.dumps(donor[from_]))
            case 3:
                if isinstance(node, dict):
                    node[chance.choice((*_NAMES, "more"))] = value
                else:
                    node.append(json.loads(json.dumps(value)))
            case 4 if isinstance(value, str):
                at = chance.randrange(len(value) + 1)
                node[key] = (
                    value[:at] + chance.choice((*_NAMES, "x", "0", "\n", " ")) + value[at + chance.randrange(3) :]
                )
            case 5 if isinstance(value, str):
                node[key] = chance.choice((value.upper(), value.lower(), value * 2, value[:-1], value[::-1]))
            case _ if type(value) is int:
                node[key] = value + chance.choice((-1, 1, -value, 2**31, 2**63))


class Fuzz:
    """One artifact's mutations."""

    def __init__(self, artifact: Path, seed: int, installation: Installation | None, folder: Path) -> None:
        self.chance = random.Random(seed)
        self.installation = installation
        self.packed, self.tar, self.members = artifact.read_bytes(), tar_of(artifact), unpack(artifact)
        self.headers = [m.start() for m in re.finditer(rb"ustar\x0000", self.tar)]
        self.input, self.empty, self.filled = folder / "in.tar.zst", folder / "empty" / "dir", folder / "filled"
        self.empty.parent.mkdir()
        restore([artifact], self.filled, machine=Machine(installation), force=True)
        shutil.rmtree(sorted((self.filled / "cache").iterdir())[0])
        self.before = snapshot(self.filled)
        self.input.touch()
        self.outcomes: collections.Counter[str] = collections.Counter()
        self.refusals: set[str] = set()

    def mutation(self, kind: int) -> bytes:
        tar = self.tar
        if kind == 0:
            return mutate(self.packed, self.chance) if self.chance.random() < 0.6 else reframe(tar, self.chance)
        if kind == 1:
            if self.chance.random() < 0.5:  # a header, else any byte
                header = self.chance.choice(self.headers) - 257
                edited = mutate(tar[header : header + 512], self.chance)
                if len(edited) == 512 and self.chance.random() < 0.7:
                    total = sum(edited[:148]) + 8 * 32 + sum(edited[156:])
                    edited = edited[:148] + b"%06o\0 " % total + edited[156:]
                return compress(tar[:header] + edited + tar[header + 512 :])
            return compress(mutate(tar, self.chance))
        if kind == 2:
            return compress(join(edit_members(self.members, self.chance)))
        if kind == 3:
            redigest = self.chance.random() < 0.8
            edited = edit_index(self.members, lambda index: edit_tree(index, self.chance), redigest)
            if self.chance.random() < 0.5:
                self.follow(edited)
            return compress(join(edited))
        data = mutate(self.members[0].data, self.chance)
        return compress(join([member(self.members[0].info.name, data), *self.members[1:]]))

    def follow(self, edited: list[Member]) -> None:
        """Members' names follow those in an edited index, where a header can hold them."""
        before, after = (json.loads(members[0].data) for members in (self.members, edited))
        entries = after.get("entries")
        for old, new in zip(before["entries"], entries if isinstance(entries, list) else [], strict=False):
            name = new.get("name") if isinstance(new, dict) else None
            if isinstance(name, str) and 0 < len(name) < 80 and name != old["name"]:
                for at, one in enumerate(edited):
                    if one.info.name.startswith(f"{CACHE}/{old['name']}/"):
                        edited[at] = member(one.info.name.replace(old["name"], name, 1), one.data)

    def one(self, number: int) -> None:
        self.input.write_bytes(self.mutation(number % 5))
        to = self.filled if number % 2 else self.empty
        try:
            done = restore([self.input], to, machine=Machine(self.installation), force=True)
        except CacheBuilderError as error:
            self.outcomes[type(error).__name__] += 1
            sentence = str(error).replace(str(self.input), "")
            self.refusals.add(re.sub(r"'.*'|\"[^\"]*\"|\S*\d\S*|b'.*", "_", sentence.splitlines()[0])[:60])
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
        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
        slowest = 0.0
        for number in range(count):
            signal.alarm(30)
            begun = time.process_time()
            fuzz.one(number)
            slowest = max(slowest, time.process_time() - begun)
            signal.alarm(0)
        assert {path.name for path in folder.iterdir()} == {"in.tar.zst", "empty", "filled"}
    figures = {"mutations": count, "seed": seed, "seconds": round(time.monotonic() - started, 1)}
    figures |= {"slowest_cpu_seconds": round(slowest, 3), "refusals": len(fuzz.refusals)}
    print(json.dumps(figures | dict(fuzz.outcomes)))


if __name__ == "__main__":
    main()
