"""A miss is one line on the stderr of the process that serves: DeepGEMM keeps what the frozen nvcc itself prints."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cachebuilder import building
from cachebuilder.restoring import frozen
from cachebuilder.restoring.machine import Machine
from cachebuilder.restoring.restore import restore
from tests.test_frozen import DIGEST, KERNEL, call_deepgemm
from tests.users import STRANGER, VICTIM, ground, needs_root, owned

__all__ = ["ground"]

SHELLS = [
    [path, *more]
    for name, *more in (["dash"], ["bash"], ["busybox", "sh"], ["mksh"], ["zsh", "--emulate", "sh"])
    if (path := shutil.which(name))
]
#: Runs each command in turn and keeps its output, as popen(3) in DeepGEMM does.
SERVER = """
import json, subprocess, sys
for command in json.loads(sys.argv[1]):
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=20)
    print(json.dumps([done.returncode, done.stdout]))
"""
REFUSED = (
    "frozen nvcc: sm90_fp8_gemm_1d2d is not in the restored cache (artifact small), and nothing is compiled here\n"
)
COMPILING = "frozen nvcc: sm90_fp8_gemm_1d2d is not in the restored cache (artifact small): compiling it now\n"


@pytest.fixture
def call(tmp_path: Path) -> str:
    """The command line that DeepGEMM gives to a shell (``csrc/jit/compiler.hpp`` of 2.5.0)."""
    frozen.write(tmp_path / "dir" / frozen.FOLDER, "nvcc\n", "small", DIGEST)
    (tmp_path / "kernel.cu").write_text(KERNEL)
    return f"cd {tmp_path} && {frozen.frozen_nvcc(tmp_path / 'dir')} {tmp_path}/kernel.cu -cubin -o x 2>&1"


def serve(*commands: list[str], **variables: str) -> tuple[list[tuple[int, str]], str]:
    """What the server keeps of each command, with its exit code, and what is on the server's own stderr."""
    done = subprocess.run(
        [sys.executable, "-c", SERVER, json.dumps(commands)],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
        env={"PATH": os.environ["PATH"], "CACHEBUILDER_REAL_NVCC": "/bin/true"} | variables,
    )
    return [tuple(json.loads(line)) for line in done.stdout.splitlines()], done.stderr


@pytest.mark.parametrize("shell", SHELLS, ids=lambda shell: Path(shell[0]).name)
def test_a_miss_is_one_line_on_the_servers_stderr_whichever_shell_runs_nvcc(shell: list[str], call: str) -> None:
    """As ``/bin/sh`` of popen, and as the one that the script runs in: some of them become what they run."""
    calls = [[*shell, "-c", call], [*shell, "-c", call.replace("&& ", f"&& {' '.join(shell)} ")]]
    kept, said = serve(*calls)
    assert said == REFUSED * 2
    assert all(code == 1 and output.startswith(REFUSED.rstrip()) and output.count("\n") == 3 for code, output in kept)
    kept, said = serve(*calls, CACHEBUILDER_ON_MISS="compile-and-warn")
    assert (kept, said) == ([(0, COMPILING)] * 2, COMPILING * 2)


def test_a_miss_that_is_compiled_without_a_warning_is_silent(call: str) -> None:
    assert serve(["sh", "-c", call], CACHEBUILDER_ON_MISS="compile") == ([(0, "")], "")


def test_a_miss_that_is_in_no_log_is_on_the_servers_stderr(call: str, tmp_path: Path) -> None:
    (tmp_path / f"cachebuilder-misses-{os.geteuid()}").write_text("")
    _, said = serve(["sh", "-c", call], CACHEBUILDER_MISS_LOG="/nonexistent/log", TMPDIR=str(tmp_path))
    assert said.startswith("frozen nvcc: the miss is in no log: wanted /nonexistent/log, or ")
    assert said.endswith(REFUSED)


def test_a_kernel_without_a_name_puts_no_control_character_on_the_servers_stderr(call: str, tmp_path: Path) -> None:
    odd = tmp_path / "a\n\x1b[2J.cu"
    odd.write_text("no kernel")
    nvcc = str(frozen.frozen_nvcc(tmp_path / "dir"))
    _, said = serve(["sh", "-c", '"$0" "$1" 2>&1', nvcc, str(odd)])
    assert f'"{tmp_path}/a??[2J.cu" is not in the restored cache' in said
    assert said.count("\n") == 1


