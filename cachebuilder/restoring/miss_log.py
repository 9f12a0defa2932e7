"""The frozen nvcc's log: where it is, its lines, and how many requests it holds.

A log comes from machines that serve models, perhaps through several hands. Only values in the form that the frozen nvcc
writes are taken from it. This module imports no pydantic, since a probe must be quick.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from io import BufferedReader
from pathlib import Path
from typing import Any

from cachebuilder.artifact.whole import open_file
from cachebuilder.common.folders import Folder
from cachebuilder.errors import ArtifactError
from cachebuilder.restoring.frozen import FOLDER, LOG_NAME, LOG_VARIABLE

#: The frozen nvcc keeps its lines under 4 KiB; a longer one than this is not its own.
_MAX_LINE_BYTES = 64 << 10
_KERNEL = re.compile(r"[A-Za-z0-9_:]{1,200}")
_ARTIFACT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_POLICY = re.compile("refuse|compile|compile-and-warn")

#: The names of what requests are counted by, as metrics have them.
LABELS = ("kernel", "artifact", "policy")

#: A kernel, an artifact or a policy that a line does not say.
UNKNOWN = "unknown"
#: The name that all further requests are counted under, and the number of counts before it. DeepGEMM has about 60
#: templates, so only a log that somebody else wrote has more.
OTHER, _MAX_COUNTS = "other", 1000


def logs(target: Path, environment: Mapping[str, str]) -> list[Path]:
    """The logs at ``target`` that exist: the file itself, or all those of the frozen nvcc in a restored folder.

    The script writes into CACHEBUILDER_MISS_LOG, or else into the folder; if it cannot, into a private folder in
    TMPDIR. The first miss makes the log, so no log is no miss.

    Raises:
        ArtifactError: there is neither a log nor a folder for one, so no miss could be logged; or it cannot be seen;
            or this user cannot write into the restored folder, so the log may be where `run` found a place for it.
    """
    own = target / FOLDER / LOG_NAME
    if not os.path.isdir(target):
        return [target] if _exists(target) else []
    private = Path(environment.get("TMPDIR") or "/tmp", f"cachebuilder-misses-{os.geteuid()}")
    places = [own, private / LOG_NAME] if _is_own(private) else [own]
    if variable := environment.get(LOG_VARIABLE):
        places.append(Path(variable))
    existing = [path for path in dict.fromkeys(places) if _exists(path)]
    if not (existing or variable or os.access(own.parent, os.W_OK | os.X_OK, effective_ids=True)):
        raise ArtifactError(
            f"{own}: cannot be written by user {os.geteuid()}, so the log may be in a place that run chose",
            hint=f"set {LOG_VARIABLE}, for the server and here, or name the log",
        )
    return existing


def _exists(log: Path) -> bool:
    try:
        os.lstat(log)
    except FileNotFoundError:
        if not os.path.isdir(log.parent):
            raise ArtifactError(
                f"{log}: wanted a log, or at least its folder, found neither: no miss could be logged there",
                hint="name the log, or the folder that restore wrote",
            ) from None
        return False
    except OSError as error:
        raise ArtifactError(f"{log}: cannot be read: {error.strerror}") from error
    return True


def _is_own(private: Path) -> bool:
    """Whether this is the folder that the frozen nvcc makes: this user's, which nobody else can enter."""
    try:
        with Folder.at(private) as folder:
            status = folder.status()
            return status.st_uid == os.geteuid() and status.st_mode & 0o077 == 0
    except OSError:
        return False


def lines(log: BufferedReader, path: Path) -> Iterator[dict[str, Any] | None]:
    """Each line of an open log that is not empty: its JSON; None for one that the frozen nvcc did not write.

    Raises:
        ArtifactError: the log cannot be read.
    """
    try:
        while data := log.readline(_MAX_LINE_BYTES):
            if data.strip():
                yield _parse(data)
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be read: {error.strerror}") from error


def _parse(data: bytes) -> dict[str, Any] | None:
    try:
        line = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return line if isinstance(line, dict) and "kernel" in line else None


def kernel_of(line: Mapping[str, Any]) -> str | None:
    """The kernel that a line names, without ``_impl``."""
    name = _text(line, "kernel", _KERNEL)
    return name.removesuffix("_impl") if name else None


def artifact_of(line: Mapping[str, Any]) -> str | None:
    """The artifact that a line names."""
    return _text(line, "artifact", _ARTIFACT)


def time_of(line: Mapping[str, Any]) -> int | None:
    """The time of a line, in seconds since 1970; None where it has none."""
    seconds = line.get("time")
    return seconds if type(seconds) is int else None


def _text(line: Mapping[str, Any], name: str, form: re.Pattern[str]) -> str | None:
    value = line.get(name)
    return value if isinstance(value, str) and form.fullmatch(value) else None


@dataclass
class Tally:
    """The requests in some logs.

    Attributes:
        logs: how many logs there are.
        requests: the number of requests, by kernel, artifact and policy.
        unreadable_lines: lines that are not the frozen nvcc's.
        last: the time of the last request, in seconds since 1970; 0 if there is none with a time that has passed.
        read: when the logs were read, in seconds since 1970.
    """

    logs: int
    read: int
    requests: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    unreadable_lines: int = 0
    last: int = 0

    def add(self, kernel: str | None, artifact: str | None, policy: str | None) -> None:
        """Count a request for a kernel of an artifact, under a policy."""
        key = (kernel or UNKNOWN, artifact or UNKNOWN, policy or UNKNOWN)
        if key not in self.requests and len(self.requests) >= _MAX_COUNTS:
            key = (OTHER, OTHER, OTHER)
        self.requests[key] += 1

    def kernels(self) -> list[str]:
        """The kernels, the one missed most often first."""
        by_kernel: Counter[str] = Counter()
        for (kernel, _, _), count in self.requests.items():
            by_kernel[kernel] += count
        return [kernel for kernel, _ in by_kernel.most_common()]


def tally(paths: Sequence[Path], since: int | None = None) -> Tally:
    """Count the requests in the logs at ``paths``. Memory does not grow with the logs.

    Args:
        since: seconds since 1970: leave older requests out. A request without a time counts.

    Raises:
        ArtifactError: a log cannot be read.
    """
    result = Tally(logs=len(paths), read=int(time.time()))
    for path in paths:
        with open_file(path) as log:
            for line in lines(log, path):
                if line is None:
                    result.unreadable_lines += 1
                    continue
                seconds = time_of(line)
                if since is not None and seconds is not None and seconds < since:
                    continue
                result.add(kernel_of(line), artifact_of(line), _text(line, "policy", _POLICY))
                if seconds is not None and result.last < seconds <= result.read:
                    result.last = seconds
    return result
