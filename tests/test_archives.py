"""Hostile and damaged archives: each is refused with the reason, and DIR is as before."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from _pytest.mark import ParameterSet

from cachebuilder import building
from cachebuilder.artifact import read
from cachebuilder.errors import ArtifactError
from cachebuilder.restoring.machine import Machine
from cachebuilder.restoring.restore import restore
from tests.archives import Member, compress, edit_index, join, member, replace, snapshot, tar_of, unpack

Members = list[Member]
Change = Callable[[Members], Members]


def tarred(change: Change) -> Callable[[Path], bytes]:
    """An archive whose members were changed."""
    return lambda artifact: compress(join(change(unpack(artifact))))


def indexed(change: Callable[[dict[str, Any]], object], redigest: bool = True) -> Callable[[Path], bytes]:
    """An archive whose index was changed."""
    return tarred(lambda members: edit_index(members, change, redigest))


def raw(change: Callable[[bytearray], object]) -> Callable[[Path], bytes]:
    """An archive whose tar's bytes were changed; what ``change`` returns takes its place, if anything."""

    def make(artifact: Path) -> bytes:
        tar = bytearray(tar_of(artifact))
        changed = change(tar)
        return compress(bytes(changed if isinstance(changed, bytes | bytearray) else tar))

    return make


def packed(change: Callable[[bytes], bytes]) -> Callable[[Path], bytes]:
    """An archive whose compressed bytes were changed."""
    return lambda artifact: change(artifact.read_bytes())


def third(name: str, **fields: Any) -> Callable[[Path], bytes]:
    """An archive with one more member in front of the first entry's."""
    return tarred(lambda members: [*members[:2], member(name, **fields), *members[2:]])


def first_entry(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], bytes]:
    return indexed(lambda index: change(index["entries"][0]))


def twin(members: Members) -> Members:
    """A second first entry, whose name is the same but for case; index and members agree."""
    name = members[2].info.name.split("/")[1]
    other = "kernel." + name[7:].swapcase() if name.startswith("kernel.") else name.swapcase()
    other = other[:-32] + name[-32:]

    def add(index: dict[str, Any]) -> None:
        index["entries"].append(next(e for e in index["entries"] if e["name"] == name) | {"name": other})

    extra = [member(m.info.name.replace(name, other), m.data) for m in members[2:] if f"/{name}/" in m.info.name]
    return edit_index([*members, *extra], add)


def header(offset: int, data: bytes, fix: bool = True) -> Callable[[Path], bytes]:
    """An archive whose first header has other bytes at ``offset``; its checksum right, if wanted."""

    def change(tar: bytearray) -> None:
        tar[offset : offset + len(data)] = data
        if fix:
            total = sum(tar[:148]) + 8 * 32 + sum(tar[156:512])
            tar[148:156] = b"%06o\0 " % total

    return raw(change)


def shown_size(size: int) -> Callable[[Path], bytes]:
    return header(124, b"%011o\0" % size)


def bomb(artifact: Path) -> bytes:
    return compress(tar_of(artifact) + bytes(600 << 20))


def swapped(members: Members) -> Members:
    """Two cubins have changed places."""
    cubins = [n for n, m in enumerate(members) if m.info.name.endswith("/kernel.cubin")]
    a, b = cubins[0], next(n for n in cubins if members[n].data != members[cubins[0]].data)
    return replace(replace(members, a, members[b].data), b, members[a].data)


def flip(data: bytes, position: int) -> bytes:
    return data[:position] + bytes([data[position] ^ 0x10]) + data[position + 1 :]


