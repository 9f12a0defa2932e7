"""Shards: several builders with nothing but the store between them. Each knows its number and how many there are."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Shard:
    """One of several builders.

    Attributes:
        index: 1 to ``count``.
    """

    index: int = 1
    count: int = 1

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    def place(self, name: str) -> int:
        """This shard's place among those that should do the work called ``name``; 0 for the one that does it first.

        Rendezvous hashing (Thaler and Ravishankar, 1998): each shard has a score for each piece of work. If the first
        is gone, the work of a lost shard falls to all others in equal parts.
        """
        scores = sorted(range(1, self.count + 1), key=lambda index: _score(index, name), reverse=True)
        return scores.index(self.index)


#: The one shard of a fleet that is not divided.
ALONE = Shard()


def _score(index: int, name: str) -> bytes:
    return hashlib.sha256(f"{index} {name}".encode()).digest()


def parse(text: str, environment: Mapping[str, str]) -> Shard:
    """The shard that ``--shard`` names: ``3/16``, or ``auto`` or ``auto/16`` for the number that a scheduler gave.

    Kubernetes counts an Indexed Job's pods from 0 (``JOB_COMPLETION_INDEX``), and does not say how many there are. A
    Slurm array has ``SLURM_ARRAY_TASK_ID``, from ``…_MIN`` in steps of ``…_STEP``, and ``…_COUNT``. GitLab counts from
    1 (``CI_NODE_INDEX``, ``CI_NODE_TOTAL``).

    Raises:
        ValueError: it is no shard; the text says what was wanted.
    """
    match = re.fullmatch(r"(\d+|auto)(?:/(\d+))?", text)
    if match is None or (match[1] != "auto" and match[2] is None):
        raise ValueError(f"wanted i/n with i from 1 to n, or auto/n, found {text!r}")
    count = int(match[2]) if match[2] else None
    if match[1] == "auto":
        index, known_count = _given_by_scheduler(environment)
        count = count or known_count
        if count is None:
            raise ValueError("wanted auto/n, since this scheduler does not say how many shards there are; found auto")
    else:
        index = int(match[1])
    assert count is not None
    if not 1 <= index <= count:
        raise ValueError(f"wanted a shard from 1 to {count}, found {index}")
    return Shard(index, count)


def _given_by_scheduler(environment: Mapping[str, str]) -> tuple[int, int | None]:
    """The shard's number, from 1, and how many there are, if the scheduler says so."""

    def number(name: str) -> int | None:
        value = environment.get(name, "")
        return int(value) if value.isdecimal() else None

    if (index := number("JOB_COMPLETION_INDEX")) is not None:
        return index + 1, None
    if (task := number("SLURM_ARRAY_TASK_ID")) is not None:
        first, step = number("SLURM_ARRAY_TASK_MIN") or 0, number("SLURM_ARRAY_TASK_STEP") or 1
        return (task - first) // step + 1, number("SLURM_ARRAY_TASK_COUNT")
    if (index := number("CI_NODE_INDEX")) is not None:
        return index, number("CI_NODE_TOTAL")
    raise ValueError("wanted JOB_COMPLETION_INDEX, SLURM_ARRAY_TASK_ID or CI_NODE_INDEX for auto, found none of them")
