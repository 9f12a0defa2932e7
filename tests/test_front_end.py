"""A front end that is held at the end of the headers and forks for each source."""

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
from cachebuilder.compiling import heads
from cachebuilder.compiling.compiler import CompileOptions, Compiler
from cachebuilder.compiling.front_end import FrontEnd, FrontEnds
from cachebuilder.compiling.steps import Steps
from cachebuilder.compiling.store import CubinStore, NoStore
from cachebuilder.compiling.units import Unit
from cachebuilder.errors import CompileError
from cachebuilder.manifest.inputs import load_manifest
from cachebuilder.planning.plan import Kernel
from tests.conftest import own_cache
from tests.test_compile import light_kernels

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def family(built: Built) -> tuple[Kernel, ...]:
    """Kernels with the same includes and flags. The legacy ones are light: to the compiler the generations are alike."""
    if built.plan.generation == "legacy":
        return tuple(light_kernels(built))
    return tuple(kernel for kernel in built.plan.kernels if "gemm" in kernel.name)[:3]


@pytest.fixture(scope="module")
def light(built: Built) -> Kernel:
    """The kernel with the shortest headers, for tests of when a front end starts and ends."""
    return next(kernel for kernel in built.plan.kernels if kernel.name == "transpose_fp32")


@pytest.fixture(scope="module")
def held(built: Built, family: tuple[Kernel, ...]) -> Iterator[FrontEnd]:
    with FrontEnds(built.inputs, 2) as front_ends:
        held = front_ends.of(family[0].source, family[0].flags)
        assert held.open(), "this nvcc's front end cannot be held"
        yield held


def test_a_held_front_end_makes_the_same_ptx_as_nvcc(
    built: Built, family: tuple[Kernel, ...], held: FrontEnd, tmp_path: Path
) -> None:
    steps = Steps(FrontEnds(built.inputs, 2), tmp_path, lambda *_: None)
    several, one = Unit(family), Unit(family[:1])
    assert held.takes(several.body) and held.takes(one.body)
    modules = steps.to_ptx(several)
    assert steps.to_ptx(several, held) == modules
    assert steps.to_ptx(one, held) == modules[:1]


@pytest.mark.parametrize("deep_gemm", ["deepjit"], indirect=True, scope="session")
def test_a_bad_source_is_refused_with_its_line_number_and_the_next_source_compiles(
    family: tuple[Kernel, ...], held: FrontEnd, tmp_path: Path
) -> None:
    unit = Unit(family[:1])
    bad, good = tmp_path / "bad", tmp_path / "good"
    bad.mkdir()
    good.mkdir()
    line = unit.source.count("\n") + 1
    with pytest.raises(CompileError, match=rf'(?s)kernel\.cu\({line}\).*"not today"'):
        held.compile(unit.body + 'static_assert(false, "not today");', bad)
    held.compile(unit.body, good)
    assert ".entry" in (good / "kernel.ptx").read_text()


@pytest.mark.parametrize("deep_gemm", ["deepjit"], indirect=True, scope="session")
@pytest.mark.parametrize("text", ["int x = __LINE__;", "#pragma once", "auto x = INT_MAX;", "int x = __COUNTER__;"])
def test_a_source_that_the_preprocessor_would_change_is_not_taken(
    text: str, held: FrontEnd, family: tuple[Kernel, ...]
) -> None:
    body = Unit(family).body
    assert held.takes(body) and not held.takes(body + text)


