"""Fill the caches of an engine's other compilers: Triton, torch.compile and vLLM's own, on a virtual GPU.

The engine runs as it will serve: from the restored folder, with the same variables, on a virtual GPU that looks like
the card wherever a key looks. So the keys are those that the engine will have on the card.
"""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cachebuilder.artifact.baked import BakedRecord
from cachebuilder.authoring.observe import engines, program
from cachebuilder.authoring.observe.command import Change
from cachebuilder.common.cache import scratch_folder
from cachebuilder.common.progress import Progress, no_progress
from cachebuilder.cuda.gpus import Gpu
from cachebuilder.errors import ArtifactError
from cachebuilder.restoring import baked


@dataclass(frozen=True)
class Bake:
    """Caches that were filled.

    Attributes:
        sizes: each cache's folder → its files and their bytes.
        changes: what was changed in the user's command and environment.
    """

    run: program.Run
    record: BakedRecord
    sizes: Mapping[str, tuple[int, int]]
    changes: tuple[Change, ...]


def bake(
    dir: Path,
    command: Sequence[str],
    gpu: Gpu,
    environment: Mapping[str, str],
    progress: Progress = no_progress,
) -> Bake:
    """Run ``command`` on a virtual ``gpu`` from the restored folder ``dir``, and keep there what it compiles.

    A bake adds to what was baked in ``dir`` before.

    Args:
        command: the serve command, with the options that it will serve with; or a program that ends.
        environment: the variables of the serving process, as `cachebuilder env` prints them, over the user's.
        progress: the steps are "start" and "requests".

    Raises:
        RecordingError: the command cannot be run, fails, or wants several GPUs.
        PlanError: it made a CUDA call that the virtual GPU does not answer.
        InstallationError: something is missing on this machine.
        ArtifactError: the record cannot be written.
        OSError: nothing can be written in ``dir``.
    """
    launch = engines.launch_to_bake(command, environment)
    caches = {name: str(dir.absolute() / baked.FOLDER / folder) for folder, (name, _) in baked.CACHES.items()}
    libcuda = dir.absolute() / baked.FOLDER / baked.LIBCUDA
    libcuda.mkdir(parents=True, exist_ok=True)
    (libcuda / ".keep").touch()  # an artifact holds files only
    serving = dict(environment) | caches | {"TRITON_LIBCUDA_PATH": str(libcuda)}
    with scratch_folder() as scratch:
        run = program.run(launch, program.Setting(gpu, None, scratch, serving), progress)
    root = dir / baked.FOLDER
    _forget_what_was_timed(root)
    record = baked.record(dir, shlex.join(command), f"NVIDIA {gpu.name}", serving)
    record.write(root / baked.RECORD, ArtifactError)
    sizes = {folder: _size(root / folder) for folder in baked.CACHES if (root / folder).is_dir()}
    return Bake(run, record, sizes, launch.changes)


def _forget_what_was_timed(root: Path) -> None:
    """Remove what was chosen or measured by time: on the virtual GPU, every kernel takes as long."""
    for file in [*root.rglob("*.best_config"), *root.rglob("*.kernel_perf"), *root.rglob("*.autotune.json")]:
        file.unlink()
    shutil.rmtree(root / "vllm" / "flashinfer_autotune_cache", ignore_errors=True)


def _size(folder: Path) -> tuple[int, int]:
    """A folder's files, and their bytes."""
    sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
    return len(sizes), sum(sizes)
