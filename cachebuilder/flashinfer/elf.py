"""What a module's ELF file says: the version of glibc that it needs."""

from __future__ import annotations

import io
from collections.abc import Iterable
from typing import Any

_PREFIX = "GLIBC_2."


def newest_glibc(modules: Iterable[bytes]) -> str:
    """The newest version of glibc's functions that the modules call, as ``2.34``; ``2.0`` where there is none."""
    from elftools.elf.elffile import ELFFile

    newest = 0
    for data in modules:
        section: Any = ELFFile(io.BytesIO(data)).get_section_by_name(".gnu.version_r")
        names = [need.name for _, needs in (section.iter_versions() if section else ()) for need in needs]
        minors = [name.removeprefix(_PREFIX) for name in names if name.startswith(_PREFIX)]
        newest = max([newest, *(int(minor.partition(".")[0]) for minor in minors)])
    return f"2.{newest}"
