"""Progress of sweeps, compiles and uploads: a bar on a terminal, a line now and then elsewhere, on standard error.

A verb opens `show_progress` and calls what it gets with (step, done, total) as often as it likes. `options` adds
``--quiet`` and ``--verbose`` to a verb; what they were set to is kept in click's context, so a verb has no arguments
for them.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

import click

from cachebuilder.cli import words

F = TypeVar("F", bound=Callable[..., Any])

_QUIET, _VERBOSE = "cachebuilder.quiet", "cachebuilder.verbose"
#: Seconds between two lines of one step, at first and at most: a long step does not fill a log.
_FIRST_WAIT, _LONGEST_WAIT = 5.0, 60.0
#: No time left is said before a step has run this long and has done this share of its work.
_TOO_EARLY_SECONDS, _TOO_EARLY_SHARE = 2.0, 0.02


class Progress(Protocol):
    """What a verb calls: the step's name, how much is done, how much there is (0: not known yet).

    ``share`` is the share of the work done, 0 to 1, where it is not done / total; the time left is told from it.
    """

    def __call__(self, step: str, done: int, total: int, share: float | None = None) -> None:
        """Report."""


class Meter:
    """One step's rate and time left, from its own first report on: what a store had already took no time.

    Args:
        clock: seconds, as `time.monotonic`.
        in_bytes: done and total are bytes.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic, in_bytes: bool = False) -> None:
        self._clock = clock
        self._in_bytes = in_bytes
        self._started: tuple[float, int, float] | None = None
        self.done = self.total = 0
        self._share = 0.0
        self._told = False

    def update(self, done: int, total: int, share: float | None = None) -> None:
        """Take a report."""
        self.done, self.total, self._told = done, total, share is not None
        self._share = share if share is not None else (done / total if total else 0.0)
        if self._started is None:
            self._started = self._clock(), done, self._share

    @property
    def seconds(self) -> float:
        """Since the first report."""
        return self._clock() - self._started[0] if self._started else 0.0

    @property
    def rate(self) -> float | None:
        """Done in a second, on average; None before anything is."""
        if self._started is None or self.done <= self._started[1] or not self.seconds:
            return None
        return (self.done - self._started[1]) / self.seconds

    @property
    def left(self) -> float | None:
        """Seconds, if the rest goes as what was done did; None where that cannot be told yet."""
        if self._started is None or self.seconds < _TOO_EARLY_SECONDS:
            return None
        worked = self._share - self._started[2]
        if worked < _TOO_EARLY_SHARE * (1 - self._started[2]) or worked <= 0:
            return None
        return self.seconds * max(1 - self._share, 0.0) / worked

    def counts(self) -> str:
        """How much of how much."""
        of = f" of {self._amount(self.total)}" if self.total else ""
        return self._amount(self.done) + of

    def pace(self) -> str:
        """Rate and time left, as far as they can be told."""
        parts = []
        if self._told:  # units are not alike: how many a second would say nothing of the rest
            parts.append(f"{self._share:.0%}")
        elif self.rate is not None:
            rate = self._amount(round(self.rate)) if self._in_bytes or self.rate >= 100 else f"{self.rate:.2g}"
            parts.append(f"{rate}/s")
        if self.left is not None and self.done < self.total:
            parts.append(f"about {duration(self.left)} left")
        return ", ".join(parts)

    def __str__(self) -> str:
        return ", ".join(filter(None, (self.counts(), self.pace())))

    def _amount(self, count: int) -> str:
        return words.size(count) if self._in_bytes else str(count)


def duration(seconds: float) -> str:
    """Seconds as a person says them, no more exactly than they are known."""
    if seconds < 10:
        return f"{max(round(seconds), 1)} s"
    if seconds < 90:
        return f"{5 * round(seconds / 5)} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02} min"


