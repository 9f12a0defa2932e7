"""The frozen nvcc: a POSIX shell script that takes the compiler's place in a serving image (``frozen_nvcc.sh``).

It answers ``--version`` with the text of the compiler that built the kernels: DeepGEMM asks for it even where every
kernel is found. It logs each request to compile, and then answers it by policy.
"""

from __future__ import annotations

import os
import shlex
import stat
from pathlib import Path

from cachebuilder.common.files import make_folders, write_atomically
from cachebuilder.common.folders import Folder
from cachebuilder.errors import RestoreError

#: What to do with a kernel that the cache lacks: ``refuse`` (default), ``compile`` or ``compile-and-warn``.
POLICY_VARIABLE = "CACHEBUILDER_ON_MISS"
#: The file that misses are logged to, one JSON object a line.
LOG_VARIABLE = "CACHEBUILDER_MISS_LOG"
#: The compiler that the compiling policies call.
NVCC_VARIABLE = "CACHEBUILDER_REAL_NVCC"

#: cachebuilder's own folder beside ``cache/``; it looks like a CUDA home that has only nvcc.
FOLDER = "cachebuilder"

#: In FOLDER: the working folders of restores, and the log of misses unless a variable names another file.
WORKING_FOLDERS, LOG_NAME = "tmp", "misses.jsonl"
#: In FOLDER/bin.
NVCC, VERSION = "nvcc", "version.txt"
#: An index has at most 4,096 characters of it.
_MAX_VERSION_BYTES = 16 << 10

_TEMPLATE = Path(__file__).with_name("frozen_nvcc.sh")


def files(version_text: str, artifact_name: str, fingerprint_digest: str) -> dict[str, tuple[bytes, int]]:
    """The script and its version text: each file's path below DIR → its bytes and its mode.

    Args:
        version_text: everything that ``nvcc --version`` printed.
        artifact_name: named in messages and in the log, as is the digest.
    """
    texts = {"@VERSION_TEXT@": version_text, "@ARTIFACT@": artifact_name, "@FINGERPRINT@": fingerprint_digest}
    lines = []
    for line in _TEMPLATE.read_text().splitlines(keepends=True):
        name, _, mark = line.rstrip("\n").partition("=")
        lines.append(f"{name}={shlex.quote(texts[mark])}\n" if mark in texts else line)
    return {
        f"{FOLDER}/bin/{VERSION}": (version_text.encode(), 0o644),
        f"{FOLDER}/bin/{NVCC}": ("".join(lines).encode(), 0o755),
    }


def write(folder: Path, version_text: str, artifact_name: str, fingerprint_digest: str) -> Path:
    """Write the `files` into ``folder``, which is ``DIR/cachebuilder``; returns the script. Raises `RestoreError`."""
    make_folders(folder / "bin")
    for name, (data, mode) in files(version_text, artifact_name, fingerprint_digest).items():
        write_atomically(folder.parent / name, data, RestoreError, mode)
    return folder / "bin" / NVCC


def frozen_nvcc(dir: Path) -> Path:
    """The frozen nvcc of a restored DIR."""
    return dir / FOLDER / "bin" / NVCC


def dir_of(nvcc: Path) -> Path | None:
    """The restored DIR that an nvcc is in, by its path; None where it is in none."""
    return nvcc.parents[2] if nvcc.parts[-3:] == (FOLDER, "bin", NVCC) else None


def is_frozen(nvcc: Path) -> bool:
    """Whether ``nvcc`` is a frozen one, of any folder. The script does the same check with each nvcc on PATH."""
    try:
        handle = os.open(nvcc, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a FIFO must not make it wait
        with os.fdopen(handle, "rb") as file:
            regular = stat.S_ISREG(os.fstat(handle).st_mode)
            return regular and file.read(256).startswith(_TEMPLATE.read_bytes()[:64])
    except OSError:
        return False


def version_text(dir: Path) -> str | None:
    """The version text of DIR's frozen nvcc; None where there is none yet. Raises `OSError` if it cannot be read."""
    try:
        with Folder.at(dir) as folder, folder.open(FOLDER) as own, own.open("bin") as bin:
            return version_text_in(bin)
    except FileNotFoundError:
        return None


def version_text_in(bin: Folder) -> str | None:
    """The same, from the folder ``DIR/cachebuilder/bin``."""
    try:
        return bin.read(VERSION, _MAX_VERSION_BYTES).decode(errors="replace")
    except FileNotFoundError:
        return None
