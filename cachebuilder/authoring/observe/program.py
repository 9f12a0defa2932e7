"""Run a program on a virtual GPU with a compiler that writes down, and see every call that it makes of DeepGEMM."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from cachebuilder.authoring.observe import calls, traffic
from cachebuilder.authoring.observe.calls import Observed
from cachebuilder.authoring.observe.command import Launch, Server
from cachebuilder.common.cache import own_folder
from cachebuilder.common.foreign import without_traces
from cachebuilder.common.progress import Progress
from cachebuilder.cuda.gpus import Gpu
from cachebuilder.errors import PlanError, RecordingError
from cachebuilder.sweep.process import Compiler
from cachebuilder.virtual_gpu import library as virtual_gpu

#: The folder that Python's `site` finds our module in; nothing else is in it.
_INSIDE = Path(__file__).parent / "inside"
#: Variables that choose another GPU, or another place or compiler for DeepGEMM's kernels.
_NEVER_KEPT = ("CUDA_VISIBLE_DEVICES", "CACHEBUILDER_OBSERVE", "CACHEBUILDER_BAKE")
_DROPPED = (*_NEVER_KEPT, "DG_JIT_", "DJ_", "SGLANG_DG_CACHE_DIR")
#: Seconds until an engine must answer, and from a request to stop until it is killed.
_START_SECONDS, _STOP_SECONDS = 1800.0, 20.0


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        requests: how many were sent and answered.
        exit_code: of a program that was run to its end; None for an engine, which was stopped.
        seconds: until the engine was up, and of the whole run.
    """

    observed: Observed
    requests: int
    exit_code: int | None
    up_seconds: float
    seconds: float


@dataclass(frozen=True)
class Setting:
    """Where and with what a program runs.

    Attributes:
        compiler: writes down what DeepGEMM asks for; None where the user's variables say where its kernels are, and the
            engine's other compilers compile.
        folder: gets ``calls/``, what was written down, ``root/``, DeepGEMM's cache, and ``log.txt``.
        environment: the user's variables.
    """

    gpu: Gpu
    compiler: Compiler | None
    folder: Path
    environment: Mapping[str, str]

    @property
    def root(self) -> Path:
        """DeepGEMM's cache root."""
        return self.folder / "root"

    @property
    def log(self) -> Path:
        """What the program printed."""
        return self.folder / "log.txt"


def run(launch: Launch, setting: Setting, progress: Progress) -> Run:
    """Run a program; an engine is sent requests when it is up, and then stopped.

    The steps are "start" and "requests".

    Raises:
        RecordingError: it cannot be run, ends with an error, or does not answer; the end of its output is in the text.
        PlanError: it made a CUDA call that the virtual GPU does not answer.
    """
    for folder in ("calls", "root"):
        (setting.folder / folder).mkdir()
    started = time.monotonic()
    sent = 0
    with _running(launch, setting) as process:
        progress("start", 0, 1)
        try:
            exit_code = _wait(process, launch.server)
            up = time.monotonic()
            if exit_code is None and launch.server is not None:
                progress("start", 1, 1)
                batches = traffic.requests(calls.read(setting.folder / "calls").facts)
                sent = sum(map(len, batches))
                traffic.send(launch.server, batches, lambda done, total: progress("requests", done, total))
        except RecordingError as error:
            raise _failure(str(error), setting) from None
        _stop(process)
    if _unanswered(setting):  # also of an engine that went on
        raise _failure(launch.command[0], setting)
    if exit_code:
        raise _failure(f"{launch.command[0]} ended with exit code {exit_code}", setting)
    observed = calls.read(setting.folder / "calls")
    return Run(observed, sent, exit_code, up - started, time.monotonic() - started)


