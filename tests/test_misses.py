from __future__ import annotations

import dataclasses
import json
import os
import subprocess
from pathlib import Path

import pytest

from cachebuilder import building
from cachebuilder.artifact.index import Fingerprint
from cachebuilder.artifact.read import read_index
from cachebuilder.authoring import sources
from cachebuilder.authoring.sources import NewSource
from cachebuilder.compiling.compiler import CompileOptions
from cachebuilder.deepgemm import environment
from cachebuilder.deepgemm.command import Command
from cachebuilder.deepgemm.source import read_shape
from cachebuilder.errors import PlanError
from cachebuilder.manifest.inputs import load_manifest
from cachebuilder.planning import make as planning
from cachebuilder.planning.plan import Kernel
from cachebuilder.restoring import frozen, misses, near_misses
from cachebuilder.restoring.machine import Machine
from cachebuilder.restoring.restore import restore
from tests.conftest import SMALL, Run
from tests.restored import check, copy_of
from tests.test_frozen import call_deepgemm
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
    more_ops = (  # the first one's GEMM is the one that test_record.py builds
        "  - {op: fp8_gemm_nt, n: 576, k: 512, compiled_dims: nk, max_tokens: 16}\n"
        "  - {op: get_mn_major_tma_aligned_tensor, columns: 5}\n"
    )
    (tmp_path / "wide.yaml").write_text(SMALL + more_ops)
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
    more = building.build(
        load_manifest(manifest, deep_gemm=here.imported_as), output, options=CompileOptions(check_code=0)
    )
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


# Kernels that the cache has, under another key


def restored(built: building.Built, dir: Path) -> Path:
    restore([built.packed.path], dir, machine=Machine(built.inputs.installation))
    return dir


def ask(built: building.Built, nvcc: Path, kernel: Kernel, more: str = "", include: Path | None = None) -> None:
    """Ask the frozen nvcc for ``kernel`` as DeepGEMM asks, with ``more`` flags or with another include path."""
    work = nvcc.parents[2].with_name("tmp")
    work.mkdir(exist_ok=True)
    (work / "kernel.cu").write_text(kernel.source)
    path = str(built.inputs.installation.include)
    if built.plan.legacy_flags is not None:
        words = f"-cubin -o {work}/kernel.cubin {built.plan.legacy_flags.replace(path, str(include or path))}{more}"
    else:
        words = (
            f"--cubin --output-file {work}/kernel.cubin {' '.join(kernel.flags)}{more} --include-path {include or path}"
        )
    done = subprocess.run([nvcc, work / "kernel.cu", *words.split()], capture_output=True, check=False)
    assert done.returncode == 1


def sentences(text: str) -> str:
    """Wrapped lines as one."""
    return " ".join(text.split())


@pytest.mark.slow
def test_kernels_that_deepgemm_misses_for_a_variable_and_another_installation_are_explained_and_not_added(
    built: building.Built, run: Run, tmp_path: Path
) -> None:
    """DeepGEMM itself serves from the restored folder: with a variable, and from another copy of the package."""
    dir, manifest = restored(built, tmp_path / "dir"), tmp_path / "m.yaml"
    other = copy_of(built.inputs.installation, tmp_path / "other" / "deep_gemm")
    if built.plan.generation == "deepjit":  # legacy asks with another source then
        with (other.include / "deep_gemm" / "common" / "math.cuh").open("a") as header:
            header.write("// changed\n")
    asking = dataclasses.replace(built, inputs=dataclasses.replace(built.inputs, installation=other))
    assert call_deepgemm(asking, dir, tmp_path, 24, DG_JIT_WITH_LINEINFO="1").returncode
    manifest.write_text(SMALL)
    done = run("misses", dir / "cachebuilder" / "misses.jsonl", "--add-to", manifest)
    [entry] = [kernel.entry for kernel in built.plan.kernels if kernel.name == "transpose_fp32"]
    text = sentences(done.stdout)
    assert f"not add it: the cache has this source, as {entry}, under another key, since the request differs in" in text
    assert "remedy: unset DG_JIT_WITH_LINEINFO" in text and "wanted: no such flag found: -" in text
    assert all(len(line) <= 80 for line in done.stdout.splitlines()) and "next:" not in done.stdout
    second = "headers" if built.plan.generation == "deepjit" else "install_include"
    assert f"{second} wanted: " in text and "missed: 1, requests: 1" in text
    remedy = "build with the DeepGEMM that serves" if second == "headers" else "restore again for this path"
    assert manifest.read_text() == SMALL and "0 sources added" in done.stderr
    assert "1 kernel is not added: the cache has the source under another key. flags differs: unset" in done.stderr
    assert f"{second} differs: " in done.stderr and remedy in done.stderr


