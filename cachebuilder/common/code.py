"""A digest of this program's own code, for the keys of results that are kept until the code that made them changes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

_PACKAGE = Path(__file__).parents[1]


def code_digest(folders: Iterable[str], package: Path = _PACKAGE) -> str:
    """sha256 over the names and bytes of every file of code and data in these folders of the package."""
    digest = hashlib.sha256()
    for folder in sorted(folders):
        for file in sorted(path for path in (package / folder).rglob("*") if path.is_file()):
            if "__pycache__" not in file.parts:
                digest.update(f"{file.relative_to(package)}\0".encode() + file.read_bytes() + b"\0")
    return digest.hexdigest()
