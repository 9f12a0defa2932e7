"""cachebuilder run on a terminal."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from pathlib import Path


def on_a_terminal(stream: int, *arguments: str | Path, **environment: str) -> str:
    """What a command writes to a terminal.

    Args:
        stream: 1 or 2: the standard output or the standard error goes to the terminal, the other one nowhere.
        environment: variables to set; without ``NO_COLOR`` among them, it is unset.
    """
    ours, theirs = pty.openpty()
    inherited = {name: value for name, value in os.environ.items() if name != "NO_COLOR"}
    process = subprocess.Popen(
        [sys.executable, "-m", "cachebuilder", *map(str, arguments)],
        stdout=theirs if stream == 1 else subprocess.DEVNULL,
        stderr=theirs if stream == 2 else subprocess.DEVNULL,
        env=inherited | {"TERM": "xterm"} | environment,
    )
    os.close(theirs)
    text = b""
    try:
        while part := os.read(ours, 4096):
            text += part
    except OSError:  # the command has closed its end
        pass
    os.close(ours)
    assert process.wait() == 0, text
    return text.decode()