@pytest.mark.parametrize(
    ("deep_gemm", "variable"),
    [(generation, variable) for generation, flags in environment.ADDED_FLAGS.items() for variable in flags],
    indirect=["deep_gemm"],
    scope="session",
)
def test_the_variable_that_adds_a_flag_is_named(variable: str, built: building.Built, tmp_path: Path) -> None:
    added = environment.ADDED_FLAGS[built.plan.generation][variable]
    dir, kernel = restored(built, tmp_path / "dir"), built.plan.kernels[0]
    ask(built, frozen.frozen_nvcc(dir), kernel, more=f" {' '.join(added)}")
    [miss] = misses.read(dir / "cachebuilder" / "misses.jsonl").misses
    [difference] = miss.differences
    assert (miss.entry, miss.folder, difference.field) == (kernel.entry, str(dir), "flags")
    assert (difference.wanted, set(str(difference.found).split())) == ("no such flag", set(added))
    assert f"DG_{variable}" in difference.remedy.split("environment:")[0]
    document = misses.read(dir / "cachebuilder" / "misses.jsonl").model_dump(mode="json")
    assert document["misses"][0]["differences"][0]["remedy"] == difference.remedy


@pytest.mark.parametrize(
    ("old", "new", "field", "words"),
    [
        ("-std=c++20", "-std=c++17", "flags", "unset DG_JIT_CPP_STANDARD"),
        ("=sm_90a", "=sm_100a", "arch", "build for the GPU that serves"),
        ("--expt-extended-lambda", "", "flags", "no variable of DeepGEMM changes them"),
    ],
)
def test_each_other_part_of_a_command_that_differs_is_named(
    old: str, new: str, field: str, words: str, built: building.Built, tmp_path: Path
) -> None:
    dir, kernel = restored(built, tmp_path / "dir"), built.plan.kernels[0]
    ask(built, frozen.frozen_nvcc(dir), kernel)
    log = dir / "cachebuilder" / "misses.jsonl"
    assert old in log.read_text()
    log.write_text(log.read_text().replace(old, new))
    [miss] = misses.read(log).misses
    [difference] = miss.differences
    assert miss.entry == kernel.entry and difference.field == field and words in difference.remedy
    assert old in str(difference.wanted) and (new or "no such flag") in str(difference.found)


def test_a_variable_that_the_artifact_was_built_with_and_that_does_not_serve_is_named(
    built: building.Built, tmp_path: Path
) -> None:
    fingerprint = Fingerprint(
        **read_index(built.packed.path).fingerprint.model_dump() | {"environment": {"DG_JIT_WITH_LINEINFO": "1"}}
    )
    flags = environment.ADDED_FLAGS[fingerprint.generation]["JIT_WITH_LINEINFO"]
    request = near_misses.Request.of("/dir/cachebuilder/bin/nvcc k.cu -O3")
    assert request is not None
    [difference] = near_misses.flags(fingerprint, Command(("-O3", *flags), ()), request, known_only=False)
    assert difference.wanted == " ".join(flags) and difference.found == "no such flag"
    assert difference.remedy.startswith(
        "the artifact was built with DG_JIT_WITH_LINEINFO=1: set it where DeepGEMM serv"
    )