CORPUS = [
    # names
    ("absolute-path", third("/etc/cron.d/evil", data=b"x"), "an absolute path"),
    ("dot-dot", third("../evil", data=b"x"), "a path that leaves its folder"),
    ("dot-dot-below-cache", third("cache/../../evil", data=b"x"), "a path that leaves its folder"),
    ("dot-dot-by-prefix", raw(lambda tar: put_prefix(tar, b"..")), "wanted artifact.json as the first member"),
    ("not-in-the-index", third("cache/extra.0123/kernel.cu", data=b"x"), "not a name of a"),
    ("file-beside-cache", third("run.sh", data=b"x"), "not in the index"),
    ("folder-in-an-entry", tarred(lambda m: [*m[:2], member(m[2].info.name + "/x"), *m[2:]]), "not in the index"),
    ("duplicate-member", tarred(lambda m: [*m[:3], m[2], *m[3:]]), "the same name a second time"),
    ("duplicate-behind-the-last", tarred(lambda m: [*m, m[2]]), "wanted nothing behind"),
    ("case-twin-member", tarred(lambda m: [*m[:2], member(m[2].info.name.upper()), *m[2:]]), "found member 'CACHE/"),
    ("case-twin-entry", tarred(twin), "differs in case only"),
    ("name-not-ascii", header(0, b"artifact.jso\xc3\xb1"), "a name in ASCII"),
    ("name-with-a-zero-inside", header(0, b"artifact.json\0x"), "zeros behind it"),
    ("empty-name", header(0, bytes(100)), "a member's name"),
    # kinds
    ("symlink", third("cache/link", kind=tarfile.SYMTYPE, linkname="/etc"), "a symbolic link"),
    ("symlink-in-an-entrys-place", tarred(lambda m: link_in_place(m)), "a symbolic link"),
    ("hard-link", third("cache/link", kind=tarfile.LNKTYPE, linkname="/etc/passwd"), "a hard link"),
    ("character-device", third("cache/null", kind=tarfile.CHRTYPE, devmajor=1, devminor=3), "a character device"),
    ("block-device", third("cache/sda", kind=tarfile.BLKTYPE, devmajor=8), "a block device"),
    ("fifo", third("cache/fifo", kind=tarfile.FIFOTYPE), "a FIFO"),
    ("folder", third("cache/", kind=tarfile.DIRTYPE), "a folder"),
    ("sparse", third("cache/sparse", kind=tarfile.GNUTYPE_SPARSE), "a sparse file"),
    ("pax-header", third("pax", kind=tarfile.XHDTYPE, data=b"20 path=/etc/passwd\n"), "a pax extension"),
    ("global-pax-header", third("pax", kind=tarfile.XGLTYPE, data=b"20 path=/etc/passwd\n"), "a global pax"),
    ("gnu-long-name", third("././@LongLink", kind=tarfile.GNUTYPE_LONGNAME, data=b"/etc/x\0"), "a GNU long name"),
    ("contiguous-file", third("cache/x", kind=tarfile.CONTTYPE), "a contiguous file"),
    ("unknown-type", third("cache/x", kind=b"Z"), "a member of type"),
    ("regular-file-with-a-link-name", header(157, b"/etc/passwd"), "a link name"),
    # order and completeness
    ("no-index", tarred(lambda m: m[1:]), "as the first member"),
    ("index-second", tarred(lambda m: [m[1], m[0], *m[2:]]), "as the first member"),
    ("no-manifest", tarred(lambda m: [m[0], *m[2:]]), "as the second member"),
    ("missing-member", tarred(lambda m: m[:-1]), "files of the index are missing"),
    ("marker-first", tarred(lambda m: [*m[:2], m[-1], *m[2:-1]]), "out of order"),
    ("trailing-member", tarred(lambda m: [*m, member("cache/more", b"x")]), "wanted nothing behind"),
    ("bytes-behind-the-end", raw(lambda tar: tar + b"x"), "wanted nothing behind"),
    ("a-second-tar", raw(lambda tar: tar + tar), "wanted nothing behind"),
    ("zeros-without-end", raw(lambda tar: tar + bytes(1 << 20)), "zeros at the end"),
    ("no-end-blocks", raw(lambda tar: tar.rstrip(b"\0")), "truncated"),
    ("padding-not-zero", raw(lambda tar: pad(tar)), "wanted zeros behind a member"),
    ("truncated-tar", raw(lambda tar: tar[: len(tar) // 2]), "truncated"),
    # headers
    ("bad-checksum", header(100, b"0000777", fix=False), "checksum is wrong"),
    ("gnu-magic", header(257, b"ustar  \0"), "wanted a ustar header"),
    ("old-v7-header", header(257, bytes(8)), "wanted a ustar header"),
    ("base-256-size", header(124, b"\x80" + bytes(10) + b"\x01"), "eleven octal digits"),
    ("negative-size", header(124, b"-0000000001\0"), "eleven octal digits"),
    ("huge-size", shown_size((8 << 30) - 1), "an index of at most"),
    ("empty-index", shown_size(0), "an index of at most"),
    ("not-a-tar", lambda artifact: compress(b"hello world\n" * 4000), "checksum is wrong"),
    # bytes
    ("swapped-files", tarred(swapped), "wanted"),
    (
        "another-manifest",
        tarred(lambda m: replace(m, 1, m[1].data.replace(b"max_tokens", b"max_tokenz"))),
        "manifest.yaml",
    ),
    ("flipped-bit-inside", raw(lambda tar: flip_cubin(tar)), "wanted sha256"),
    ("longer-file", tarred(lambda m: replace(m, 2, m[2].data + b" ")), "bytes, found"),
    # the index
    ("other-schema", indexed(lambda index: index.update(schema_version=4)), "artifact schema"),
    ("unknown-field", indexed(lambda index: index.update(more=1)), "more: unknown field"),
    ("no-entries-field", indexed(lambda index: index.pop("entries")), "entries: wanted"),
    ("wrong-digest", indexed(lambda i: i["fingerprint"].update(arch="sm_100a"), redigest=False), "fingerprint_digest"),
    ("unknown-generation", indexed(lambda i: i["fingerprint"].update(generation="x")), "generation"),
    ("entry-named-dot-dot", first_entry(lambda e: e.update(name="..")), "wanted names of"),
    ("entry-named-absolute", first_entry(lambda e: e.update(name="/tmp/x." + "0" * 32)), "wanted names of"),
    ("entry-named-as-a-path", first_entry(lambda e: e.update(name="a/../../b." + "0" * 32)), "wanted names of"),
    ("entry-with-a-newline", first_entry(lambda e: e.update(name=e["name"] + "\n")), "wanted names of"),
    ("entry-twice", indexed(lambda i: i["entries"].append(i["entries"][0])), "twice"),
    ("file-named-dot-dot", first_entry(lambda e: e["files"][0].update(name="../x")), "wanted the files"),
    ("file-left-out", first_entry(lambda e: e["files"].pop()), "wanted the files"),
    (
        "negative-file-size",
        first_entry(lambda e: e["files"][0].update(size=-1)),
        "files.0.size: wanted greater than or equal to 0, found -1",
    ),
    ("file-too-large", first_entry(lambda e: e["files"][1].update(size=65 << 20)), "wanted at most 67108864 bytes"),
    ("source-too-large", first_entry(lambda e: e["files"][0].update(size=1 << 20)), "wanted at most 262144 bytes"),
    ("size-beyond-all", first_entry(lambda e: e["files"][0].update(size=1 << 41)), "files.0.size: wanted less than"),
    ("size-as-a-float", first_entry(lambda e: e["files"][0].update(size=1.0)), "wanted a valid integer, found 1.0"),
    (
        "sha256-in-capitals",
        first_entry(lambda e: e["files"][0].update(sha256="A" * 64)),
        "sha256: wanted a match of pattern",
    ),
    ("too-many-entries", indexed(lambda i: i.update(entries=[i["entries"][0]] * 20_001)), "at most 20000"),
    ("name-for-a-shell", indexed(lambda i: i.update(name="$(reboot)")), "name: wanted letters"),
    ("flags-without-end", indexed(lambda i: i["fingerprint"].update(legacy_flags="-I/x " * 1000)), "more than 4096"),
    (
        "compiler-text-with-a-zero",
        indexed(lambda i: i["fingerprint"].update(compiler="a\0b")),
        "fingerprint.compiler: wanted",
    ),
    ("index-not-json", tarred(lambda m: [member("artifact.json", b"{"), *m[1:]]), "wanted JSON"),
    ("index-not-utf-8", tarred(lambda m: [member("artifact.json", b'"\xff"'), *m[1:]]), "wanted JSON"),
    ("index-too-deep", tarred(lambda m: [member("artifact.json", b"[" * 100_000), *m[1:]]), "wanted JSON"),
    (
        "index-of-many-lists",
        tarred(lambda m: [member("artifact.json", b"[]," * (2 << 20)), *m[1:]]),
        "objects and lists",
    ),
    ("duplicate-key", tarred(lambda m: [member("artifact.json", b'{"a":1,"a":2}'), *m[1:]]), "twice"),
    ("number-without-end", tarred(lambda m: [member("artifact.json", b"9" * 100_000), *m[1:]]), "wanted JSON"),
    ("half-a-character", tarred(lambda m: [member("artifact.json", b'{"a":"\\ud800"}'), *m[1:]]), "half a character"),
    # compression
    ("empty-file", packed(lambda data: b""), "zstd"),
    ("not-zstd", packed(lambda data: b"PK\3\4" + data), "zstd"),
    ("truncated-file", packed(lambda data: data[: len(data) // 2]), "truncated"),
    ("one-byte-short", packed(lambda data: data[:-1]), "truncated"),
    ("flipped-bit", packed(lambda data: flip(data, len(data) // 2)), ""),
    ("flipped-checksum", packed(lambda data: flip(data, len(data) - 1)), "zstd"),
    ("bytes-behind-the-frame", packed(lambda data: data + b"x"), "something behind"),
    ("second-frame", packed(lambda data: data + data), "something behind"),
    ("skippable-frame-first", packed(lambda data: b"\x50\x2a\x4d\x18\4\0\0\0abcd" + data), "zstd"),
    ("no-content-size", lambda a: compress(tar_of(a), write_content_size=False), "bytes unpacked"),
    ("large-window", lambda a: compress(tar_of(a) + bytes(12 << 20), window_log=27), "too much memory"),
    ("zip-bomb", bomb, "bytes unpacked for each"),
    ("claims-much", lambda a: claims(a, 5 << 30), "bytes unpacked"),
]


def put_prefix(tar: bytearray, prefix: bytes) -> None:
    tar[345 : 345 + len(prefix)] = prefix
    tar[148:156] = b"%06o\0 " % (sum(tar[:148]) + 8 * 32 + sum(tar[156:512]))


def link_in_place(members: Members) -> Members:
    name = members[3].info.name
    return [*members[:3], member(name, kind=tarfile.SYMTYPE, linkname="/etc/passwd"), *members[4:]]


def pad(tar: bytearray) -> None:
    size = int(tar[124:135], 8)
    assert size % 512, "the index fills its blocks"
    tar[512 + size] = 1


def flip_cubin(tar: bytearray) -> None:
    tar[tar.index(b"\x7fELF") + 100] ^= 1


def claims(artifact: Path, size: int) -> bytes:
    """A frame that says it holds ``size`` bytes."""
    data = bytearray(artifact.read_bytes())
    descriptor = data[4]
    field = {0: 1, 1: 2, 2: 4, 3: 8}[descriptor >> 6]
    start = 5 + (0 if descriptor & 0x20 else 1)
    data[4] = descriptor | 0xC0
    data[start : start + field] = size.to_bytes(8, "little")
    return bytes(data)


def case(name: str, make: Callable[[Path], bytes], words: str) -> ParameterSet:
    slow = name in ("too-many-entries", "zip-bomb")
    return pytest.param(make, words, id=name, marks=[pytest.mark.slow] if slow else [])


@pytest.mark.parametrize("make, words", [case(*row) for row in CORPUS])
@pytest.mark.parametrize("there", ["fresh", "in-use"])
def test_rejects(make: Callable[[Path], bytes], words: str, there: str, built: building.Built, tmp_path: Path) -> None:
    hostile, to = tmp_path / "in" / "hostile.tar.zst", tmp_path / "out" / "dir"
    hostile.parent.mkdir()
    hostile.write_bytes(make(built.packed.path))
    if there == "in-use":
        restore([built.packed.path], to, machine=Machine(built.inputs.installation))
        victim = sorted((to / "cache").iterdir())[0]
        for file in victim.iterdir():
            file.unlink()
        victim.rmdir()  # so that there is something to restore
    else:
        to.parent.mkdir()
    before, outside = snapshot(tmp_path), set(os.listdir("/tmp"))
    with pytest.raises(ArtifactError) as error:
        restore([hostile], to, machine=Machine(built.inputs.installation), force=True)
    assert words in str(error.value) and str(hostile) in str(error.value)
    assert snapshot(tmp_path) == before
    assert {name for name in set(os.listdir("/tmp")) - outside if "evil" in name} == set()


def test_the_unchanged_archive_is_accepted_by_the_same_reader(built: building.Built, tmp_path: Path) -> None:
    again = tmp_path / "again.tar.zst"
    again.write_bytes(compress(join(unpack(built.packed.path))))
    assert restore([again], tmp_path / "dir", machine=Machine(built.inputs.installation)).written == len(
        built.plan.kernels
    )


def test_modes_and_owners_are_ours_not_the_archives(built: building.Built, tmp_path: Path) -> None:
    members = unpack(built.packed.path)
    for one in members:
        one.info.mode, one.info.uid, one.info.uname = 0o6777, 1234, "somebody"
    hostile = tmp_path / "modes.tar.zst"
    hostile.write_bytes(compress(join(members)))
    mask = os.umask(0o077)
    try:
        restore([hostile], tmp_path / "dir", machine=Machine(built.inputs.installation))
    finally:
        os.umask(mask)
    for path in (tmp_path / "dir").rglob("*"):
        wanted = 0o755 if path.is_dir() or path.name == "nvcc" else 0o644
        assert path.stat().st_mode & 0o7777 == wanted, path
        assert path.stat().st_uid == os.getuid()


def test_a_fifo_is_refused_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(ArtifactError, match="regular file"):
        read.read_index(tmp_path / "fifo")


@pytest.mark.parametrize("size", [0, 100, 600])
def test_an_honest_change_of_a_file_is_accepted(size: int, built: building.Built, tmp_path: Path) -> None:
    """The corpus is refused for what it changes, not for being changed: an index that agrees is believed."""
    members = unpack(built.packed.path)
    cubin = next(n for n, m in enumerate(members) if m.info.name.endswith(".cubin"))
    path = tmp_path / "honest.tar.zst"
    path.write_bytes(compress(join(replace(members, cubin, b"x" * size, honest=True))))
    restore([path], tmp_path / "dir", machine=Machine(built.inputs.installation))
    assert (tmp_path / "dir" / members[cubin].info.name).read_bytes() == b"x" * size


@pytest.mark.slow
def test_mutated_archives_are_refused_or_restored_right(built: building.Built) -> None:
    """A small run of the fuzzer, with a fixed seed; docs/serving.md has the large run's figures."""
    fuzzer = Path(__file__).with_name("fuzz_archives.py")
    command = [sys.executable, fuzzer, built.packed.path, "300", "1", built.inputs.installation.imported_as]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["ArtifactError"] > 200
