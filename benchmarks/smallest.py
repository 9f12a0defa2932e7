"""The least work with which a Python program can unpack an artifact: what `restore.py` compares a restore with.

    python benchmarks/smallest.py ARTIFACT DIR

It decompresses ahead in a thread, hashes each file, writes it, renames once, and ends without Python's clean-up. It has no
command line, compares no fingerprint, checks nothing but each file's sha256 and writes no frozen nvcc: not for use.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import queue
import sys
import threading
from collections.abc import Iterator

import zstandard

_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


def members(path: str) -> Iterator[tuple[str, bytes]]:
    """Name and bytes of every file in the tar inside."""
    file = open(path, "rb", 0)  # noqa: SIM115  # the process ends with it
    reader = zstandard.ZstdDecompressor(max_window_size=8 << 20).stream_reader(file, read_size=1 << 16)
    parts: queue.SimpleQueue[bytes] = queue.SimpleQueue()

    def decompress() -> None:
        while part := reader.read(1 << 20):
            parts.put(part)

    threading.Thread(target=decompress, daemon=True).start()
    held, at = b"", 0

    def take(size: int) -> bytes:
        nonlocal held, at
        found = held[at : at + size]
        at += size
        while len(found) < size:
            held, at = parts.get(), size - len(found)
            found += held[:at]
        return found

    while (header := take(512))[0]:
        size, name = int(header[124:135], 8), header[:100].rstrip(b"\0").decode()
        if header[345]:
            name = f"{header[345:500].rstrip(bytes(1)).decode()}/{name}"
        yield name, take(size)
        take(-size % 512)


def main() -> None:
    artifact, to = sys.argv[1:]
    gc.disable()
    os.makedirs(f"{to}/work")
    work = os.open(f"{to}/work", os.O_RDONLY | os.O_DIRECTORY)
    found = members(artifact)
    entries = json.loads(next(found)[1])["entries"]
    wanted = {f"{entry['name']}/{file['name']}": file["sha256"] for entry in entries for file in entry["files"]}
    for entry in entries:
        os.mkdir(entry["name"], 0o755, dir_fd=work)
    next(found)
    for member, data in found:
        name = member.removeprefix("cache/")
        assert hashlib.sha256(data).hexdigest() == wanted[name]
        handle = os.open(name, _NEW, 0o644, dir_fd=work)
        os.write(handle, data)
        os.close(handle)
    os.rename(f"{to}/work", f"{to}/cache")
    os._exit(0)


main()
