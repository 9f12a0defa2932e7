"""A sweep whose calls are spread over several processes finds, counts and refuses what one process does."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cachebuilder.common.progress import no_progress
from cachebuilder.errors import CacheBuilderError
from cachebuilder.manifest.inputs import load_manifest
from cachebuilder.planning import make as planning
from cachebuilder.planning.kept import KeptPlans
from cachebuilder.sweep import protocol, run
from cachebuilder.sweep.process import Setting
from cachebuilder.sweep.protocol import Answer, SweepJob
from cachebuilder.sweep.recorder import recording_compiler
from tests.test_plan import fake_deep_gemm

pytestmark = pytest.mark.slow

SEVERAL_OPS = """\
name: several-ops
target: {gpu: H200, sm_counts: [132, 64]}
max_tokens: 1700
ops:
  - {op: fp8_gemm_nt, n: 576, k: 512}
  - {op: m_grouped_fp8_gemm_nt_contiguous, experts: 2, topk: 1, n: 256, k: 512}
  - {op: fp8_gemm_nt, n: 2112, k: 1024, compiled_dims: nk, sm_counts: [100]}
"""


def test_a_plan_is_the_same_however_its_calls_are_spread(
    deep_gemm: Path | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (manifest := tmp_path / "m.yaml").write_text(SEVERAL_OPS)
    inputs = load_manifest(manifest, deep_gemm=deep_gemm)
    plans = []
    for processes in (1, 2, 5):
        monkeypatch.setattr(protocol, "available_cores", lambda processes=processes: processes)
        plans.append(
            planning.make(inputs, plans=KeptPlans(own=False)).model_copy(update={"peak_bytes": 0}).model_dump_json()
        )
    assert plans[0] == plans[1] == plans[2]


TWO_OPS = """\
name: two-ops
target: {gpu: H200}
max_tokens: 1400
ops: [{op: fp8_gemm_nt, n: 576, k: 512}, {op: fp8_gemm_nt, n: 64, k: 512}]
"""
#: Notes each process that calls it. The functions have the op's N and M.
NOTING = """
import os, signal, time
from pathlib import Path
here = Path(__file__).parent
def fp8_gemm_nt(a, b, d):
    (here / f"process-{os.getpid()}").touch()
    call(d.shape[1], d.shape[0])
"""


class Sweeps:
    """Sweeps of `TWO_OPS` with a DeepGEMM whose calls do what ``body`` says."""

    def __init__(self, folder: Path, body: str) -> None:
        self.package = fake_deep_gemm(folder, NOTING + body)
        (folder / "m.yaml").write_text(TWO_OPS)
        self._inputs = load_manifest(folder / "m.yaml", deep_gemm=self.package)
        self._folder = folder

    def __call__(self, processes: int, progress: Any = no_progress, **options: Any) -> Answer:
        for noted in self.package.glob("process-*"):
            noted.unlink()
        scratch = self._folder / f"{time.monotonic()}"
        (scratch / "root").mkdir(parents=True)
        compiler = recording_compiler(scratch, self._inputs.toolchain.version_text)
        job = SweepJob.of(self._inputs.manifest, self._inputs.installation, **options)
        setting = Setting("plan", compiler, [scratch / "root"], scratch)
        return run.call(job.model_copy(update={"processes": processes}), setting, progress)

    @property
    def processes(self) -> list[int]:
        """Those that made the last sweep's calls."""
        return [int(path.name.partition("-")[2]) for path in self.package.glob("process-*")]

    def left(self) -> list[int]:
        """Which of them still run, after a moment."""
        deadline = time.monotonic() + 10
        while (running := [process for process in self.processes if is_running(process)]) and (
            time.monotonic() < deadline
        ):
            time.sleep(0.05)
        return running


def is_running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.fixture
def sweeps(tmp_path: Path) -> Callable[[str], Sweeps]:
    return lambda body: Sweeps(tmp_path, body)


def error_of(sweep: Callable[[], object]) -> str:
    with pytest.raises(CacheBuilderError) as error:
        sweep()
    return str(error.value)


