"""Progress of sweeps, compilations and transfers, on standard error: a bar on a terminal, lines in a log.

A verb opens `show_progress` and hands on what it yields. `options` gives a verb ``--quiet`` and ``--verbose``; click's
context keeps their values, so the verb has no arguments for them.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import click

from cachebuilder.cli import console, words
from cachebuilder.common.progress import Progress, no_progress

F = TypeVar("F", bound=Callable[..., Any])

_QUIET, _VERBOSE = "cachebuilder.quiet", "cachebuilder.verbose"
#: Seconds before the first line of a step, and at most between two of its lines: a long step does not fill a log.
_FIRST_WAIT, _LONGEST_WAIT = 5.0, 60.0
#: The time left is shown once a step has run this long and done this share of its work.
_MIN_SECONDS, _MIN_SHARE = 2.0, 0.02


class Meter:
    """One step's counts, rate and time left, measured from its first report: what a store already had took no time.

    Args:
        done: units done at the first report; ``total`` and ``share`` are those of `Progress`.
        in_bytes: the units are bytes.
        clock: seconds, as `time.monotonic`.
    """

    def __init__(
        self,
        done: int,
        total: int,
        share: float | None = None,
        in_bytes: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._in_bytes, self._clock = in_bytes, clock
        self._start = clock()
        self.update(done, total, share)
        self._first_done, self._first_share = done, self.share

    def update(self, done: int, total: int, share: float | None = None) -> None:
        """Take a report."""
        self.seconds = self._clock() - self._start
        self.done, self.total, self._reported_share = done, total, share

    @property
    def share(self) -> float:
        """The share of the work that is done, 0 to 1."""
        if self._reported_share is not None:
            return self._reported_share
        return self.done / self.total if self.total else 0.0

    @property
    def rate(self) -> float | None:
        """Units done in a second, on average; None before the first."""
        done = self.done - self._first_done
        return done / self.seconds if done > 0 and self.seconds else None

    @property
    def left(self) -> float | None:
        """Seconds until the end at the average speed so far; None while it is too early to say."""
        worked = self.share - self._first_share
        if self.seconds < _MIN_SECONDS or worked <= 0 or worked < _MIN_SHARE * (1 - self._first_share):
            return None
        return self.seconds * max(1 - self.share, 0.0) / worked

    def counts(self) -> str:
        """Units done, of how many."""
        return self._amount(self.done) + (f" of {self._amount(self.total)}" if self.total else "")

    def pace(self) -> str:
        """Rate and time left, as far as they are known."""
        parts = []
        if self._reported_share is not None:  # the units differ in size, so their rate says nothing about the rest
            parts.append(f"{self.share:.0%}")
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
    """Seconds in words, rounded as roughly as an estimate deserves."""
    if seconds < 10:
        return f"{max(round(seconds), 1)} s"
    if seconds < 90:
        return f"{5 * round(seconds / 5)} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02} min"


class Lines:
    """Progress as lines of a log, without control characters. It is a `Progress`.

    Args:
        write: takes one line.
        every: seconds between two lines of one step; None: more and more as the step goes on, and no line at all for a
            step shorter than the first wait.
        in_bytes: the units are bytes.
        clock: seconds, as `time.monotonic`.
    """

    def __init__(
        self,
        write: Callable[[str], object],
        every: float | None = None,
        in_bytes: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._write, self._every, self._in_bytes, self._clock = write, every, in_bytes, clock
        self._meters: dict[str, Meter] = {}
        #: For each step, how many seconds after its start the next line is due; infinite after its last line.
        self._due: dict[str, float] = {}

    def __call__(self, step: str, done: int, total: int, share: float | None = None) -> None:
        """Take a report. Write a line if one is due, and the last one when the step has ended."""
        if step not in self._meters:
            self._meters[step] = Meter(done, total, share, self._in_bytes, self._clock)
            self._due[step] = self._wait(0.0)
        meter = self._meters[step]
        meter.update(done, total, share)
        if total and done >= total:
            if self._due[step] < math.inf and (self._every or meter.seconds >= _FIRST_WAIT):
                self._write(f"{step}: {meter.counts()}, {duration(meter.seconds)}")
            self._due[step] = math.inf
        elif (done or total) and meter.seconds >= self._due[step]:
            self._due[step] = meter.seconds + self._wait(meter.seconds)
            self._write(f"{step}: {meter}")

    def _wait(self, seconds: float) -> float:
        """Seconds until the next line of a step that has run for ``seconds``."""
        return self._every or min(seconds + _FIRST_WAIT, _LONGEST_WAIT)


def options(verb: F) -> F:
    """Give a verb ``--quiet`` and ``--verbose``."""

    def keep(context: click.Context, parameter: click.Parameter, value: bool) -> None:
        if value:
            context.meta[_QUIET if parameter.name == "quiet" else _VERBOSE] = True

    settings: dict[str, Any] = {"is_flag": True, "expose_value": False, "callback": keep}
    verbose = click.option("-v", "--verbose", help="A line of progress every second, even on a terminal.", **settings)
    quiet = click.option("-q", "--quiet", help="Print only results, warnings and errors.", **settings)
    return quiet(verbose(verb))


def quiet() -> bool:
    """Whether the command line has ``--quiet``."""
    return _is_set(_QUIET)


def _is_set(key: str) -> bool:
    context = click.get_current_context(silent=True)
    return bool(context and context.meta.get(key))


def remark(text: str) -> None:
    """Print a line for a person who watches, on standard error; nothing with ``--quiet``."""
    if not quiet():
        console.echo(text, err=True)


@contextmanager
def show_progress(in_bytes: bool = False) -> Iterator[Progress]:
    """The `Progress` that this command line asks for. ``in_bytes``: the units are bytes, as of an upload."""
    verbose = _is_set(_VERBOSE)
    if quiet():
        yield no_progress
    elif verbose or not sys.stderr.isatty():
        yield Lines(lambda line: console.echo(line, err=True), 1.0 if verbose else None, in_bytes)
    else:
        with _bars(in_bytes) as bars:
            yield bars


@contextmanager
def _bars(in_bytes: bool) -> Iterator[Progress]:
    from rich.console import Console  # slow to import, and needed on a terminal only
    from rich.progress import BarColumn, TaskID, TextColumn
    from rich.progress import Progress as Bars

    name, text = (TextColumn(form, markup=False) for form in ("{task.description:<8}", "{task.fields[text]}"))
    columns = name, BarColumn(), text
    with Bars(*columns, console=Console(stderr=True), transient=True) as bars:
        steps: dict[str, tuple[TaskID, Meter]] = {}

        def show(step: str, done: int, total: int, share: float | None = None) -> None:
            if step not in steps:
                steps[step] = (
                    bars.add_task(console.printable(step), total=None, text=""),
                    Meter(done, total, share, in_bytes),
                )
            task, meter = steps[step]
            meter.update(done, total, share)
            bars.update(task, completed=meter.share, total=1.0 if total else None, text=str(meter))

        yield show
