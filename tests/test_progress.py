"""The progress of a run: a bar on a terminal, lines in a log, nothing with --quiet."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cachebuilder.building import Built
from cachebuilder.cli.progress import Lines, Meter, duration
from tests.conftest import Run
from tests.terminals import on_a_terminal


class Clock:
    """A clock that a test sets."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.slow
def test_a_log_gets_lines_without_control_characters(small: Path, run: Run) -> None:
    done = run("plan", small, "--no-store", "--verbose")
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[-1].startswith("plan: 43 of 43, ")
    assert not {"\r", "\x1b"} & set(done.stderr)


@pytest.mark.slow
def test_a_terminal_gets_a_bar_that_goes_away(small: Path) -> None:
    text = on_a_terminal(2, "plan", small, "--no-store")
    assert "plan" in text and "━" in text
    assert text.rstrip().endswith("\x1b[2K"), "the bar's line is cleared"


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["plan", "build"])
def test_quiet_says_nothing_of_a_run(verb: str, small: Path, built: Built, run: Run, tmp_path: Path) -> None:
    here = ["--deep-gemm", built.inputs.installation.imported_as]
    output = ["-o", tmp_path / "small.tar.zst"] if verb == "build" else []
    done = run(verb, small, *output, *here, "--quiet")
    assert done.returncode == 0 and done.stderr == ""
    assert bool(done.stdout) == (verb == "plan"), "a plan's table is its result; of a build that is the file"
    assert verb == "plan" or (tmp_path / "small.tar.zst").read_bytes() == built.packed.path.read_bytes()


def test_quiet_keeps_warnings_and_errors(built: Built, run: Run, tmp_path: Path) -> None:
    here = ["--deep-gemm", built.inputs.installation.imported_as]
    done = run("restore", built.packed.path, "--to", tmp_path / "to", *here, "--quiet")
    assert done.returncode == 0 and done.stdout == ""
    assert done.stderr.startswith("unchecked origin") and "restored" not in done.stderr
    done = run("plan", tmp_path / "none.yaml", "--quiet")
    assert done.returncode == 3 and "none.yaml" in done.stderr


@given(
    st.floats(0.05, 0.9), st.floats(10, 10_000), st.integers(100, 10_000), st.floats(0, 0.5)
)  # share worked so far, seconds in all, units in all, share that the store already had
def test_the_time_left_of_steady_work_is_what_it_will_take(
    worked: float, seconds: float, total: int, stored: float
) -> None:
    clock = Clock()
    begun = int(total * stored)
    meter = Meter(begun, total, clock=clock)
    clock.now = seconds * worked
    meter.update(begun + round((total - begun) * worked), total)
    if meter.left is None:
        assert clock.now < 2.0 or worked < 0.06
    else:
        assert meter.left == pytest.approx(seconds * (1 - worked), rel=0.3, abs=1)


def test_what_the_store_had_counts_for_no_speed() -> None:
    clock = Clock()
    meter = Meter(160, 169, clock=clock)
    assert meter.rate is None and meter.left is None
    clock.now = 10.0
    meter.update(163, 169)
    assert meter.rate == pytest.approx(0.3) and str(meter) == "163 of 169, 0.3/s, about 20 s left"


def test_no_time_left_is_said_before_it_can_be_known() -> None:
    clock = Clock()
    meter = Meter(0, 1000, clock=clock)
    clock.now = 1.0
    meter.update(500, 1000)
    assert "left" not in str(meter), "too short a time"
    clock.now = 60.0
    meter.update(1, 1000)
    assert "left" not in str(meter), "too little done"


def test_bytes_are_told_as_bytes() -> None:
    clock = Clock()
    meter = Meter(0, 10_000_000, in_bytes=True, clock=clock)
    clock.now = 4.0
    meter.update(2_000_000, 10_000_000)
    assert str(meter) == "2.0 MB of 10.0 MB, 500.0 kB/s, about 15 s left"


def test_a_long_step_does_not_fill_a_log() -> None:
    clock, lines = Clock(), []
    log = Lines(lines.append, clock=clock)
    for second in range(3600):
        clock.now = float(second)
        log("compile", second, 3600)
    log("compile", 3600, 3600)
    assert lines[0] == "compile: 5 of 3600, 1/s"
    assert lines[1] == "compile: 15 of 3600, 1/s" and len(lines) < 70
    assert lines[-1] == "compile: 3600 of 3600, 60 min"


def test_work_whose_units_come_late_is_told_by_its_share() -> None:
    """A compilation's kernels all come after the front end: by their rate, minutes of work would look like an hour."""
    clock = Clock()
    meter = Meter(0, 100, 0.0, clock=clock)
    clock.now = 100.0
    meter.update(1, 100, 0.5)
    assert str(meter) == "1 of 100, 50%, about 2 min left"
    clock.now = 200.0
    meter.update(100, 100, 1.0)
    assert meter.left == 0 and "left" not in str(meter)


def test_nothing_is_said_before_it_is_known_how_much_there_is() -> None:
    clock, lines = Clock(), []
    log = Lines(lines.append, every=1.0, clock=clock)
    for clock.now in (0.0, 3.0, 6.0):
        log("plan", 0, 0)
    assert lines == []
    log("plan", 1, 40)
    assert len(lines) == 1


def test_a_short_step_says_nothing_in_a_log_and_its_end_when_verbose() -> None:
    for every, said in ((None, []), (1.0, ["pack: 3 of 3, 1 s"])):
        lines: list[str] = []
        log = Lines(lines.append, every, clock=Clock())
        for done in (0, 1, 2, 3):
            log("pack", done, 3)
        assert lines == said


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.1, "1 s"), (9, "9 s"), (12, "10 s"), (88, "90 s"), (200, "3 min"), (5300, "88 min"), (7300, "2 h 02 min")],
)
def test_a_duration_is_no_more_exact_than_it_is_known(seconds: float, words: str) -> None:
    assert duration(seconds) == words
