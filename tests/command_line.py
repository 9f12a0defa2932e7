"""Run cachebuilder's command line.

Each command is a fork of a process that has imported cachebuilder's modules. A new interpreter would import them again
for each of the tests' hundreds of commands, which takes longer than most commands themselves. The verbs that call
DeepGEMM run in the tests' own process: there, their sweeps are forks of the server that conftest.py keeps, and torch is
not imported again for each. test_build.py and test_bad_machine.py run these verbs as programs, too. A script's commands
can run in the same way (`ScriptRunner`).
"""

from __future__ import annotations

import contextlib
import contextvars
import json
import multiprocessing
import os
import select
import socket
import subprocess
import sys
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from cachebuilder.cli import main as command_line

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    ["pytest", __name__, *(f"cachebuilder.cli.{verb.replace('-', '_')}" for verb in command_line.VERBS)]
)
#: Variables that a process reads only when its program starts: a command with others of these gets a new interpreter.
_READ_AT_START = ("LD_LIBRARY_PATH", "LD_PRELOAD", "PYTHONPATH")
_CALLS_DEEPGEMM = ("build", "observe", "plan", "record", "verify")


def cachebuilder(
    *arguments: str | Path, environment: Mapping[str, str] | None = None, without: Collection[str] = ()
) -> subprocess.CompletedProcess[str]:
    """Run ``cachebuilder ARGUMENTS`` to its end.

    Args:
        environment: the command's variables; default: this process's.
        without: modules that the command cannot import, beside those that cachebuilder's modules import themselves.
    """
    command = list(map(str, arguments))
    variables = dict(os.environ if environment is None else environment)
    if any(variables.get(name) != os.environ.get(name) for name in _READ_AT_START):
        new = [sys.executable, "-m", "cachebuilder", *command]
        return subprocess.run(new, capture_output=True, text=True, env=variables, check=False)
    with tempfile.TemporaryDirectory() as folder:
        files = Path(folder, "stdout"), Path(folder, "stderr")
        if command[0] in _CALLS_DEEPGEMM and not without:
            code = contextvars.copy_context().run(_main_here, command, variables, files)
            return subprocess.CompletedProcess(command, code, *(file.read_text() for file in files))
        process = _CONTEXT.Process(
            target=_main,
            args=(command, variables, os.getcwd(), files, without),
        )
        process.start()
        process.join()
        stdout, stderr = (file.read_text() for file in files)
        assert process.exitcode is not None
        return subprocess.CompletedProcess(command, process.exitcode, stdout, stderr)


def _main_here(arguments: list[str], environment: dict[str, str], files: tuple[Path, Path]) -> int:
    """Run the command in this process; returns its exit code."""
    variables, argv = dict(os.environ), sys.argv
    try:
        with _output_to(files):
            os.environ.clear()
            os.environ.update(environment)
            sys.argv = ["cachebuilder", *arguments]
            command_line.main()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    finally:
        sys.argv = argv
        os.environ.clear()
        os.environ.update(variables)
    raise AssertionError("the command line ends with an exit code")


@contextmanager
def _output_to(files: tuple[Path, Path]) -> Iterator[None]:
    """Let this process and its children write their stdout and stderr into two files."""
    with contextlib.ExitStack() as stack:
        for number, (name, file) in enumerate(zip(("stdout", "stderr"), files, strict=True), 1):
            getattr(sys, name).flush()
            before = os.dup(number)
            stack.callback(os.close, before)
            stack.callback(os.dup2, before, number)
            stream = stack.enter_context(file.open("w", buffering=1))
            os.dup2(stream.fileno(), number)
            stack.callback(setattr, sys, name, getattr(sys, name))
            setattr(sys, name, stream)
        yield


def _main(
    arguments: list[str], environment: dict[str, str], cwd: str, files: tuple[Path, Path], without: Collection[str]
) -> None:
    for number, file in enumerate(files, 1):
        handle = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(handle, number)
        os.close(handle)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    sys.modules.update(dict.fromkeys(without))  # an import of None fails
    sys.argv = ["cachebuilder", *arguments]
    command_line.main()


#: A program that has the process with the socket NAME run its command.
_CLIENT = """\
#!{python} -IS
import json, os, socket, sys
with socket.socket(socket.AF_UNIX) as connection:
    connection.connect({name!r})
    connection.sendall(json.dumps([sys.argv[1:], os.getcwd(), dict(os.environ)]).encode())
    connection.shutdown(socket.SHUT_WR)
    code, stdout, stderr = json.load(connection.makefile())
sys.stdout.write(stdout)
sys.stderr.write(stderr)
sys.exit(code)
"""


class ScriptRunner:
    """Runs scripts, and runs the commands of cachebuilder in them as `cachebuilder` does.

    Args:
        folder: gets the program that stands for ``cachebuilder`` there; PATH has to begin with it.
    """

    def __init__(self, folder: Path) -> None:
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(f"\0tests-of-cachebuilder-{os.getpid()}-{id(self)}")
        self._listener.listen()
        program = folder / "cachebuilder"
        program.write_text(_CLIENT.format(python=sys.executable, name=self._listener.getsockname().decode()))
        program.chmod(0o755)

    def run(self, script: Sequence[str], cwd: Path, environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
        """Run ``script``, a program with its arguments, to its end."""
        with tempfile.TemporaryFile("w+") as stdout, tempfile.TemporaryFile("w+") as stderr:
            with subprocess.Popen(script, cwd=cwd, env=environment, stdout=stdout, stderr=stderr) as process:
                while process.poll() is None:
                    if select.select([self._listener], [], [], 0.02)[0]:
                        self._run_command()
            for file in (stdout, stderr):
                file.seek(0)
            return subprocess.CompletedProcess(script, process.returncode, stdout.read(), stderr.read())

    def _run_command(self) -> None:
        connection, _ = self._listener.accept()
        with connection:
            arguments, folder, environment = json.load(connection.makefile())
            with contextlib.chdir(folder):
                ran = cachebuilder(*arguments, environment=environment)
            connection.sendall(json.dumps([ran.returncode, ran.stdout, ran.stderr]).encode())
