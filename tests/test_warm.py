"""Sweeps in forks of one process that has imported torch: they find what sweeps in processes of their own find."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from cachebuilder.errors import PlanError
from cachebuilder.manifest.inputs import load_manifest
from cachebuilder.planning import make as planning
from cachebuilder.planning.kept import KeptPlans
from cachebuilder.planning.plan import Plan
from cachebuilder.sweep import warm

pytestmark = pytest.mark.slow


@pytest.fixture
def plan(small: Path, deep_gemm: Path | None) -> Callable[[], Plan]:
    """Makes the small manifest's plan anew."""
    return lambda: planning.make(load_manifest(small, deep_gemm=deep_gemm), plans=KeptPlans(own=False))


def running() -> warm.Server:
    server = warm._server.get()
    assert server is not None, "conftest.py keeps one"
    return server


def test_a_fork_plans_what_a_process_of_its_own_plans(
    plan: Callable[[], Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    forked = plan(), plan()
    processes = []

    class Noted(warm.Process):
        def __init__(self, command: list[str], environment: Mapping[str, str], log: Path) -> None:
            processes.append(command)
            super().__init__(command, environment, log)

    monkeypatch.setattr(warm, "Process", Noted)
    assert plan().kernels == forked[0].kernels and not processes
    token = warm._server.set(None)
    own = plan()
    warm._server.reset(token)
    assert len(processes) == 1
    for one in forked:
        assert one.kernels == own.kernels and one.calls == own.calls


@pytest.mark.parametrize("deep_gemm", ["deepjit"], indirect=True, scope="session")
def test_torch_is_imported_anew_for_a_variable_that_it_reads_when_it_is_imported(
    plan: Callable[[], Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    plan()
    first = running()._process
    plan()
    assert running()._process is first
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    plan()
    assert running()._process is not first


@pytest.mark.parametrize("deep_gemm", ["deepjit"], indirect=True, scope="session")
def test_a_server_that_was_killed_is_replaced(plan: Callable[[], Plan]) -> None:
    before = plan()
    process = running()._process
    assert process is not None
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert plan().kernels == before.kernels  # in a process of its own
    assert plan().kernels == before.kernels
    replaced = running()._process
    assert replaced is not None and replaced.pid != process.pid and replaced.poll() is None


def test_a_fork_that_dies_is_named_with_its_op_and_leaves_the_server_running(
    small: Path, tmp_path: Path, plan: Callable[[], Plan]
) -> None:
    plan()
    copy = tmp_path / "deep_gemm"
    (copy / "include" / "deep_gemm").mkdir(parents=True)
    (copy / "__init__.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)\n")
    (copy / "_C.so").write_bytes(b".committed")
    (copy / "include" / "cutlass").mkdir()
    (copy / "include" / "cutlass" / "version.h").write_text(
        "".join(f"#define CUTLASS_{part} 1\n" for part in ("MAJOR", "MINOR", "PATCH"))
    )
    with pytest.raises(Exception, match="signal 9") as error:
        planning.make(load_manifest(small, deep_gemm=copy))
    assert not isinstance(error.value, PlanError | KeyboardInterrupt)
    process = running()._process
    assert process is not None and process.poll() is None