@contextlib.contextmanager
def odd_stderr(kind: str, folder: Path) -> Iterator[int]:
    """A stderr that gets no line."""
    with contextlib.ExitStack() as stack:
        if kind == "file":
            file = stack.enter_context((folder / "log").open("w+b"))
            file.write(b"0123456789" * 100)
            file.seek(0)
            yield file.fileno()
        elif kind == "socket":  # the journal's is one
            near, far = (stack.enter_context(end) for end in socket.socketpair())
            far.setblocking(False)
            yield near.fileno()
            with pytest.raises(BlockingIOError):
                far.recv(1)
        else:
            read, write = os.pipe()
            if kind == "full-pipe-without-a-reader":
                flags = fcntl.fcntl(write, fcntl.F_GETFL)
                fcntl.fcntl(write, fcntl.F_SETFL, flags | os.O_NONBLOCK)
                with contextlib.suppress(BlockingIOError):
                    while True:
                        os.write(write, b"x" * 4096)
                fcntl.fcntl(write, fcntl.F_SETFL, flags)
            if kind == "foreign-pipe":
                os.fchown(write, VICTIM, VICTIM)
                os.fchmod(write, 0o600)
            else:
                os.close(read)
            yield write
            os.close(write)
            if kind == "foreign-pipe":
                assert os.read(read, 1) == b""
                os.close(read)


@pytest.mark.parametrize(
    "kind",
    [
        "file",
        "socket",
        "pipe-without-a-reader",
        "full-pipe-without-a-reader",
        pytest.param("foreign-pipe", marks=needs_root),
    ],
)
@pytest.mark.parametrize("shell", SHELLS, ids=lambda shell: Path(shell[0]).name)
def test_a_stderr_that_takes_no_line_changes_no_miss_and_hangs_none(kind: str, shell: list[str], ground: Path) -> None:
    frozen.write(ground / "dir" / frozen.FOLDER, "nvcc\n", "small", DIGEST)
    (ground / "kernel.cu").write_text(KERNEL)
    owned(ground / "temporary", STRANGER)
    call = f"cd / && {' '.join(shell)} {frozen.frozen_nvcc(ground / 'dir')} {ground}/kernel.cu -cubin 2>&1"
    user = STRANGER if kind == "foreign-pipe" else None
    with odd_stderr(kind, ground) as stderr:
        done = subprocess.run(
            [*shell, "-c", f'answer=$({call}); printf "%s\\n" "$?" "$answer"'],
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            check=True,
            timeout=20,
            user=user,
            group=user,
            extra_groups=None if user is None else [],
            env={"PATH": os.environ["PATH"], "TMPDIR": str(ground / "temporary")},
        )
    code, message, *_ = done.stdout.splitlines()
    assert (code, message) == ("1", REFUSED.rstrip() + ".")
    if kind == "file":
        assert (ground / "log").read_bytes() == b"0123456789" * 100


@pytest.mark.parametrize("shell", SHELLS, ids=lambda shell: Path(shell[0]).name)
def test_a_stderr_that_is_a_file_open_for_appending_has_the_line(shell: list[str], call: str, tmp_path: Path) -> None:
    with (tmp_path / "log").open("ab") as log:
        log.write(b"before\n")
        log.flush()
        subprocess.run([*shell, "-c", f"answer=$({call})"], stderr=log, check=False)
        log.write(b"after\n")
    assert (tmp_path / "log").read_text() == f"before\n{REFUSED}after\n"


def test_a_person_at_a_terminal_reads_it_once(tmp_path: Path, call: str) -> None:
    master, terminal = pty.openpty()
    nvcc = str(frozen.frozen_nvcc(tmp_path / "dir"))
    subprocess.run([nvcc, tmp_path / "kernel.cu"], stdout=terminal, stderr=terminal, check=False)
    os.close(terminal)
    read = b""
    with contextlib.suppress(OSError):  # the terminal's end
        while data := os.read(master, 65536):
            read += data
    os.close(master)
    assert read.count(b"sm90_fp8_gemm_1d2d") == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("policy", "deep_gemm"),  # nvcc's own script follows the policy; each generation gets its refusal
    [("refuse", "deepjit"), ("refuse", "legacy"), ("compile", "deepjit"), ("compile-and-warn", "deepjit")],
    indirect=["deep_gemm"],
    scope="session",
)
def test_a_miss_of_deepgemm_itself_is_one_line_on_its_stderr(
    policy: str, built: building.Built, tmp_path: Path
) -> None:
    """The smallest kernel is missing. Under ``compile`` the process goes on, and nothing is said."""
    dir, missing = tmp_path / "dir", [k for k in built.plan.kernels if k.name == "transpose_fp32"]
    restore([built.packed.path], dir, machine=Machine(built.inputs.installation))
    for kernel in missing:
        shutil.rmtree(dir / "cache" / kernel.entry)
    real = {"CACHEBUILDER_REAL_NVCC": str(built.inputs.toolchain.nvcc), "CACHEBUILDER_ON_MISS": policy}
    done = call_deepgemm(built, dir, tmp_path, 24, **real)
    said = f"frozen nvcc: transpose_fp32 is not in the restored cache (artifact {built.inputs.manifest.name})"
    end = {"refuse": ", and nothing is compiled here", "compile-and-warn": ": compiling it now"}.get(policy)
    assert (done.returncode == 0) == (policy != "refuse")
    assert [line for line in done.stderr.splitlines() if line == f"{said}{end}"] == ([f"{said}{end}"] if end else [])
    if end is None:
        assert "frozen nvcc" not in done.stderr + done.stdout
