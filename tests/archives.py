"""Artifacts taken apart and put together again, honestly or not."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import zstandard

from cachebuilder.artifact.index import Fingerprint


@dataclass
class Member:
    """A tar member: its header's fields, and its bytes."""

    info: tarfile.TarInfo
    data: bytes

    def block(self) -> bytes:
        header = self.info.tobuf(tarfile.USTAR_FORMAT)
        return header + self.data + bytes(-len(self.data) % 512)


def member(name: str, data: bytes = b"", kind: bytes = tarfile.REGTYPE, **fields: Any) -> Member:
    info = tarfile.TarInfo(name)
    info.type, info.size, info.mode = kind, len(data), 0o644
    for field, value in fields.items():
        setattr(info, field, value)
    return Member(info, data)


def unpack(artifact: Path) -> list[Member]:
    """The members of an artifact of our own making."""
    with tarfile.open(fileobj=io.BytesIO(tar_of(artifact))) as tar:
        return [Member(info, tar.extractfile(info).read()) for info in tar]  # type: ignore[union-attr]


def tar_of(artifact: Path) -> bytes:
    return zstandard.ZstdDecompressor().decompress(artifact.read_bytes())


def join(members: list[Member]) -> bytes:
    """The tar of members."""
    tar = b"".join(m.block() for m in members) + bytes(1024)
    return tar + bytes(-len(tar) % 10240)


def compress(tar: bytes, **parameters: Any) -> bytes:
    given = zstandard.ZstdCompressionParameters.from_level(3, write_checksum=True, **parameters)
    return zstandard.ZstdCompressor(compression_params=given).compress(tar)


def edit_index(
    members: list[Member], change: Callable[[dict[str, Any]], object], redigest: bool = True
) -> list[Member]:
    """The same with another index; its digest right, if wanted."""
    index = json.loads(members[0].data)
    change(index)
    if redigest:
        with contextlib.suppress(KeyError, ValueError):  # an index that holds no fingerprint
            index["fingerprint_digest"] = Fingerprint.model_validate_json(json.dumps(index["fingerprint"])).digest()
    return [member("artifact.json", json.dumps(index).encode()), *members[1:]]


def replace(members: list[Member], position: int, data: bytes, honest: bool = False) -> list[Member]:
    """The same with other bytes in one member; ``honest``: the index says so."""
    old = members[position]
    changed = [*members[:position], member(old.info.name, data), *members[position + 1 :]]
    if not honest:
        return changed
    _, entry, file = old.info.name.split("/")

    def tell(index: dict[str, Any]) -> None:
        for item in index["entries"]:
            for one in item["files"]:
                if (item["name"], one["name"]) == (entry, file):
                    one["size"], one["sha256"] = len(data), hashlib.sha256(data).hexdigest()

    return edit_index(changed, tell)


def snapshot(folder: Path) -> dict[str, tuple[int, bytes | str]]:
    """All below a folder: names, modes, bytes, link targets."""
    found: dict[str, tuple[int, bytes | str]] = {}
    for path in sorted(folder.rglob("*")):
        mode = path.lstat().st_mode
        content: bytes | str = (
            str(path.readlink()) if path.is_symlink() else path.read_bytes() if path.is_file() else b""
        )
        found[str(path.relative_to(folder))] = (mode, content)
    return found
