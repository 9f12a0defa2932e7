"""A front end that is held behind the headers and forked for each source."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cachebuilder import building
from cachebuilder.building import Built
from cachebuilder.compiling import compiler as compiling
from cachebuilder.compiling.compiler import CompileOptions
from cachebuilder.compiling.front_end import FrontEnd, FrontEnds
from cachebuilder.compiling.steps import Steps
from cachebuilder.compiling.store import NoStore
from cachebuilder.compiling.units import Unit
from cachebuilder.errors import CompileError
from cachebuilder.manifest.inputs import load_manifest
from cachebuilder.planning.plan import Kernel

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def family(built: Built) -> tuple[Kernel, ...]:
    """Kernels with the same includes and flags."""
    return tuple(kernel for kernel in built.plan.kernels if "gemm" in kernel.name)[:3]


@pytest.fixture(scope="module")
def held(built: Built, family: tuple[Kernel, ...]) -> Iterator[FrontEnd]:
    with FrontEnds(built.inputs, 2) as front_ends:
        held = front_ends.of(family[0].source, family[0].flags)
        assert held.open(), "this nvcc's front end cannot be held"
        yield held


def test_it_makes_the_ptx_of_an_nvcc_that_reads_all_itself(
    built: Built, family: tuple[Kernel, ...], held: FrontEnd, tmp_path: Path
) -> None:
    steps = Steps(FrontEnds(built.inputs, 2), tmp_path, lambda *_: None)
    for unit in (Unit(family), Unit(family[:1])):
        assert held.takes(unit.body)
        assert steps.to_ptx(unit, held) == steps.to_ptx(unit)


def test_a_bad_source_is_refused_with_its_own_line_and_the_next_one_compiled(
    family: tuple[Kernel, ...], held: FrontEnd, tmp_path: Path
) -> None:
    unit = Unit(family[:1])
    (bad, good) = (tmp_path / "bad", tmp_path / "good")
    bad.mkdir()
    good.mkdir()
    line = unit.source.count("\n") + 1
    with pytest.raises(CompileError, match=rf'(?s)kernel\.cu\({line}\).*"not today"'):
        held.compile(unit.body + 'static_assert(false, "not today");', bad)
    held.compile(unit.body, good)
    assert ".entry" in (good / "kernel.ptx").read_text()


def test_what_the_preprocessor_would_change_is_left_to_it(held: FrontEnd, family: tuple[Kernel, ...]) -> None:
    body = Unit(family).body
    for text in ("int x = __LINE__;", "#pragma once", "auto x = INT_MAX;", "int x = __COUNTER__;"):
        assert held.takes(body) and not held.takes(body + text)


def test_one_that_is_killed_is_an_error_and_nobody_waits_for_it(
    built: Built, family: tuple[Kernel, ...], tmp_path: Path
) -> None:
    with FrontEnds(built.inputs, 1) as front_ends:
        killed = front_ends.of(family[0].source, family[0].flags)
        assert killed.open() and killed._process is not None
        os.killpg(killed._process.pid, signal.SIGKILL)
        with pytest.raises(CompileError, match="front end ended"):
            killed.compile("", tmp_path)


def test_a_compiler_that_cannot_be_held_compiles_as_ever(
    built: Built, family: tuple[Kernel, ...], tmp_path: Path
) -> None:
    nvcc = tmp_path / "nvcc"
    nvcc.write_text(f'#!/bin/sh\nunset LD_PRELOAD\nexec {built.inputs.toolchain.nvcc} "$@"\n')
    nvcc.chmod(0o755)
    inputs = dataclasses.replace(built.inputs, toolchain=dataclasses.replace(built.inputs.toolchain, nvcc=nvcc))
    with FrontEnds(inputs, 2) as front_ends:
        front_ends.expect(family[0].source, family[0].flags)
        assert not front_ends.of(family[0].source, family[0].flags).open()
    one, other = (compiling.compile_kernels(these, family[:1], store=NoStore()) for these in (inputs, built.inputs))
    assert one.cubins == other.cubins


def test_a_build_starts_it_before_the_plan_is_done_and_leaves_none_behind(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected: list[str] = []
    before = FrontEnds.expect

    def expect(self: FrontEnds, source: str, flags: tuple[str, ...]) -> None:
        expected.append(source)
        before(self, source, flags)

    monkeypatch.setattr(FrontEnds, "expect", expect)
    monkeypatch.setenv("CACHEBUILDER_CACHE_DIR", str(tmp_path / "cache"))
    done = building.build(load_manifest(small), tmp_path / "a.tar.zst", options=CompileOptions(use_store=False))
    assert {kernel.source for kernel in done.plan.kernels} <= set(expected)
    steps = [task.step for task in done.compiled.calls]
    assert steps.count("headers") >= 1 and steps.count("check") == 1
    assert _running_in(tmp_path) == []


@pytest.mark.parametrize("moment", ["reading the headers", "held"])
def test_it_ends_with_a_build_that_is_killed(
    built: Built, family: tuple[Kernel, ...], tmp_path: Path, moment: str
) -> None:
    inputs, kernel = built.inputs, family[0]
    (manifest := tmp_path / "m.yaml").write_bytes(inputs.manifest_bytes)
    (cache := tmp_path / "cache").mkdir()
    code = f"""
import time
import cachebuilder
from cachebuilder.compiling.front_end import FrontEnds
inputs = cachebuilder.load_manifest({str(manifest)!r}, deep_gemm={str(inputs.installation.imported_as)!r})
with FrontEnds(inputs, 1) as front_ends:
    front_ends.expect({kernel.source!r}, {kernel.flags!r})
    if {moment!r} == "held":
        front_ends.of({kernel.source!r}, {kernel.flags!r}).open()
    print("there", flush=True)
    time.sleep(60)
"""
    environment = os.environ | {"CACHEBUILDER_CACHE_DIR": str(cache)}
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=environment) as process:
        assert process.stdout is not None and process.stdout.readline() == b"there\n"
        _wait_for(lambda: bool(_running_in(cache)))
        process.kill()
    _wait_for(lambda: not _running_in(cache))


def _wait_for(condition: Callable[[], bool]) -> None:
    for _ in range(600):
        if condition():
            return
        time.sleep(0.1)
    raise AssertionError("waited a minute")


def _running_in(folder: Path) -> list[str]:
    """Commands of the processes whose working folder is inside ``folder``."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (process / "cwd").resolve().is_relative_to(folder):
                found.append((process / "comm").read_text())
    return found
