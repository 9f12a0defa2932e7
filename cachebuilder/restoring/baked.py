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
import os
import platform
import stat
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

from cachebuilder.artifact.baked import BakedFile, BakedPart, BakedRecord, problem
from cachebuilder.artifact.whole import open_file
from cachebuilder.common import records
from cachebuilder.cuda import nvml
from cachebuilder.deepgemm.installation import package_folder
from cachebuilder.errors import ArtifactError, CompatibilityError, RestoreError

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
#: What a compiler leaves while it works.
_UNFINISHED = (".lock", ".tmp")
#: A folder beside them without any library. Triton 3.8's keys hold the folder in which it looks for libcuda
#: (``runtime/build.py``, ``backends/nvidia/driver.py``); its linker goes on to the usual ones.
LIBCUDA = "libcuda"
#: The packages whose versions or paths are in keys.
_PACKAGES = ("torch", "triton", "vllm")
#: Variables that keys hold beside vLLM's own: by themselves, or since they lead to paths that vLLM hashes.
_VARIABLES = ("CXX", "HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "CUDA_HOME")
_SETTINGS = ("TORCHINDUCTOR_",)
_MAX_BYTES = 1 << 20


def record(dir: Path, command: str, gpu: str, environment: Mapping[str, str]) -> BakedRecord:
    """What the caches that were filled in ``dir`` depend on: this Python's packages and the process's variables."""
    names = sorted(
        {*_VARIABLES, *_hashed_by_vllm(dir), *_settings(environment)} - {name for name, _ in CACHES.values()}
    )
    return BakedRecord(
        command=command,
        gpu=gpu,
        python=_python(to_the_patch=_has_graphs_compiled_ahead(dir)),
        dir=str(dir.absolute()),
        packages=_versions(),
        folders=_folders(),
        names=names,
        environment=_values(names, environment),
    )


def read(dir: Path) -> BakedRecord | None:
    """The record of what was baked in a restored folder; None where nothing was.

    Raises:
        ArtifactError: the record is damaged.
    """
    path = dir / FOLDER / RECORD
    try:
        with path.open("rb") as file:
            return records.read(BakedRecord, file.read(_MAX_BYTES))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be read: {error.strerror}") from error
    except records.RecordError as error:
        raise ArtifactError(f"{path}: {error}", hint="bake again with cachebuilder bake") from None


def collect(dir: Path) -> BakedPart:
    """What was baked in a restored folder, for an artifact.

    Raises:
        ArtifactError: nothing was baked there, or a file cannot be part of an artifact.
    """
    baked, root = read(dir), dir / FOLDER
    if baked is None:
        raise ArtifactError(f"{dir}: wanted a folder with {FOLDER}/{RECORD}, found none", hint="cachebuilder bake DIR")
    files = []
    for folder, _, names in os.walk(root):
        for path in (Path(folder, name) for name in names):
            if path == root / RECORD or path.suffix in _UNFINISHED:
                continue
            if path.is_symlink():
                raise ArtifactError(f"{path}: wanted regular files, found a link")
            with open_file(path) as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
                status = os.fstat(file.fileno())
            files.append(
                BakedFile(
                    path=path.relative_to(root).as_posix(),
                    size=status.st_size,
                    sha256=digest,
                    modified=int(status.st_mtime),
                    executable=bool(status.st_mode & stat.S_IXUSR),
                )
            )
    part = BakedPart(record=baked, files=tuple(sorted(files, key=lambda file: file.path)))
    if reason := problem(part):
        raise ArtifactError(f"{root}: {reason}")
    return part


def is_baked(dir: Path) -> bool:
    """Whether something was baked in a restored folder."""
    return (dir / FOLDER / RECORD).is_file()


def variables(dir: Path) -> dict[str, tuple[str, str]]:
    """For each baked cache: the variable that names it → the folder, and why."""
    root = dir.absolute() / FOLDER
    folders = {
        name: (str(root / folder), f"baked: what this compiler would make at start ({source})")
        for folder, (name, source) in CACHES.items()
        if (root / folder).is_dir()
    }
    if (root / LIBCUDA).is_dir():
        folders["TRITON_LIBCUDA_PATH"] = str(root / LIBCUDA), "as it was baked: a key of Triton's holds it (3.8)"
    return folders


def differences(
    baked: BakedRecord, dir: Path, environment: Mapping[str, str] | None = None
) -> list[tuple[str, str, str]]:
    """What differs here: its name, what is wanted and what was found.

    A GPU that is not visible is not compared, nor is a package that is not installed beside cachebuilder. Where none of
    the packages is, the engine has another Python than cachebuilder, and Python is not compared either.

    Args:
        environment: the serving process's variables; None where they are unknown, and not compared.
    """
    pairs = [("folder", baked.dir, str(dir.absolute()))]
    if (gpu := nvml.first_gpu()) is not None:
        pairs.append(("GPU", baked.gpu, gpu.name))
    here, folders = _versions(), _folders()
    if here.keys() & baked.packages.keys():
        pairs.append(("Python", baked.python, _python(to_the_patch=baked.python.count(".") > 1)))
    pairs += [(name, baked.packages[name], here[name]) for name in baked.packages if name in here]
    pairs += [(f"{name}'s folder", baked.folders[name], folders[name]) for name in baked.folders if name in folders]
    names = sorted({*baked.names, *_settings(environment)}) if environment is not None else []
    now = _values(names, environment or {})
    pairs += [(name, baked.environment.get(name, "not set"), now.get(name, "not set")) for name in names]
    return [(name, wanted, value) for name, wanted, value in pairs if wanted != value]


def require_fit(dir: Path, environment: Mapping[str, str]) -> None:
    """Compare what was baked in a restored folder, if anything was, with this machine and a process's variables.

    Raises:
        CompatibilityError: something differs, so that the engine would compile again.
        RestoreError: this user cannot write into a cache, so that the engine would end.
        ArtifactError: the record is damaged.
    """
    baked = read(dir)
    if baked is None:
        return
    if unwritable := next((folder for folder in _folders_of_caches(dir) if not os.access(folder, os.W_OK)), None):
        raise RestoreError(
            f"{unwritable}: wanted a folder that the engine can write into, found one that user {os.geteuid()} cannot",
            hint="Inductor writes again what it reads (torch/_inductor/codecache.py, 2.11): restore as the user that "
            "serves, into a folder that it can write to, or serve with --no-baked",
        )
    if not (different := differences(baked, dir, environment)):
        return
    lines = "\n".join(f"{name}: wanted {wanted}, found {value}" for name, wanted, value in different)
    raise CompatibilityError(
        f"{dir / FOLDER}: the engine would compile again what was baked here\n{lines}",
        hint="make these equal, bake again with cachebuilder bake, or serve with --no-baked",
    )


def _folders_of_caches(dir: Path) -> list[Path]:
    root = dir / FOLDER
    return [root / folder for folder in (*CACHES, LIBCUDA) if (root / folder).is_dir()]


def _hashed_by_vllm(dir: Path) -> set[str]:
    """The names of the variables that vLLM wrote down as parts of its keys."""
    files = (dir / FOLDER / "vllm" / "torch_compile_cache").rglob("cache_key_factors.json")
    return {name for file in files for name in json.loads(file.read_text())["env"]}


def _has_graphs_compiled_ahead(dir: Path) -> bool:
    """Whether vLLM kept graphs that torch compiled ahead of time, which it does not where it runs eager.

    The folder is that of vLLM 0.25.0 ``compilation/decorators.py``.
    """
    graphs = dir / FOLDER / "vllm" / "torch_compile_cache" / "torch_aot_compile"
    return graphs.is_dir() and any(graphs.iterdir())


def _python(to_the_patch: bool) -> str:
    """Python's version, as keys hold it: like 3.12.3, or like 3.12, which names the ABI of compiled modules."""
    version = platform.python_version()
    return version if to_the_patch else ".".join(version.split(".")[:2])


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
