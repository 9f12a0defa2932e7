"""``python -m cachebuilder.fleet.worker``: does jobs in the Python of an engine's environment.

It reads a job from each line of standard input, and answers on standard output. It ends with its input, so it does not
outlive the process that started it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path

from cachebuilder.building import build, plan
from cachebuilder.common.cache import scratch_folder
from cachebuilder.common.results import Results
from cachebuilder.compiling import flashinfer
from cachebuilder.compiling.compiler import Compiled, CompileOptions, compile_kernels, key_parts
from cachebuilder.errors import CacheBuilderError, ManifestError
from cachebuilder.fleet.protocol import (
    JOB,
    Answer,
    Artifact,
    CompileJob,
    Done,
    Failed,
    Job,
    JobRecord,
    Notice,
    PackJob,
    PlanJob,
    Planned,
    Probed,
    ProbeJob,
    Shared,
    Step,
    Tools,
)
from cachebuilder.manifest.inputs import Inputs, load_manifest
from cachebuilder.planning.kept import plan_key
from cachebuilder.ship.shared import BUILDER_VARIABLE, SharedStore, open_store
from cachebuilder.sweep import warm

Say = Callable[[Step | Notice], None]


def main() -> None:
    """Answer each job until the input ends, or somebody interrupts."""
    signal.signal(signal.SIGINT, _interrupt)
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is no answer

    def say(line: Answer | Step | Notice) -> None:
        answers.write(line.model_dump_json() + "\n")
        answers.flush()

    with contextlib.suppress(KeyboardInterrupt), warm.kept():
        for line in sys.stdin:
            try:
                say(do(JOB.validate_json(line), say))
            except CacheBuilderError as error:
                say(Failed(error=type(error).__name__, message=str(error), hint=error.hint))


def _interrupt(number: int, frame: object) -> None:
    """Stop once: a Ctrl-C reaches this process from the terminal and from its driver, and ends its compilers once."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    raise KeyboardInterrupt


def do(job: Job, say: Say) -> Answer:
    """Do a job. Raises what `cachebuilder.plan` and `cachebuilder.build` raise."""
    if isinstance(job, ProbeJob):
        return _probe(job)
    if isinstance(job, PlanJob):
        return _plan(job, say)
    return _compile(job, say) if isinstance(job, CompileJob) else _pack(job, say)


def _probe(job: ProbeJob) -> Probed:
    installation, parts = "", tuple[str, ...]()
    plans: list[str | None] = []
    refusals: list[str] = []
    for text in job.manifests:
        try:
            inputs = _inputs(text, job.tools)
        except ManifestError as error:
            plans.append(None)
            refusals.append(str(error))
            continue
        if not parts:
            installation, parts = f"{inputs.installation}; {inputs.toolchain}", key_parts(inputs)
        plans.append(plan_key(inputs))
        refusals.append("")
    return Probed(installation=installation, key_parts=parts, plans=tuple(plans), refusals=tuple(refusals))


def _plan(job: PlanJob, say: Say) -> Planned:
    started = time.monotonic()
    store, inputs = _open(job.shared, say), _inputs(job.manifest, job.tools)
    plan(inputs, shared=store, progress=_progress(say))
    seconds = time.monotonic() - started
    _keep_record(store, job.shared, "plan", job.name, Done(compiled=0, reused=0, seconds=seconds, cpu_seconds=0))
    return Planned(key=plan_key(inputs), seconds=seconds)


def _compile(job: CompileJob, say: Say) -> Done:
    started = time.monotonic()
    store, inputs = _open(job.shared, say), _inputs(job.manifest, job.tools)
    results: Results = _OnlyCompared(store) if job.again else store
    options = CompileOptions(job.jobs, use_store=not job.again, check_code=0, shared=results)
    compiled = compile_kernels(inputs, job.kernels, options, progress=_progress(say)) if job.kernels else Compiled(0)
    if job.flashinfer:
        modules = flashinfer.build_modules(inputs, options)
        made = plan(inputs, shared=store).flashinfer
        gemms = flashinfer.compile_gemms(inputs, made.kernels, options) if made else {}
        compiled.reused += len(modules) + len(gemms)
    done = Done(
        compiled=len(compiled.compiled),
        reused=compiled.reused,
        seconds=time.monotonic() - started,
        cpu_seconds=compiled.cpu_seconds,
    )
    _keep_record(store, job.shared, "compile", job.name, done)
    return done


def _pack(job: PackJob, say: Say) -> Artifact:
    inputs = _inputs(job.manifest, job.tools)
    options = CompileOptions(check_code=0, shared=_open(job.shared, say))
    built = build(inputs, job.output, options=options, progress=_progress(say))
    packed = built.packed
    return Artifact(
        path=str(packed.path), sha256=packed.sha256, size=packed.size, compiled=len(built.compiled.compiled)
    )


class _OnlyCompared:
    """A store that seems empty, so that what it has is made again and compared."""

    def __init__(self, store: Results) -> None:
        self._store = store

    def get(self, names: Sequence[str]) -> dict[str, bytes]:
        """Nothing."""
        return {}

    def absent(self, names: Sequence[str]) -> list[str]:
        """Nothing."""
        return []

    def put(self, name: str, data: bytes) -> None:
        """As the store itself, which compares what it has already."""
        self._store.put(name, data)


def _inputs(text: str, tools: Tools) -> Inputs:
    with scratch_folder() as folder:
        path = Path(folder, "manifest.yaml")
        path.write_text(text, encoding="utf-8")
        return load_manifest(path, nvcc=tools.nvcc, deep_gemm=tools.deep_gemm, flashinfer=tools.flashinfer)


def _open(shared: Shared, say: Say) -> SharedStore:
    return open_store(shared.url, read_only=shared.read_only, notice=lambda text: say(Notice(text=text)))


def _progress(say: Say) -> Callable[..., None]:
    def progress(step: str, done: int, total: int, share: float | None = None) -> None:
        say(Step(step=step, done=done, total=total, share=share))

    return progress


def _keep_record(store: SharedStore, shared: Shared, kind: str, name: str, done: Done) -> None:
    builder = os.environ.get(BUILDER_VARIABLE) or socket.gethostname()
    facts = done.model_dump(exclude={"kind"}) | {"kind": kind, "name": name, "builder": builder}
    record = JobRecord.model_validate(facts | {"finished": datetime.now(UTC).isoformat(timespec="seconds")})
    store.replace(f"records/{shared.fleet}/{uuid.uuid4().hex}", record.to_json().encode())


if __name__ == "__main__":
    main()
