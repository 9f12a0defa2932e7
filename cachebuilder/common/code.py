"""A digest of this program's own code, for the keys of results that are kept until the code that made them changes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

_PACKAGE = Path(__file__).parents[1]


def code_digest(parts: Iterable[str], package: Path = _PACKAGE) -> str:
    """sha256 over the names and bytes of these files of the package, and of every file in these folders of it."""
    digest = hashlib.sha256()
    for part in sorted(parts):
        for file in sorted(path for path in (package / part, *(package / part).rglob("*")) if path.is_file()):
            if "__pycache__" not in file.parts:
                digest.update(f"{file.relative_to(package)}\0".encode() + file.read_bytes() + b"\0")
    return digest.hexdigest()