def without_memory(answer: Answer) -> Answer:
    return answer.model_copy(update={"peak_bytes": 0})


def test_several_processes_call_deepgemm_and_what_they_found_is_joined(sweeps: Callable[[str], Sweeps]) -> None:
    sweep = sweeps("def call(n, m): time.sleep(1e-4)")
    one = sweep(1)
    assert len(sweep.processes) == 1
    several = sweep(4)
    assert len(sweep.processes) > 1
    assert without_memory(several) == without_memory(one)
    assert one.calls == 2800 and [len(swept.spans) for swept in one.sweeps] == [1, 1]


def test_refusals_are_those_of_one_process_and_the_ops_end_there(sweeps: Callable[[str], Sweeps]) -> None:
    sweep = sweeps("def call(n, m): assert m not in ((700, 1390) if n == 576 else (1200,)), f'{n} {m}'")
    answers = [without_memory(sweep(processes, go_on=True)) for processes in (1, 2, 5)]
    assert answers[0] == answers[1] == answers[2]
    assert [(refusal.op, refusal.value) for refusal in answers[0].refusals] == [(0, 700), (1, 1200)]
    assert answers[0].calls == 699 + 1199


def test_the_error_is_the_first_in_the_manifests_order(sweeps: Callable[[str], Sweeps]) -> None:
    # The second op fails at once, the first late.
    sweep = sweeps("def call(n, m): assert m != (1300 if n == 576 else 1), 'no'")
    assert {error_of(lambda processes=processes: sweep(processes)) for processes in (1, 2, 5)} == {
        "ops[0] fp8_gemm_nt n=576 k=512 at m 1300: DeepGEMM refused: no"
    }


def test_calls_that_the_virtual_gpu_does_not_answer_are_named_alike(sweeps: Callable[[str], Sweeps]) -> None:
    sweep = sweeps(
        "import ctypes\ndef call(n, m):\n"
        " if m in (2, 900): getattr(ctypes.CDLL(None), 'cudaDeviceReset' if m == 900 else 'cudaDeviceGetLimit')()"
    )
    errors = [error_of(lambda processes=processes: sweep(processes)) for processes in (1, 2, 5)]
    assert errors[0] == errors[1] == errors[2]
    assert "does not answer cudaDeviceGetLimit, cudaDeviceReset" in errors[0]


@pytest.mark.parametrize("end", ["os.kill(os.getpid(), signal.SIGKILL)", "os._exit(3)"])
def test_a_process_that_dies_is_named_with_its_point_and_no_other_goes_on(
    end: str, sweeps: Callable[[str], Sweeps]
) -> None:
    sweep = sweeps(f"def call(n, m):\n time.sleep(1e-3)\n if n == 64 and m == 30: {end}")
    errors = [error_of(lambda processes=processes: sweep(processes)) for processes in (1, 5)]
    assert errors[0] == errors[1]
    assert "ops[1] fp8_gemm_nt n=64 k=512 at m 30" in errors[0]
    assert not sweep.left()


def test_an_interrupt_ends_all_processes(sweeps: Callable[[str], Sweeps]) -> None:
    sweep = sweeps("def call(n, m): time.sleep(0.01)")

    def interrupt(step: str, done: int, total: int, share: float | None = None) -> None:
        if len(sweep.processes) > 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sweep(5, interrupt)
    assert len(sweep.processes) > 1
    assert not sweep.left()


def test_all_calls_are_counted_and_the_self_check_is_made_once(sweeps: Callable[[str], Sweeps]) -> None:
    sweep = sweeps("def call(n, m): pass")
    layout = sweep.package / "utils" / "layout.py"
    layout.write_text(layout.read_text().replace("(t):", "(t):\n open(__file__ + '.checks', 'a').write('x')\n"))
    seen: list[tuple[int, int]] = []
    answer = sweep(5, lambda step, done, total, share=None: seen.append((done, total)))
    assert seen[-1] == (2800, 2800) and {total for _, total in seen} <= {0, 2800}
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert answer.calls == 2800
    assert (sweep.package / "utils" / "layout.py.checks").read_text() == "x"