def environment(launch: Launch, setting: Setting) -> dict[str, str]:
    """The variables of the observed program."""
    dropped = _DROPPED if setting.compiler else _NEVER_KEPT
    kept = {name: value for name, value in setting.environment.items() if not name.startswith(dropped)}
    paths = [str(_INSIDE), *filter(None, [kept.get("PYTHONPATH")])]
    ranks, stages = (launch.server.ranks, launch.server.stages) if launch.server else (1, 1)
    own = virtual_gpu.engine_environment(setting.gpu, ranks, setting.folder, stages)
    common = (
        kept
        | dict(launch.environment)
        | own
        | {"PYTHONPATH": os.pathsep.join(paths), "CACHEBUILDER_OBSERVE": str(setting.folder / "calls")}
    )
    if setting.compiler is None:
        # As where it serves: a key of Triton's holds this folder. The linker finds the virtual library by LIBRARY_PATH.
        libcuda = {name: value for name, value in kept.items() if name == "TRITON_LIBCUDA_PATH"}
        return common | libcuda | {"CACHEBUILDER_BAKE": "1"}
    return (
        common
        | setting.compiler.environment
        | {
            "DG_JIT_CACHE_DIR": str(setting.root),
            "SGLANG_DG_CACHE_DIR": str(setting.root),
            "DG_JIT_NVCC_COMPILER": str(setting.compiler.nvcc),
        }
    )


@contextlib.contextmanager
def _running(launch: Launch, setting: Setting) -> Iterator[subprocess.Popen[bytes]]:
    """The program in a session of its own, all of whose processes are killed in the end."""
    with setting.log.open("wb") as output:
        try:
            process = subprocess.Popen(
                launch.command,
                env=environment(launch, setting),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        except OSError as error:
            raise RecordingError(f"{launch.command[0]}: cannot be run: {error.strerror}") from error
        try:
            yield process
        finally:
            while members := _session(process.pid):
                for member in members:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(member, signal.SIGKILL)
                process.poll()  # which takes the dead leader away
                time.sleep(0.01)
            process.wait()


def _session(leader: int) -> list[int]:
    """The living processes of a session. A group is not enough: ninja gives each of its compilers one of its own."""
    members = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, _, session = stat.read_text().rpartition(")")[2].split()[:4]
            if int(session) == leader and state not in "ZX":
                members.append(int(stat.parent.name))
    return members


def _wait(process: subprocess.Popen[bytes], server: Server | None) -> int | None:
    """Wait until the program has ended, or its server answers; returns its exit code, None if it runs on.

    Raises:
        RecordingError: an engine does not answer in time.
    """
    started = time.monotonic()
    while process.poll() is None and not (server and traffic.is_up(server)):
        if server and time.monotonic() - started > _START_SECONDS:
            raise RecordingError(f"wanted an engine that answers within {_START_SECONDS:.0f} s, found none")
        time.sleep(0.3)
    return process.poll()


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Ask the program to end, as Ctrl-C does, and wait for it; its processes then write their last counts."""
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_STOP_SECONDS)


def _unanswered(setting: Setting) -> list[str]:
    """CUDA calls that the virtual GPU did not answer, in any process."""
    file = setting.folder / virtual_gpu.UNANSWERED
    return sorted(set(file.read_text().split())) if file.exists() else []


def _failure(reason: str, setting: Setting) -> RecordingError | PlanError:
    """The error for a program that failed. A call that the virtual GPU did not answer is the likely cause."""
    kept = own_folder("recordings") / f"observed-{os.getpid()}.log"  # the setting's folder is about to be removed
    shutil.copyfile(setting.log, kept)
    output = f"its whole output is in {kept}"
    if unanswered := _unanswered(setting):
        return PlanError(
            f"{reason}: the virtual GPU does not answer {', '.join(unanswered)}",
            hint=f"this engine calls more of CUDA than cachebuilder knows: report it; {output}",
        )
    lines = without_traces(setting.log.read_text(errors="replace")).splitlines()
    errors = [number for number, line in enumerate(lines) if re.search(r"Error\b", line)][-4:]
    last = range(max(len(lines) - 6, 0), len(lines))
    shown = "\n".join(lines[number][-300:] for number in sorted({*errors, *last}))
    return RecordingError(f"{reason}\n{shown}".rstrip(), hint=output)
