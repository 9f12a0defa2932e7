"""The record of a build, a file beside the artifact."""

from itertools import pairwise
from pathlib import Path

import pytest

from cachebuilder import building
from cachebuilder.artifact.read import open_archive
from cachebuilder.building import Built
from cachebuilder.compiling import compiler as compiling
from cachebuilder.compiling import record as build_record
from cachebuilder.compiling.compiler import CompileOptions
from cachebuilder.compiling.store import NoStore


def test_the_record_says_which_compiler_ran_when_and_on_what(built: Built) -> None:
    record = build_record.read(built.packed.path, built.packed.sha256)
    assert record is not None and record.jobs >= 1
    compiled_entries = [entry for call in record.runs if call.step == "cubin" for entry in call.entries]
    assert set(compiled_entries) <= {kernel.entry for kernel in built.plan.kernels}
    assert len(compiled_entries) == len(set(compiled_entries)) == record.compiled > 0
    assert record.compiled + record.reused == len(built.plan.kernels)
    assert {call.job for call in record.runs} <= set(range(record.jobs))
    for job in range(record.jobs):  # a job runs one compiler at a time
        times = sorted((call.start, call.start + call.seconds) for call in record.runs if call.job == job)
        assert all(end <= start + 0.01 for (_, end), (start, _) in pairwise(times))


@pytest.mark.slow
def test_each_call_of_nvcc_is_recorded_with_its_phases(built: Built) -> None:
    kernel = next(kernel for kernel in built.plan.kernels if kernel.name == "transpose_fp32")
    options = CompileOptions(jobs=2, check_code=0)
    ptx, cubin = compiling.compile_kernels(built.inputs, [kernel], options, NoStore()).calls
    assert (ptx.step, cubin.step) == ("ptx", "cubin") and ptx.entries == cubin.entries == (kernel.entry,)
    assert "cicc" in {phase.name for phase in ptx.phases} and "ptxas" in {phase.name for phase in cubin.phases}
    assert 0 < sum(phase.seconds for phase in ptx.phases) <= ptx.seconds < cubin.start + cubin.seconds


def test_the_record_is_not_part_of_the_artifact(built: Built, tmp_path: Path) -> None:
    again = building.build(built.inputs, tmp_path / built.packed.path.name)
    assert again.packed.path.read_bytes() == built.packed.path.read_bytes()
    record = build_record.read(again.packed.path, again.packed.sha256)
    assert record is not None and record.reused == len(again.plan.kernels) and not record.runs
    with open_archive(again.packed.path) as archive:
        assert not [member for member, _ in archive.files() if "build" in member.file.name]


def test_a_record_that_is_missing_damaged_or_of_another_artifact_is_not_read(built: Built, tmp_path: Path) -> None:
    assert build_record.read(built.packed.path, "0" * 64) is None
    assert build_record.read(tmp_path / "none.tar.zst", built.packed.sha256) is None
    (tmp_path / "bad.tar.zst.build.json").write_text("{")
    assert build_record.read(tmp_path / "bad.tar.zst", built.packed.sha256) is None