@pytest.mark.parametrize("deep_gemm", ["legacy"], indirect=True, scope="session")
def test_a_legacy_source_that_differs_only_in_the_hash_of_the_headers_is_not_an_unplanned_shape(
    built: building.Built, run: Run, tmp_path: Path
) -> None:
    dir, kernel = restored(built, tmp_path / "dir"), built.plan.kernels[0]
    first, rest = kernel.source.split("\n", 1)
    other = kernel.model_copy(update={"source": f"{first[:-4]}0000\n{rest}"})
    ask(built, frozen.frozen_nvcc(dir), other)
    [miss] = misses.read(dir / "cachebuilder" / "misses.jsonl").misses
    [difference] = miss.differences
    assert (miss.entry, difference.field) == (kernel.entry, "headers")
    assert difference.wanted == first.rpartition(" ")[2] and str(difference.found).endswith("0000")


def test_a_request_under_the_entrys_own_key_is_said_to_have_looked_elsewhere(
    built: building.Built, run: Run, tmp_path: Path
) -> None:
    dir, kernel = restored(built, tmp_path / "dir"), built.plan.kernels[0]
    ask(built, frozen.frozen_nvcc(dir), kernel)
    text = sentences(run("misses", dir / "cachebuilder" / "misses.jsonl").stdout)
    assert f"as {kernel.entry}, under this request's key: the request was made before {dir} was restored, or" in text
    assert "DeepGEMM did not look into it (DG_JIT_CACHE_DIR must lead there: cachebuilder env)" in text


def test_a_kernel_that_the_cache_lacks_is_added_and_what_else_differs_is_said(
    built: building.Built, run: Run, tmp_path: Path
) -> None:
    dir, manifest = restored(built, tmp_path / "dir"), tmp_path / "m.yaml"
    [grouped] = [kernel for kernel in built.plan.kernels if "grouped" in kernel.name][:1]
    wider = grouped.model_copy(update={"source": grouped.source.replace(" 256, 512,", " 384, 512,")})
    assert wider.source != grouped.source
    added = environment.ADDED_FLAGS[built.plan.generation]["JIT_WITH_LINEINFO"]
    ask(built, frozen.frozen_nvcc(dir), wider, more=f" {' '.join(added)} --unknown")
    manifest.write_text(SMALL)
    done = run("misses", dir / "cachebuilder" / "misses.jsonl", "--add-to", manifest)
    assert "1 sources added" in done.stderr and "n: 384, k: 512}" in done.stdout
    assert "unset DG_JIT_WITH_LINEINFO" in done.stdout and "--unknown" not in done.stdout


def test_a_kernel_for_another_sm_count_is_said_to_be_one(built: building.Built, run: Run, tmp_path: Path) -> None:
    dir = restored(built, tmp_path / "dir")
    [kernel] = [kernel for kernel in built.plan.kernels if "grouped" in kernel.name][:1]
    assert "132, GemmType" in kernel.source
    other = kernel.model_copy(update={"source": kernel.source.replace("132, GemmType", "78, GemmType")})
    ask(built, frozen.frozen_nvcc(dir), other)
    text = sentences(run("misses", dir).stdout)
    assert "sm_counts wanted: 132 found: 78 remedy: kernels hold the SM count: add it to target.sm_counts" in text


@pytest.mark.parametrize("deep_gemm", ["deepjit"], indirect=True, scope="session")
@pytest.mark.parametrize("where", ["nowhere", "another users"])
def test_headers_that_cannot_be_read_here_are_said_to_be_unknown(
    where: str, built: building.Built, tmp_path: Path
) -> None:
    """A log names any folder. Another user could have put a FIFO into it, which would never end."""
    dir, package = restored(built, tmp_path / "dir"), tmp_path / "deep_gemm"
    if where != "nowhere":
        (package / "include" / "deep_gemm").mkdir(parents=True)
        (package / "__init__.py").touch()
        os.mkfifo(package / "VERSION")
        package.chmod(0o777)
    ask(built, frozen.frozen_nvcc(dir), built.plan.kernels[0], include=package / "include")
    [miss] = misses.read(dir / "cachebuilder" / "misses.jsonl").misses
    assert miss.differences == () and miss.entry == built.plan.kernels[0].entry
    assert f"the headers in {package}/include cannot be read here and may differ. If they are the same" in miss.advice


