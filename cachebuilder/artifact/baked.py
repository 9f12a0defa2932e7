"""What an artifact holds of the caches of an engine's other compilers: their files, and what their keys depend on.

The caches are trees of files with long paths, which a ustar header cannot hold. So a member is named by its content,
and the index says which paths have it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import accumulate
from typing import Annotated

from pydantic import FailFast, Field

from cachebuilder.common.records import Count, Line, Record, Sha256

#: The folder of these members in an artifact: ``baked-files/SHA256``.
MEMBERS = "baked-files"
#: More than any engine makes: vLLM with torch.compile and CUDA graphs makes 600 files, the largest of 10 MB.
MAX_FILES, MAX_FILE_BYTES = 20_000, 256 << 20
_MAX_PATH, _MAX_DEPTH = 1024, 24
_NAME = re.compile(r"[A-Za-z0-9._+=@-]{1,255}")


class BakedRecord(Record):
    """What the keys of the baked caches depend on.

    Attributes:
        command: what was run to fill them.
        gpu: its name as CUDA gives it.
        python: its version; to the patch only where vLLM kept graphs compiled ahead of time, whose keys hold that.
        dir: the restored folder: vLLM's caches hold absolute paths.
        packages: name → version.
        folders: name → the folder that it is imported from.
        names: variables that keys hold, set or not.
        environment: those that were set, with their values; of a secret, its SHA-256.
    """

    command: Line
    gpu: Line
    python: Line
    dir: Line
    packages: dict[Line, Line]
    folders: dict[Line, Line]
    names: list[Line]
    environment: dict[Line, Line]


class BakedFile(Record):
    """One file of a cache.

    Attributes:
        path: below ``baked/`` in a restored folder; its first part is the cache's name.
        size: in bytes.
        modified: when it was written, in whole seconds of Unix time: ninja builds again what is newer than in its log.
        executable: whether the engine runs it.
    """

    path: str
    size: Count
    sha256: Sha256
    modified: Count
    executable: bool = False


class BakedPart(Record):
    """The caches of an engine's other compilers, and what they depend on.

    Attributes:
        files: by path.
    """

    record: BakedRecord
    files: Annotated[tuple[BakedFile, ...], Field(max_length=MAX_FILES), FailFast()]

    def members(self) -> Iterator[tuple[str, int]]:
        """The members in the order of the tar: each one's sha256, once, and its size."""
        # By suffix, then by path: like stands next to like, which is what the compressor needs.
        in_order = sorted(self.files, key=lambda file: (file.path.rpartition(".")[2], file.path))
        yield from {file.sha256: file.size for file in in_order}.items()


def problem(part: BakedPart) -> str | None:
    """What is wrong with the paths and the sizes of a part that was read; None where nothing is."""
    seen: dict[str, str] = {}
    folders: set[str] = set()
    sizes: dict[str, int] = {}
    for file in part.files:
        parts = file.path.split("/")
        plain = all(_NAME.fullmatch(name) and name not in (".", "..") for name in parts)
        if not plain or not 2 <= len(parts) <= _MAX_DEPTH or len(file.path) > _MAX_PATH:
            return f"baked.files: wanted paths below a cache's folder, found {file.path[:200]!r}"
        if other := seen.get(key := file.path.casefold()):
            return f"baked.files: found {file.path} beside {other}"
        seen[key] = file.path
        folders |= {folder.casefold() for folder in accumulate(parts[:-1], "{}/{}".format)}
        if file.size > MAX_FILE_BYTES:
            return f"baked.files: {file.path}: wanted at most {MAX_FILE_BYTES} bytes, found {file.size}"
        if sizes.setdefault(file.sha256, file.size) != file.size:
            return f"baked.files: {file.path}: wanted one size for sha256 {file.sha256}, found two"
    if clash := folders & seen.keys():
        return f"baked.files: found {seen[min(clash)]} as a file and as a folder"
    return None