class Lines:
    """Progress as lines of a log: no control characters, the more apart the longer a step takes."""

    def __init__(
        self, write: Callable[[str], None], clock: Callable[[], float] = time.monotonic, every: float | None = None
    ) -> None:
        self._write, self._clock, self._every = write, clock, every
        self._meters: dict[str, Meter] = {}
        self._next: dict[str, float] = {}
        self._wait: dict[str, float] = {}
        self._ended: set[str] = set()

    def show(self, step: str, done: int, total: int, in_bytes: bool = False, share: float | None = None) -> None:
        """Take a report; write a line if it is time for one, and a last one when all is done."""
        new = step not in self._meters
        meter = self._meters.setdefault(step, Meter(self._clock, in_bytes))
        meter.update(done, total, share)
        if new:
            self._wait[step] = self._every or _FIRST_WAIT
            self._next[step] = self._clock() + self._wait[step]
        ended = bool(total) and done >= total and step not in self._ended
        if ended:
            self._ended.add(step)
            if self._every is None and self._clock() < self._next[step] and self._wait[step] == _FIRST_WAIT:
                return  # over before the first line was due
            self._write(f"{step}: {meter.counts()}, {duration(meter.seconds)}")
        elif self._clock() >= self._next[step] and step not in self._ended and (done or total):
            if self._every is None:
                self._wait[step] = min(2 * self._wait[step], _LONGEST_WAIT)
            self._next[step] = self._clock() + self._wait[step]
            self._write(f"{step}: {meter}")


def options(verb: F) -> F:
    """Give a verb ``--quiet`` and ``--verbose``."""

    def keep(context: click.Context, parameter: click.Parameter, value: bool) -> None:
        if value:
            context.meta[_QUIET if parameter.name == "quiet" else _VERBOSE] = True

    settings: dict[str, Any] = {"is_flag": True, "expose_value": False, "callback": keep}
    verb = click.option("-v", "--verbose", help="A line of progress every second, also on a terminal.", **settings)(
        verb
    )
    return click.option("-q", "--quiet", help="Say nothing but results, warnings and errors.", **settings)(verb)


def quiet() -> bool:
    """Whether this command line said so."""
    context = click.get_current_context(silent=True)
    return bool(context and context.meta.get(_QUIET))


def remark(text: str) -> None:
    """A line on standard error for a person who watches; none when quiet."""
    if not quiet():
        click.echo(text, err=True)


@contextmanager
def show_progress(in_bytes: bool = False) -> Iterator[Progress]:
    """Where a verb reports its progress. ``in_bytes``: what is counted are bytes, as of an upload."""
    context = click.get_current_context(silent=True)
    verbose = bool(context and context.meta.get(_VERBOSE))
    if quiet():
        yield _nothing
    elif verbose or not sys.stderr.isatty():
        lines = Lines(lambda line: click.echo(line, err=True), every=1.0 if verbose else None)

        def say(step: str, done: int, total: int, share: float | None = None) -> None:
            lines.show(step, done, total, in_bytes, share)

        yield say
    else:
        with _bars(in_bytes) as show:
            yield show


def _nothing(step: str, done: int, total: int, share: float | None = None) -> None:
    pass


@contextmanager
def _bars(in_bytes: bool) -> Iterator[Progress]:
    from rich.console import Console  # slow to import, and only long steps draw
    from rich.progress import BarColumn, TextColumn
    from rich.progress import Progress as Bars

    columns = TextColumn("{task.description:<8}"), BarColumn(), TextColumn("{task.fields[said]}")
    with Bars(*columns, console=Console(stderr=True), transient=True) as bars:
        tasks: dict[str, tuple[Any, Meter]] = {}

        def show(step: str, done: int, total: int, share: float | None = None) -> None:
            if step not in tasks:
                tasks[step] = bars.add_task(step, total=None, said=""), Meter(in_bytes=in_bytes)
            task, meter = tasks[step]
            meter.update(done, total, share)
            shown = share if share is not None else (done / total if total else 0.0)
            bars.update(task, completed=shown, total=1.0 if total else None, said=str(meter))

        yield show
