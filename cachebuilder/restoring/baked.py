"""Caches of an engine's other compilers in a restored folder, and what must agree for the engine to take them.

What their keys hold, as read in the sources:

- Inductor and AOTAutograd: the GPU's name and properties, the versions of torch, CUDA and Triton, the content of
  torch's Python files, and Inductor's settings, with ``CXX`` among them (torch 2.11 ``_inductor/codecache.py``,
  ``_inductor/config.py``).
- vLLM: most variables of its own, its configuration, and the paths and the content of the files that it traced (vLLM
  0.25.0 ``envs.py: compile_factors``, ``compilation/backends.py``, ``compilation/caching.py``). What was compiled ahead
  of time wants the same Python, to the patch (torch 2.11 ``_dynamo/package.py: SystemInfo``), and the compiled graphs
  are named by absolute paths.
- Triton: its own version and code, ptxas's version and the kernel (Triton 3.6 ``compiler/compiler.py``,
  ``runtime/cache.py``, ``runtime/build.py``).
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

from cachebuilder.common import records
from cachebuilder.common.records import Line, Record
from cachebuilder.cuda import nvml
from cachebuilder.deepgemm.installation import package_folder
from cachebuilder.errors import ArtifactError, CompatibilityError

#: The folder of all these caches in a restored folder, and the record in it.
FOLDER, RECORD = "baked", "baked.json"
#: Each cache's folder → the variable that names it to its compiler, and where that is read.
CACHES = {
    "triton": ("TRITON_CACHE_DIR", "triton/knobs.py, 3.6"),
    "inductor": ("TORCHINDUCTOR_CACHE_DIR", "torch/_inductor/runtime/cache_dir_utils.py, 2.11"),
    "vllm": ("VLLM_CACHE_ROOT", "vllm/envs.py, 0.25.0"),
    "humming": ("HUMMING_CACHE_DIR", "humming/utils/jit.py, 0.1.10"),
    "tilelang": ("TILELANG_CACHE_DIR", "tilelang/env.py, 0.1.9"),
}
#: An empty folder beside them. Triton 3.8's keys hold the folder in which it looks for libcuda (``runtime/build.py``,
#: ``backends/nvidia/driver.py``); its linker goes on to the usual ones.
LIBCUDA = "libcuda"
#: The packages whose versions or paths are in keys.
_PACKAGES = ("torch", "triton", "vllm")
#: Variables that keys hold beside vLLM's own: by themselves, or since they lead to paths that vLLM hashes.
_VARIABLES = ("CXX", "HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "CUDA_HOME")
_SETTINGS = ("TORCHINDUCTOR_",)
_MAX_BYTES = 1 << 20


class Baked(Record):
    """What the keys of the baked caches depend on.

    Attributes:
        command: what was run to fill them.
        gpu: its name as CUDA gives it.
        python: its version, to the patch.
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


def record(dir: Path, command: str, gpu: str, environment: Mapping[str, str]) -> Baked:
    """What the caches that were filled in ``dir`` depend on: this Python's packages and the process's variables."""
    names = sorted(
        {*_VARIABLES, *_hashed_by_vllm(dir), *_settings(environment)} - {name for name, _ in CACHES.values()}
    )
    return Baked(
        command=command,
        gpu=gpu,
        python=platform.python_version(),
        dir=str(dir.absolute()),
        packages=_versions(),
        folders=_folders(),
        names=names,
        environment=_values(names, environment),
    )


def read(dir: Path) -> Baked | None:
    """The record of what was baked in a restored folder; None where nothing was.

    Raises:
        ArtifactError: the record is damaged.
    """
    path = dir / FOLDER / RECORD
    try:
        with path.open("rb") as file:
            return records.read(Baked, file.read(_MAX_BYTES))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be read: {error.strerror}") from error
    except records.RecordError as error:
        raise ArtifactError(f"{path}: {error}", hint="bake again with cachebuilder bake") from None


def variables(dir: Path) -> dict[str, tuple[str, str]]:
    """For each baked cache: the variable that names it → the folder, and why."""
    root = dir.absolute() / FOLDER
    if not (root / RECORD).is_file():
        return {}
    folders = {
        name: (str(root / folder), f"baked: what this compiler would make at start ({source})")
        for folder, (name, source) in CACHES.items()
        if (root / folder).is_dir()
    }
    if (root / LIBCUDA).is_dir():
        folders["TRITON_LIBCUDA_PATH"] = str(root / LIBCUDA), "as it was baked: a key of Triton's holds it (3.8)"
    return folders


def differences(baked: Baked, dir: Path, environment: Mapping[str, str]) -> list[tuple[str, str, str]]:
    """What differs here: its name, what is wanted and what was found.

    A GPU that is not visible and a package that is not installed beside cachebuilder are not compared.
    """
    pairs = [("Python", baked.python, platform.python_version()), ("folder", baked.dir, str(dir.absolute()))]
    if (gpu := nvml.first_gpu()) is not None:
        pairs.append(("GPU", baked.gpu, gpu.name))
    here, folders = _versions(), _folders()
    pairs += [(name, baked.packages[name], here[name]) for name in baked.packages if name in here]
    pairs += [(f"{name}'s folder", baked.folders[name], folders[name]) for name in baked.folders if name in folders]
    names = sorted({*baked.names, *_settings(environment)})
    now = _values(names, environment)
    pairs += [(name, baked.environment.get(name, "not set"), now.get(name, "not set")) for name in names]
    return [(name, wanted, value) for name, wanted, value in pairs if wanted != value]


def require_fit(dir: Path, environment: Mapping[str, str]) -> None:
    """Compare what was baked in a restored folder, if anything was, with this machine and a process's variables.

    Raises:
        CompatibilityError: something differs, so that the engine would compile again.
        ArtifactError: the record is damaged.
    """
    baked = read(dir)
    if baked is None or not (different := differences(baked, dir, environment)):
        return
    lines = "\n".join(f"{name}: wanted {wanted}, found {value}" for name, wanted, value in different)
    raise CompatibilityError(
        f"{dir / FOLDER}: the engine would compile again what was baked here\n{lines}",
        hint="make these equal, bake again with cachebuilder bake, or remove the folder",
    )


def _hashed_by_vllm(dir: Path) -> set[str]:
    """The names of the variables that vLLM wrote down as parts of its keys."""
    files = (dir / FOLDER / "vllm" / "torch_compile_cache").rglob("cache_key_factors.json")
    return {name for file in files for name in json.loads(file.read_text())["env"]}


def _settings(environment: Mapping[str, str]) -> set[str]:
    return {name for name in environment if name.startswith(_SETTINGS)} - {name for name, _ in CACHES.values()}


def _values(names: list[str], environment: Mapping[str, str]) -> dict[str, str]:
    values = {name: environment[name] for name in names if name in environment}
    secret = ("KEY", "TOKEN", "SECRET", "PASSWORD")
    return {
        name: f"sha256:{hashlib.sha256(value.encode()).hexdigest()}" if name.endswith(secret) else value
        for name, value in values.items()
    }


def _versions() -> dict[str, str]:
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _folders() -> dict[str, str]:
    folders = {name: package_folder(name) for name in _PACKAGES}
    return {name: str(folder) for name, folder in folders.items() if folder is not None}
