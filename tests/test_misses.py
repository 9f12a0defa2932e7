from __future__ import annotations

import json
from pathlib import Path

import pytest

from cachebuilder import building
from cachebuilder.authoring import sources
from cachebuilder.authoring.sources import NewSource
from cachebuilder.deepgemm.source import read_shape
from cachebuilder.errors import PlanError
from cachebuilder.manifest.inputs import load_manifest
from cachebuilder.planning import make as planning
from cachebuilder.restoring import misses
from tests.conftest import SMALL, Run
from tests.restored import check
from tests.test_plan import EVERY_OP


def log_of(folder: Path, *entries: tuple[str, int | None, str | None]) -> Path:
    """A log as the frozen nvcc writes it, from (kernel, time, source) of each request."""
    log = folder / "misses.jsonl"
    (folder / "misses.jsonl.d").mkdir()
    lines = []
    for number, (kernel, time, source) in enumerate(entries):
        copy = folder / "misses.jsonl.d" / f"{number}.cu"
        if source is not None:
            copy.write_text(source)
        line = {"time": time, "pid": 1, "kernel": kernel, "policy": "refuse", "artifact": "small"}
        line |= {"fingerprint": "0", "command": "nvcc …", "source": str(copy) if source is not None else None}
        lines.append(json.dumps(line))
    log.write_text("\n".join(lines) + "\n")
    return log


def check_sources(gpu: str, deep_gemm: Path | None, folder: Path) -> None:
    (folder / "m.yaml").write_text(EVERY_OP.format(gpu=gpu))
    inputs = load_manifest(folder / "m.yaml", deep_gemm=deep_gemm)
    plan = planning.make(inputs)
    for kernel in plan.kernels:
        shape = read_shape(kernel.source)
        if "GemmType" not in kernel.source:
            assert shape is None, kernel.source
            continue
        assert shape is not None, kernel.source
        op = plan.ops[kernel.selected_by[0].op]
        assert (shape.op, shape.sm_count) == (op["op"], plan.gpu.sm_count), kernel.source
        assert shape.experts == op.get("experts")
        assert (shape.n, shape.k) in ((None, None), (op["n"], op["k"])), kernel.source
        assert shape.n is not None or op["op"] == "fp8_gemm_nt"


@pytest.mark.slow
@pytest.mark.parametrize("gpu", ["H200", "B200"])
def test_every_gemm_kernel_of_a_plan_says_its_op_and_shape(gpu: str, deep_gemm: Path | None, tmp_path: Path) -> None:
    check_sources(gpu, deep_gemm, tmp_path)


@pytest.mark.slow
def test_every_gemm_kernel_for_blackwell_workstations_says_its_op_and_shape(tmp_path: Path) -> None:
    check_sources("RTX-PRO-6000", None, tmp_path)


def test_equal_sources_are_one_kernel_with_a_count_and_two_times(
    built: building.Built, run: Run, tmp_path: Path
) -> None:
    by_name = {kernel.name: kernel.source for kernel in built.plan.kernels}
    grouped = by_name["sm90_m_grouped_fp8_gemm_contiguous_1d2d"]
    dense = by_name["sm90_fp8_gemm_1d2d"]
    kernel = "sm90_fp8_gemm_1d2d"
    log = log_of(tmp_path, (kernel, 1_700_000_000, grouped), (kernel, None, dense), (kernel, 1_700_000_060, grouped))
    result = run("misses", log)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(
        "sm90_fp8_gemm_1d2d: 2 times, 2023-11-14 22:13:20Z to 2023-11-14 22:14:20Z\n"
        "  not in small\n"
        "  - {op: m_grouped_fp8_gemm_nt_contiguous, experts: 2, topk: ?, n: 256, k: 512}\n"
        "  under target.sm_counts, or the op's own: 132\n"
        "sm90_fp8_gemm_1d2d: 1 time, at an unknown time\n"
    )
    assert "- {op: fp8_gemm_nt, n: ?, k: ?}" in result.stdout and "serves many shapes" in result.stdout
    assert "kernels missed: 2, requests: 3" in result.stdout
    assert all(len(line) <= 80 for line in result.stdout.splitlines() if "- {" not in line)
    document = json.loads(run("misses", log, "--json").stdout)
    assert [miss["count"] for miss in document["misses"]] == [2, 1]
    assert document["misses"][0]["shape"]["op"] == "m_grouped_fp8_gemm_nt_contiguous"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("EpilogueIdentity", "EpilogueHeadSplits<128, 64, 128>"),
        ("Major::K", "Major::MN"),
        ("GemmType::MGroupedContiguous", "GemmType::KGroupedContiguous"),
    ],
)
def test_a_kernel_that_no_op_asks_for_is_not_given_one(built: building.Built, old: str, new: str) -> None:
    source = next(kernel.source for kernel in built.plan.kernels if "grouped" in kernel.name)
    assert old in source
    shape = read_shape(source.replace(old, new))
    assert shape is not None and shape.op is None and (shape.n, shape.k) == (256, 512)
    assert "names no op" in misses.advice(shape) and "--add-to" in misses.advice(shape)