@pytest.mark.parametrize("deep_gemm", ["deepjit"], indirect=True, scope="session")
def test_a_killed_front_end_is_an_error_and_does_not_block(
    built: Built, light: Kernel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = own_cache(tmp_path / "cache")
    monkeypatch.setenv("CACHEBUILDER_CACHE_DIR", str(cache))
    with FrontEnds(built.inputs, 1) as front_ends:
        front_end = front_ends.of(light.source, light.flags)
        assert front_end.open()
        for process in _processes_in(cache):
            os.kill(process, signal.SIGKILL)
        with pytest.raises(CompileError, match="front end was killed"):
            front_end.compile("", tmp_path)


@pytest.mark.parametrize("deep_gemm", ["deepjit"], indirect=True, scope="session")
def test_a_compiler_that_cannot_be_held_makes_the_same_cubin(built: Built, light: Kernel, tmp_path: Path) -> None:
    nvcc = tmp_path / "nvcc"
    nvcc.write_text(f'#!/bin/sh\nunset LD_PRELOAD\nexec {built.inputs.toolchain.nvcc} "$@"\n')
    nvcc.chmod(0o755)
    inputs = dataclasses.replace(built.inputs, toolchain=dataclasses.replace(built.inputs.toolchain, nvcc=nvcc))
    with FrontEnds(inputs, 2) as front_ends:
        front_ends.expect(light.source, light.flags)
        assert not front_ends.of(light.source, light.flags).open()
    cubins = compiling.compile_kernels(inputs, [light], CompileOptions(check_code=0), NoStore()).cubins
    assert cubins == {light.entry: built.compiled.cubins[light.entry]}


def test_a_build_starts_a_front_end_while_it_plans_and_leaves_none_running(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CACHEBUILDER_CACHE_DIR", str(own_cache(tmp_path / "cache")))
    options = CompileOptions(jobs=1, use_store=False)
    built = building.build(load_manifest(tiny), tmp_path / "a.tar.zst", options=options)
    steps = [call.step for call in built.compiled.calls]
    # With one job there is one unit for each set of headers, and such a unit starts no front end itself.
    assert steps.count("headers") == 1 and steps.count("check") == 1
    assert _processes_in(tmp_path) == []


@pytest.mark.parametrize("deep_gemm", ["deepjit"], indirect=True, scope="session")
def test_a_build_starts_the_front_ends_of_the_last_build_of_these_ops(
    built: Built, light: Kernel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CACHEBUILDER_CACHE_DIR", str(own_cache(tmp_path / "cache")))
    inputs, expected = built.inputs, {light.entry: built.compiled.cubins[light.entry]}
    no_store = CompileOptions(use_store=False, check_code=0)
    with Compiler(inputs, no_store) as compiler:
        compiler.prepare()
        assert not compiler._front_ends.expected(light.source, light.flags)
        assert compiler.compile([light]).cubins == expected
    store = CubinStore(tmp_path / "cubins")
    with Compiler(inputs, CompileOptions(check_code=0), store) as compiler:
        compiler.prepare()
        assert compiler._front_ends.expected(light.source, light.flags)
        assert compiler.compile([light]).cubins == expected
    with Compiler(inputs, CompileOptions(), store) as compiler:  # the store has all
        compiler.prepare()
        assert compiler.compile([light]).reused == 1
    assert _processes_in(tmp_path) == []
    [kept] = (tmp_path / "cache" / "headers").iterdir()
    headers = kept.read_text()
    kept.write_text(headers.replace("smxx_", "sm89_"))
    assert kept.read_text() != headers
    with Compiler(inputs, no_store) as compiler:  # headers that do not exist
        compiler.prepare()
        assert compiler.compile([light]).cubins == expected
    kept.write_text("{}")
    assert heads.read(inputs) == ()


@pytest.mark.parametrize("deep_gemm", ["deepjit"], indirect=True, scope="session")
@pytest.mark.parametrize("moment", ["reading the headers", "held"])
def test_a_front_end_ends_when_its_build_is_killed(built: Built, light: Kernel, tmp_path: Path, moment: str) -> None:
    inputs = built.inputs
    manifest, cache = tmp_path / "m.yaml", own_cache(tmp_path / "cache")
    manifest.write_bytes(inputs.manifest_bytes)
    code = f"""
import time
import cachebuilder
from cachebuilder.compiling.front_end import FrontEnds
inputs = cachebuilder.load_manifest({str(manifest)!r}, deep_gemm={str(inputs.installation.imported_as)!r})
with FrontEnds(inputs, 1) as front_ends:
    front_ends.expect({light.source!r}, {light.flags!r})
    if {moment!r} == "held":
        front_ends.of({light.source!r}, {light.flags!r}).open()
    print("started", flush=True)
    time.sleep(60)
"""
    environment = os.environ | {"CACHEBUILDER_CACHE_DIR": str(cache)}
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=environment) as process:
        assert process.stdout is not None and process.stdout.readline() == b"started\n"
        _wait_for(lambda: bool(_processes_in(cache)))
        process.kill()
    _wait_for(lambda: not _processes_in(cache))


def _wait_for(condition: Callable[[], bool]) -> None:
    for _ in range(600):
        if condition():
            return
        time.sleep(0.1)
    raise AssertionError("waited a minute")


def _processes_in(folder: Path) -> list[int]:
    """The processes whose working folder is inside ``folder``."""
    processes = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended meanwhile, or it is another user's
            if (process / "cwd").readlink().is_relative_to(folder):
                processes.append(int(process.name))
    return processes
