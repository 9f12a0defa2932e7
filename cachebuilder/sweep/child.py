"""The sweep's child process: it calls DeepGEMM at every point of every op.

It does the `SweepJob` in a folder, and answers which kernels each call launched. (Only the virtual GPU shows launches.)
The parent has set the environment: GPU, compiler, cache roots.
"""

from __future__ import annotations

import platform
import resource
from pathlib import Path

from cachebuilder.sweep import forks, protocol
from cachebuilder.sweep.loading import load, main, properties
from cachebuilder.sweep.protocol import Answer, Position, SweepJob
from cachebuilder.sweep.worker import Worker, join


def run(job: SweepJob, folder: Path) -> Answer:
    """Do the whole job. Raises `JobError`."""
    positions = Position.shared(folder / protocol.POSITION, job.positions)
    whole = positions[0]
    device = load(job, whole)
    worker = Worker(job, device, whole)
    beginning, forks_bytes = worker.begin(), 0
    count = forks.worth(job, beginning.parts)
    if count == 1:
        results = list(worker.do(beginning.parts))
    else:
        results, forks_bytes = forks.work(worker, beginning.parts, folder, positions[: 1 + count])
    joined = join(job, beginning, results, whole)
    return Answer(
        sweeps=joined.sweeps,
        refusals=joined.refusals,
        checked=beginning.checked,
        calls=joined.calls,
        device=None if device.virtual else properties(device.torch),
        torch=device.torch.__version__,
        python=platform.python_version(),
        peak_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 + forks_bytes,
    )


def start() -> None:
    """Do the job in the folder that the command line names."""
    main(SweepJob, run)