def test_the_folder_is_found_by_the_log_by_the_nvcc_in_it_or_by_its_name(
    built: building.Built, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dir, kernel, log = restored(built, tmp_path / "dir"), built.plan.kernels[0], tmp_path / "own.jsonl"
    monkeypatch.setenv("CACHEBUILDER_MISS_LOG", str(log))
    ask(built, frozen.frozen_nvcc(dir), kernel)
    [miss] = misses.read(log).misses
    assert (miss.entry, miss.folder) == (kernel.entry, str(dir))
    dir.rename(tmp_path / "moved")
    [miss] = misses.read(log).misses
    assert (miss.entry, miss.folder) == (None, None)
    assert "name it with --dir" in run("misses", log).stdout
    assert f"as {kernel.entry}" in sentences(run("misses", log, "--dir", tmp_path / "moved").stdout)
    refused = run("misses", log, "--dir", tmp_path)
    assert refused.returncode == 8 and "found no cachebuilder/artifacts" in refused.stderr


def test_a_command_that_the_log_has_only_the_beginning_of_lacks_no_flag(built: building.Built, tmp_path: Path) -> None:
    dir, kernel = restored(built, tmp_path / "dir"), built.plan.kernels[0]
    ask(built, frozen.frozen_nvcc(dir), kernel)
    log = dir / "cachebuilder" / "misses.jsonl"
    line = json.loads(log.read_text())
    assert not line["command"].endswith("...")
    for length in range(len(line["command"]) - 40, len(line["command"])):
        log.write_text(json.dumps(line | {"command": f"{line['command'][:length]}..."}) + "\n")
        [miss] = misses.read(log).misses
        assert miss.differences == () and miss.entry == kernel.entry


def test_a_kernel_of_another_library_is_not_called_an_op_of_deepgemm_and_is_not_added(
    built: building.Built, run: Run, tmp_path: Path
) -> None:
    """FlashInfer, for one, takes nvcc from CUDA_HOME, which may be the folder of the frozen one."""
    dir, manifest, source = restored(built, tmp_path / "dir"), tmp_path / "m.yaml", tmp_path / "sampling.cu"
    source.write_text('#include <flashinfer/sampling.cuh>\n#include "tvm_ffi_utils.h"\n')
    nvcc = frozen.frozen_nvcc(dir)
    subprocess.run([nvcc, "-std=c++17", "-c", source, "-o", "x.o"], capture_output=True, check=False)
    manifest.write_text(SMALL)
    done = run("misses", dir / "cachebuilder" / "misses.jsonl", "--add-to", manifest)
    assert "it is not DeepGEMM's, since it includes none of its headers" in sentences(done.stdout)
    assert "1 kernel is not added: not DeepGEMM's" in done.stderr and manifest.read_text() == SMALL
    assert "manifest lacks an op" not in done.stdout and "CPP_STANDARD" not in done.stdout


def test_a_source_that_a_person_gives_to_the_frozen_nvcc_by_hand_is_found_in_the_cache(
    built: building.Built, tmp_path: Path
) -> None:
    dir, kernel = restored(built, tmp_path / "dir"), built.plan.kernels[0]
    source = dir / "cache" / kernel.entry / "kernel.cu"
    subprocess.run([frozen.frozen_nvcc(dir), source], capture_output=True, check=False)
    [miss] = misses.read(dir / "cachebuilder" / "misses.jsonl").misses
    assert miss.entry == kernel.entry and "its line in the log has no flags, and these may differ" in miss.advice
