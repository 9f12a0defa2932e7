"""What a build used, for its record and its provenance: the installed Python packages, and files such as compilers."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

from cachebuilder.common.code import code_digest
from cachebuilder.common.records import Line, Record, Sha256
from cachebuilder.common.version import __version__

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
#: What a build needs beyond cachebuilder's own requirements.
_BUILD_PACKAGES = ("torch", "sgl-deep-gemm", "pyelftools", "cuda-toolkit", "nvidia-cuda-nvcc")
_CORE_PACKAGES = ("click", "cryptography", "nvidia-ml-py", "pydantic", "rich", "ruamel.yaml", "zstandard")


class Material(Record):
    """One package or file that a build used.

    Attributes:
        uri: a package URL; None for a file.
        sha256: of the file, or of the archive that the package was installed from, where the installer recorded it.
        installed: sha256 of the package's RECORD, which holds the hash of each installed file; of cachebuilder, over
            its own code.
    """

    name: Line
    version: Line
    uri: Line | None = None
    sha256: Sha256 | None = None
    installed: Sha256 | None = None


def own() -> Material:
    """This cachebuilder."""
    package = Path(__file__).parents[1]
    folders = [path.name for path in package.iterdir() if path.is_dir() and path.name != "__pycache__"]
    return Material(
        name="cachebuilder", version=__version__, uri=_uri("cachebuilder", __version__), installed=code_digest(folders)
    )


def tool(path: Path, name: str, version: str) -> Material:
    """A program. Its sha256 is left out where the file cannot be read."""
    try:
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        sha256 = None
    return Material(name=name, version=version, sha256=sha256)


def installed() -> tuple[Material, ...]:
    """Every installed package that a build uses, with all that these packages require, by name."""
    materials: dict[str, Material] = {}
    waiting = [*_BUILD_PACKAGES, *_CORE_PACKAGES]
    while waiting:
        name = waiting.pop()
        key = re.sub(r"[-_.]+", "-", name).lower()
        if key in materials:
            continue
        try:
            distribution = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue
        materials[key] = _package(key, distribution)
        waiting += _requirements(distribution.requires or ())
    return tuple(materials[key] for key in sorted(materials))


def _requirements(requirements: Iterable[str]) -> list[str]:
    """The names in requirements, without those of extras."""
    return [match[0] for text in requirements if "extra ==" not in text and (match := _NAME.match(text))]


def _package(name: str, distribution: metadata.Distribution) -> Material:
    record = distribution.read_text("RECORD")
    return Material(
        name=name,
        version=distribution.version,
        uri=_uri(name, distribution.version),
        sha256=_archive_digest(distribution),
        installed=hashlib.sha256(record.encode()).hexdigest() if record else None,
    )


def _archive_digest(distribution: metadata.Distribution) -> str | None:
    """The digest in ``direct_url.json`` (PEP 610), which pip writes for a package that was installed from a file."""
    try:
        digest = json.loads(distribution.read_text("direct_url.json") or "")["archive_info"]["hashes"]["sha256"]
    except (ValueError, KeyError, TypeError):
        return None
    return digest if isinstance(digest, str) and re.fullmatch(r"[0-9a-f]{64}", digest) else None


def _uri(name: str, version: str) -> str:
    return f"pkg:pypi/{name}@{version}"
