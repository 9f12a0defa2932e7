"""Pushes and pulls that several test files share."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import zstandard

from cachebuilder.restoring.machine import Machine
from cachebuilder.ship import fetch, locations
from cachebuilder.ship.download import Target
from cachebuilder.ship.pull import Check, Puller
from cachebuilder.ship.push import Pushed, push
from cachebuilder.ship.retry import Retries
from cachebuilder.ship.sync import Synced, SyncedFolder
from tests.archives import compress, edit_index, join, unpack

FEW = Retries(2, first_wait=0.01)
ONE = ("linux/amd64",)


def for_another(artifact: Path, name: str, gpu: str, **fingerprint: Any) -> Path:
    """A valid artifact for another machine."""

    def change(index: dict[str, Any]) -> None:
        index["name"] = name
        index["recorded"]["gpu"] = gpu
        index["fingerprint"] |= fingerprint

    path = artifact.with_name(f"{name}.tar.zst")
    path.write_bytes(compress(join(edit_index(unpack(artifact), change))))
    return path


def into(folder: Path) -> Callable[[str], Target]:
    """Write what is fetched into a folder, under its own name."""
    return lambda name: Target.at(folder / name)


def push_to(host: str, name: str, *artifacts: Path, tag: str = "v1") -> Pushed:
    return push(locations.parse(f"oci://{host}/{name}:{tag}"), artifacts, ONE, FEW)


def pull_from(location: str, folder: Path, check: Check | None = None) -> Path:
    puller = Puller(locations.parse(location), FEW)
    return puller.fetch(puller.look_up()[0], into(folder), check)


def sync_file(folder: SyncedFolder, artifact: Path) -> Synced:
    return folder.sync(lambda: fetch.look_up(str(artifact), Machine(None), FEW))


def apply(layers: list[bytes], to: Path) -> None:
    """Unpack layers one over the other, as a container runtime does; they only add files."""
    for layer in layers:
        data = zstandard.ZstdDecompressor().decompressobj().decompress(layer)
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            tar.extraction_filter = getattr(tarfile, "tar_filter", None)  # Python before 3.11.4 has no filters
            tar.extractall(to)
