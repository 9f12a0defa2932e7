"""Run DeepGEMM itself over every point of every op and write down which kernels it requests.

`Sweep` finds out what an empty cache would be asked for: nothing is compiled, and no GPU is needed. `call` is the same
child process with any compiler and any cache roots, which `verify` uses.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cachebuilder.common.cache import scratch_folder
from cachebuilder.common.progress import Progress, no_progress
from cachebuilder.cuda.toolchain import empty_kernel
from cachebuilder.errors import PlanError
from cachebuilder.manifest.inputs import Inputs
from cachebuilder.sweep.process import Setting, run_child
from cachebuilder.sweep.protocol import Answer, SweepJob
from cachebuilder.sweep.recorder import Newcomers, RecordedEntry, read_entries, recording_compiler


@dataclass(frozen=True)
class Result:
    """What a sweep from an empty cache found.

    Attributes:
        entries: those that the ops launch, by name.
        checked: those that the self-check launched before all ops; some may be among `entries`.
        cache_root: where they were; the sources and metadata hold this path.
    """

    answer: Answer
    entries: dict[str, RecordedEntry]
    checked: dict[str, RecordedEntry]
    cache_root: Path


class Sweep:
    """A sweep of a manifest's ops from an empty cache, with the compiler that records.

    Args:
        progress: the units are calls of DeepGEMM.
    """

    def __init__(self, inputs: Inputs, progress: Progress = no_progress) -> None:
        self._inputs = inputs
        self._progress = progress
        self._generation = inputs.installation.generation

    def run(self, on_entry: Callable[[RecordedEntry], None] = lambda entry: None) -> Result:
        """Sweep on a virtual GPU. The step's name is "plan".

        Args:
            on_entry: called with each entry soon after DeepGEMM requested it, before the sweep ends.

        Raises: what `call` raises, and `PlanError` where a launched kernel has no entry.
        """
        with scratch_folder() as scratch:
            setting = self._setting("plan", scratch)
            [root] = setting.roots
            newcomers = Newcomers(root, self._generation)

            def watch(step: str, done: int, total: int, share: float | None = None) -> None:
                self._progress(step, done, total, share)
                for entry in newcomers.take():
                    on_entry(entry)

            answer = call(SweepJob.of(self._inputs.manifest, self._inputs.installation), setting, watch)
            entries = read_entries(root, self._generation)
            if lost := answer.launched - entries.keys():
                raise PlanError(f"wanted an entry for every launched kernel, found none for {min(lost)}")
            return Result(
                answer=answer,
                entries={name: entries[name] for name in sorted(answer.launched)},
                checked={name: entries[name] for name in answer.checked},
                cache_root=root,
            )

    def entries_on_gpu(self) -> set[str]:
        """The names of all entries that DeepGEMM requests on the real GPU, which must be the manifest's target.

        Each kernel is launched, but it is an empty one. The step's name is "plan on the GPU".

        Raises: what `call` raises.
        """
        inputs = self._inputs
        with scratch_folder() as scratch:
            setting = self._setting("plan on the GPU", scratch)
            gpu = inputs.manifest.target.gpu
            placeholder = setting.compiler.nvcc.with_name("placeholder.cubin")
            placeholder.write_bytes(empty_kernel(inputs.toolchain, f"sm_{gpu.major}{gpu.minor}", scratch))
            # No self-check: it would request a kernel of its own.
            call(SweepJob.of(inputs.manifest, inputs.installation, "cuda", self_check=False), setting, self._progress)
            return set(read_entries(setting.roots[0], self._generation))

    def _setting(self, step: str, scratch: Path) -> Setting:
        """An empty cache root in ``scratch``, and the compiler that records."""
        compiler = recording_compiler(scratch, self._inputs.toolchain.version_text)
        (root := scratch / "root").mkdir()
        return Setting(step, compiler, [root], scratch, self._inputs.manifest.environment)


def call(job: SweepJob, setting: Setting, progress: Progress = no_progress) -> Answer:
    """Call DeepGEMM at every point of every op of ``job``, in a child process.

    Raises:
        DeviceError: there is no real GPU, it is not the job's, or it is out of memory (op and point are named).
        PlanError: DeepGEMM refused a shape or died (op and point are named), misreads tensors under this torch,
            lacks an op, or made a CUDA call that the virtual GPU does not answer (named).
        InstallationError: torch or DeepGEMM does not load; what is missing is named if that shows.
        ToolchainError: DeepGEMM refuses the compiler's release.
        ManifestError: DeepGEMM does not take the value of a variable.
    """
    return run_child("child", job, setting, Answer, progress)
