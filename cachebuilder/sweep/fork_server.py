"""A process that has imported torch and forks for each sweep: importing torch takes longer than most sweeps do.

It reads a `Request` a line and answers each with a line: the exit code of the
child that did the job, negative for a signal. The first line says that torch is there. It ends with its input.

No CUDA call is made before the fork, and the virtual GPU, DeepGEMM and the compiler are read from variables that each
child sets for itself. So a child differs in nothing from a process of its own.
"""

from __future__ import annotations

import os
import sys

from cachebuilder.common.records import Record
from cachebuilder.sweep import child, torch_import

READY = "ready"


class Request(Record):
    """One sweep.

    Attributes:
        folder: the folder with the job.
        log: where its output goes.
        environment: the child's whole environment.
    """

    folder: str
    log: str
    environment: dict[str, str]


def start() -> None:
    """Do what the input asks for, one request after the other."""
    torch_import.finish(whole=False)
    print(READY, flush=True)
    while line := sys.stdin.readline():
        request = Request.model_validate_json(line)
        if (pid := os.fork()) == 0:
            _become_child(request)
            child.start()  # ends the process
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


def _become_child(request: Request) -> None:
    nothing = os.open(os.devnull, os.O_RDONLY)
    log = os.open(request.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    for handle, standard in ((nothing, 0), (log, 1), (log, 2)):
        os.dup2(handle, standard)
    os.environ.clear()
    os.environ.update(request.environment)
    sys.argv[1:] = [request.folder]
