"""Counts, sizes and ranges as the command line writes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cachebuilder.planning.selection import Range


def several(count: int, what: str) -> str:
    """A count with its noun: ``1 kernel``, ``2 kernels``."""
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def size(count: int) -> str:
    """A number of bytes, in units of powers of 1000: ``12.3 kB``."""
    value = float(count)
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            return f"{count} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} GB"


def ranges(points: Sequence[Range]) -> str:
    """The points that select a kernel, as ``1–16, 48 (step 8)``."""
    text = ", ".join(f"{r.first}" if r.first == r.last else f"{r.first}–{r.last}" for r in points)
    steps = sorted({r.step for r in points if r.step != 1 and r.first != r.last})
    return f"{text} (step {', '.join(map(str, steps))})" if steps else text