def test_a_kernel_whose_source_was_not_kept_is_still_counted(tmp_path: Path) -> None:
    [miss] = misses.read(log_of(tmp_path, ("transpose_fp32", 5, None), ("transpose_fp32", 4, None))).misses
    assert (miss.kernel, miss.count, miss.first, miss.last, miss.source) == ("transpose_fp32", 2, 4, 5, None)
    assert "names no shape" in miss.advice


def test_a_log_that_was_moved_with_its_sources_is_read(built: building.Built, tmp_path: Path) -> None:
    (tmp_path / "before").mkdir()
    log = log_of(tmp_path / "before", ("x", 1, built.plan.kernels[0].source))
    (tmp_path / "before").rename(tmp_path / "after")
    [miss] = misses.read(tmp_path / "after" / log.name).misses
    assert miss.source == built.plan.kernels[0].source


def test_lines_that_the_frozen_nvcc_did_not_write_are_counted_and_not_fatal(run: Run, tmp_path: Path) -> None:
    log = log_of(tmp_path, ("x", 1, None))
    garbage = (
        b'\n{"time":\n\xff\xfe\n[]\n"x"\n' + b"[" * 100_000 + b"\n" + b'{"kernel": null, "time": 1e99, "source": 5}\n'
    )
    log.write_bytes(log.read_bytes() + garbage)
    result = run("misses", log)
    assert result.returncode == 0, result.stderr
    assert "kernels missed: 2, requests: 2" in result.stdout and "unknown: 1 time" in result.stdout
    assert "lines of the log are not the frozen nvcc's" in result.stdout


def test_a_line_cannot_make_misses_read_another_file_or_write_to_the_terminal(run: Run, tmp_path: Path) -> None:
    """A log comes from serving machines, and the sources that it names may end in a manifest that others see."""
    log = log_of(tmp_path, ("x", 1, None))
    secret, beside = tmp_path / "secret.d" / "key", tmp_path / "other" / "k.cu"
    for file in (secret, beside):
        file.parent.mkdir()
        file.write_text("secret &x_impl<")
    (tmp_path / "misses.jsonl.d" / "link.cu").symlink_to(secret)
    for named in (secret, beside, tmp_path / "misses.jsonl.d" / "link.cu", tmp_path / "misses.jsonl.d" / ".." / "k.cu"):
        line = {"time": True, "kernel": "\x1b[2J\x07", "artifact": "\x1b]0;x", "source": str(named)}
        log.write_text(json.dumps(line) + "\n")
        [miss] = misses.read(log).misses
        assert (miss.kernel, miss.artifacts, miss.source, miss.first) == ("unknown", (), None, None), named
        result = run("misses", log)
        assert result.returncode == 0 and "\x1b" not in result.stdout and "\x07" not in result.stdout


def test_a_missing_log_is_one_sentence(run: Run, tmp_path: Path) -> None:
    result = run("misses", tmp_path / "none")
    assert result.returncode == 8 and "cannot be read" in result.stderr


