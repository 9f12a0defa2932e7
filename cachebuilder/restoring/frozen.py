"""The frozen nvcc: a POSIX shell script that takes the compiler's place in a serving image (``frozen_nvcc.sh``).

It answers ``--version`` with the text of the compiler that built the kernels: DeepGEMM asks for it even where every
kernel is found. It logs each request to compile, and then answers it by policy.
"""

from __future__ import annotations

import shlex
from pathlib import Path

from cachebuilder.common.files import make_folders, write_atomically
from cachebuilder.errors import RestoreError

#: What to do with a kernel that the cache lacks: ``refuse`` (default), ``compile`` or ``compile-and-warn``.
POLICY_VARIABLE = "CACHEBUILDER_ON_MISS"
#: The file that misses are logged to, one JSON object a line.
LOG_VARIABLE = "CACHEBUILDER_MISS_LOG"
#: The compiler that the compiling policies call.
NVCC_VARIABLE = "CACHEBUILDER_REAL_NVCC"

#: cachebuilder's own folder beside ``cache/``; it looks like a CUDA home that has only nvcc.
FOLDER = "cachebuilder"

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
        f"{FOLDER}/bin/version.txt": (version_text.encode(), 0o644),
        f"{FOLDER}/bin/nvcc": ("".join(lines).encode(), 0o755),
    }


def write(folder: Path, version_text: str, artifact_name: str, fingerprint_digest: str) -> Path:
    """Write the `files` into ``folder``, which is ``DIR/cachebuilder``; returns the script. Raises `RestoreError`."""
    make_folders(folder / "bin")
    for name, (data, mode) in files(version_text, artifact_name, fingerprint_digest).items():
        write_atomically(folder.parent / name, data, RestoreError, mode)
    return folder / "bin" / "nvcc"


def frozen_nvcc(dir: Path) -> Path:
    """The frozen nvcc of a restored DIR."""
    return dir / FOLDER / "bin" / "nvcc"


def is_frozen(nvcc: Path) -> bool:
    """Whether ``nvcc`` is a frozen one, of any folder. The script does the same check with each nvcc on PATH."""
    try:
        with nvcc.open("rb") as file:
            return file.read(256).startswith(_TEMPLATE.read_bytes()[:64])
    except OSError:
        return False


def version_text(dir: Path) -> str | None:
    """The version text of DIR's frozen nvcc; None where there is none yet. Raises `OSError` if it cannot be read."""
    try:
        return (dir / FOLDER / "bin" / "version.txt").read_bytes().decode(errors="replace")
    except FileNotFoundError:
        return None
