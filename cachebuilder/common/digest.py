"""Digests of files that another program is made from, such as headers."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path


def digest_tree(root: Path) -> str:
    """sha256 over the names and bytes of all files below ``root``."""
    return digest_files(root, (file for file in root.rglob("*") if file.is_file()))


def digest_files(root: Path, files: Iterable[Path]) -> str:
    """sha256 over the names below ``root`` and the bytes of ``files``, in any order."""
    digest = hashlib.sha256()
    for file in sorted(files):
        digest.update(f"{file.relative_to(root).as_posix()}\0".encode())
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()
