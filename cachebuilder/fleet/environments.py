"""The Python of each engine of a fleet: this one, one that exists, or one that uv makes from a lock."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import cachebuilder
from cachebuilder.common.cache import own_folder
from cachebuilder.common.kept import touch
from cachebuilder.common.locks import lock
from cachebuilder.errors import InstallationError, ManifestError
from cachebuilder.fleet.schema import Engine


def python_of(name: str, engine: Engine, folder: Path, *, is_here: bool, notice: Callable[[str], object]) -> str:
    """The interpreter for an engine's jobs.

    Args:
        folder: what relative paths of the fleet begin at.
        is_here: this process runs in the engine's environment already.
        notice: called with a line before an environment is made.

    Raises:
        ManifestError: the environment is an image, and this is not it.
        InstallationError: there is no such interpreter, or uv cannot make the environment.
    """
    if is_here:
        return sys.executable
    if engine.image is not None:
        raise ManifestError(
            f"engines.{name}: wanted an environment on this machine, found the image {engine.image}",
            hint=f"run this command in that image, with --engine {name}; or on Ray, with nodes that have this resource",
        )
    if engine.lock is not None:
        return _made_by_uv(folder / engine.lock, notice)
    if engine.python is not None:
        path = Path(folder, engine.python)
        if not path.exists():
            raise InstallationError(f"engines.{name}.python: wanted an interpreter, found no {path}")
        return str(path)
    return sys.executable


def package_path() -> str:
    """A folder that holds this package and nothing else, for ``PYTHONPATH`` in another environment."""
    source = Path(cachebuilder.__file__).parent
    name = hashlib.sha256(str(source).encode()).hexdigest()[:16]
    folder = own_folder("packages", name)
    link = folder / "cachebuilder"
    if not link.is_symlink() or link.readlink() != source:
        link.unlink(missing_ok=True)
        link.symlink_to(source)
    return str(folder)


def _made_by_uv(lock_file: Path, notice: Callable[[str], object]) -> str:
    """The interpreter of the environment with exactly the packages of ``lock``; kept in the user's cache folder."""
    uv = shutil.which("uv")
    if uv is None:
        raise InstallationError(
            f"wanted uv, which makes the environment of {lock_file}, found none", hint="pip install uv"
        )
    try:
        data = lock_file.read_bytes()
    except OSError as error:
        raise InstallationError(f"{lock_file}: cannot be read: {error.strerror}") from None
    facts = data + f"\0{sys.version_info[:2]}".encode()
    folder = own_folder("engines") / hashlib.sha256(facts).hexdigest()[:32]
    python, finished = folder / "bin/python", folder / "finished"
    with open(own_folder("engines") / f"{folder.name}.lock", "w") as held:
        lock(held.fileno(), wait=True)  # several builders of one machine want the same environment
        if not finished.exists():
            notice(f"environment {lock_file}: uv installs it")
            version = f"{sys.version_info[0]}.{sys.version_info[1]}"
            _run([uv, "venv", "--quiet", "--clear", "--python", version, str(folder)], lock_file)
            _run([uv, "pip", "sync", "--quiet", "--require-hashes", "--python", str(python), str(lock_file)], lock_file)
            finished.touch()
        touch(folder)
    return str(python)


def _run(command: list[str], lock_file: Path) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise InstallationError(f"{lock_file}: uv could not make the environment:\n{done.stderr.strip()}")
