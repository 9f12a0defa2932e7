"""A process that serves: the folder to serve from, checked, and the whole environment of the process."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

from cachebuilder.artifact.index import Index
from cachebuilder.artifact.whole import open_file
from cachebuilder.common.cache import own_folder as cache_subfolder
from cachebuilder.common.kept import touch
from cachebuilder.common.locks import lock
from cachebuilder.errors import VerifyError
from cachebuilder.restoring.environment import Engine, variables
from cachebuilder.restoring.folder import RESTORE_AGAIN, RestoredFolder, open_folder
from cachebuilder.restoring.frozen import frozen_nvcc
from cachebuilder.restoring.machine import Compared, Machine, choose
from cachebuilder.restoring.place import Place


def own_folder(artifact: Path) -> Path:
    """The folder in the user's cache folder for these bytes of an artifact: no two artifacts share one."""
    with open_file(artifact) as file:
        return cache_subfolder("restored") / hashlib.file_digest(file, "sha256").hexdigest()[:16]


def open_whole(dir: Path) -> RestoredFolder:
    """The restored folder at ``dir``, with every byte of its entries checked.

    From a cubin that is cut short, the GPU's driver makes an error, a crash or a process that hangs.

    Raises:
        ArtifactError: nothing was restored there, or an index or a manifest in it is damaged.
        VerifyError: an entry is damaged.
    """
    folder = open_folder(dir)
    if damage := folder.damage():
        more = f" and {len(damage) - 1} more" if damage[1:] else ""
        raise VerifyError(f"{folder.path}: damaged: {damage[0]}{more}", hint=RESTORE_AGAIN)
    return folder


def keep_in_use(*folders: Path) -> None:
    """Lock the folders for this process and the program that it becomes, so that `cache prune` leaves them alone."""
    for folder in folders:
        touch(folder)
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        os.set_inheritable(handle, True)  # the lock ends when the program ends
        lock(handle, shared=True)


def require_fit(folder: RestoredFolder, machine: Machine, *, force: bool) -> Compared[str]:
    """Compare the artifacts in a restored folder with the machine, and choose the one that serves.

    A DeepGEMM that is not found beside cachebuilder is not compared: the process may have another Python.

    Raises:
        CompatibilityError: none fits. ``force`` takes the first one.
    """
    nvcc = frozen_nvcc(folder.path)
    compared = []
    for index in folder.indexes:
        differences = machine.differences(index, frozen_nvcc=nvcc)
        if machine.installation is None:
            differences = [one for one in differences if one.field != "deep_gemm"]
        compared.append(Compared(f"{folder.path}: {index.name}", tuple(differences)))
    return choose(compared, force=force, hint="--force runs it all the same; kernels that differ will be missing")


def process_environment(place: Place, indexes: Sequence[Index], engine: Engine) -> dict[str, str]:
    """This process's environment with the variables to serve from ``place``; arguments and errors as of `variables`."""
    serving = variables(place, indexes, engine, os.environ)
    return os.environ | {variable.name: variable.value for variable in serving}