@pytest.mark.slow
def test_missed_kernels_written_into_the_manifest_are_in_the_next_build_under_deepgemms_own_names(
    built: building.Built, run: Run, tmp_path: Path
) -> None:
    here = built.inputs.installation
    (tmp_path / "wide.yaml").write_text(f"{SMALL}  - {{op: fp8_gemm_nt, n: 192, k: 256, compiled_dims: nk}}\n")
    wide = load_manifest(tmp_path / "wide.yaml", deep_gemm=here.imported_as)
    known = {kernel.entry for kernel in built.plan.kernels}
    asked = planning.make(wide).kernels
    missed = {kernel.entry: kernel.source for kernel in asked if kernel.entry not in known}
    assert len(missed) >= 2
    log = log_of(tmp_path, *((entry, 1_700_000_000, source) for entry, source in missed.items()))

    manifest = tmp_path / "small.yaml"
    manifest.write_text(f"# what we serve\n{SMALL}")
    result = run("misses", log, "--add-to", manifest)
    assert result.returncode == 0, result.stderr
    assert f"{len(missed)} sources added, 0 were in it already" in result.stderr
    text = manifest.read_text()
    assert text.startswith(f"# what we serve\n{SMALL.splitlines()[0]}\n")
    assert "# sm90_fp8_gemm_1d2d: missed 1 time, 2023-11-14 22:13:20Z, not in small" in text
    assert f"0 sources added, {len(missed)} were in it already" in run("misses", log, "--add-to", manifest).stderr
    assert manifest.read_text() == text

    output = tmp_path / "more.tar.zst"
    more = building.build(load_manifest(manifest, deep_gemm=here.imported_as), output)
    assert {kernel.entry for kernel in more.plan.kernels} == known | missed.keys()
    assert check(output, here, tmp_path / "wide.yaml").complete
    assert check(output, here).complete
    [replay] = check(built.packed.path, here, manifest).replays
    assert [kernel.entry for kernel in replay.missing] == [f"sources[{number}]" for number in range(len(missed))]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("sm90_fp8_gemm_1d2d_impl", "sm100_fp8_gemm_impl"), ["kernel for sm_90a, found sm100_fp8_gemm_impl"]),
        (("GemmType::Normal", "GemmType::Other"), ["Other is unknown", "kernel: NAME"]),
        (("#include <deep_gemm/", "#include <deep_gemm/none/"), ["includes", "which this DeepGEMM does not have"]),
    ],
)
def test_a_source_that_this_deepgemm_would_not_ask_for_is_refused(
    built: building.Built, change: tuple[str, str], words: list[str], tmp_path: Path
) -> None:
    if built.plan.generation == "legacy" and "#include" in change[0]:
        words = []  # a legacy key needs no header: nvcc would report it
    source = next(kernel.source for kernel in built.plan.kernels if "GemmType::Normal" in kernel.source)
    (tmp_path / "m.yaml").write_text(SMALL)
    kernel = "sm90_fp8_gemm_1d2d" if "GemmType" not in change[0] else None
    sources.add(tmp_path / "m.yaml", [NewSource(source.replace(*change), "changed")])
    text = (tmp_path / "m.yaml").read_text()
    if kernel:
        (tmp_path / "m.yaml").write_text(text.replace("  - source: |", f"  - kernel: {kernel}\n    source: |"))
    inputs = load_manifest(tmp_path / "m.yaml", deep_gemm=built.inputs.installation.imported_as)
    if not words:
        planning.make(inputs)
        return
    with pytest.raises(PlanError) as error:
        planning.make(inputs)
    for word in ["sources[0]", *words]:
        assert word in f"{error.value} {error.value.hint}"


@pytest.mark.slow
@pytest.mark.parametrize("deep_gemm", ["legacy"], indirect=True, scope="session")
def test_a_legacy_source_of_other_headers_is_refused(built: building.Built, tmp_path: Path) -> None:
    source = next(kernel.source for kernel in built.plan.kernels if "GemmType::Normal" in kernel.source)
    (tmp_path / "m.yaml").write_text(SMALL)
    text = f"// of other headers\n{source.partition(chr(10))[2]}"
    sources.add(tmp_path / "m.yaml", [NewSource(text, "old")])
    inputs = load_manifest(tmp_path / "m.yaml", deep_gemm=built.inputs.installation.imported_as)
    with pytest.raises(PlanError, match="a DeepGEMM with other headers wrote it"):
        planning.make(inputs)
