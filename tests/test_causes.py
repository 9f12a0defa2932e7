"""Why DeepGEMM fails before its first op: the sentence names the cause, and only an ABI mismatch is called one."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest

from cachebuilder import building
from cachebuilder.common.foreign import without_traces
from cachebuilder.cuda import toolchain as toolchains
from cachebuilder.deepgemm import installation as installations
from cachebuilder.errors import (
    CacheBuilderError,
    CompileError,
    DeviceError,
    InstallationError,
    ManifestError,
    PlanError,
    ToolchainError,
)
from cachebuilder.manifest.inputs import Inputs, load_manifest
from cachebuilder.planning import make as planning
from cachebuilder.planning.kept import KeptPlans
from cachebuilder.sweep import causes
from tests.conftest import LEGACY, Run
from tests.restored import check
from tests.test_plan import fake_deep_gemm

ONE = "name: x\ntarget: {gpu: H200}\nmax_tokens: 1\nops: [{op: fp8_gemm_nt, n: 576, k: 512}]\n"
#: The newest nvcc that a generation refuses, and the oldest that it takes.
REFUSED = {"deepjit": ("12.8", "12.9"), "legacy": ("12.2", "12.3")}


def manifest(folder: Path, more: str = "") -> Path:
    (folder / "m.yaml").write_text(ONE + more)
    return folder / "m.yaml"


def nvcc(folder: Path, release: str) -> Path:
    """A program with the version text of an nvcc of ``release``."""
    path = folder / f"nvcc-{release}"
    path.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V{release}.93'\n")
    path.chmod(0o755)
    return path


def fail(inputs: Inputs, kind: type[CacheBuilderError]) -> str:
    """Plan, which fails; returns the sentence and the hint."""
    with pytest.raises(kind) as error:
        planning.make(inputs, plans=KeptPlans(own=False))
    text = f"{error.value}\n{error.value.hint}"
    assert type(error.value) is kind and "C++ trace" not in text and "#0" not in text, text
    return text


def test_an_nvcc_that_deepgemm_refuses_is_refused_before_the_sweep(
    deep_gemm: Path | None, run: Run, tmp_path: Path
) -> None:
    generation = installations.find(deep_gemm).generation
    old, oldest = REFUSED[generation]
    here = ("--deep-gemm", deep_gemm) if deep_gemm else ()
    done = run("plan", manifest(tmp_path), "--nvcc", nvcc(tmp_path, old), *here)
    assert done.returncode == ToolchainError.exit_code == 5, done.stderr
    assert f"this DeepGEMM wants nvcc {oldest} or later, found {old} at {tmp_path}/nvcc-{old} (--nvcc)" in done.stderr
    assert "hint: name one with --nvcc" in done.stderr and "torch" not in done.stderr
    for accepted in (oldest, "12.10", "13.0", "100.0"):
        toolchain = load_manifest(manifest(tmp_path), nvcc=nvcc(tmp_path, accepted), deep_gemm=deep_gemm).toolchain
        assert toolchain.release == accepted


def test_an_nvcc_that_is_too_old_is_skipped_for_a_later_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (home := tmp_path / "cuda" / "bin").mkdir(parents=True)
    nvcc(tmp_path, "12.8").rename(home / "nvcc")
    (later := tmp_path / "later").mkdir()
    nvcc(tmp_path, "13.0").rename(later / "nvcc")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    monkeypatch.setenv("PATH", str(later), prepend=":")
    assert load_manifest(manifest(tmp_path)).toolchain.nvcc == later / "nvcc"
    text = ONE + 'toolchain: {nvcc: "12.8"}\n'
    (tmp_path / "m.yaml").write_text(text)
    with pytest.raises(
        ToolchainError, match=r"the manifest wants nvcc 12\.8 and this DeepGEMM wants nvcc 12\.9 or later"
    ):
        load_manifest(tmp_path / "m.yaml")


@pytest.mark.slow
def test_deepgemms_own_refusal_of_an_nvcc_is_the_same_error(deep_gemm: Path | None, tmp_path: Path) -> None:
    """Where the compiler was not looked at before: the real DeepGEMM is asked, with the text of an older nvcc."""
    inputs = load_manifest(manifest(tmp_path), deep_gemm=deep_gemm)
    old, oldest = REFUSED[inputs.installation.generation]
    toolchain = toolchains.of_text(inputs.toolchain.nvcc, f"release {old}, V{old}.93\n", "a test")
    text = fail(dataclasses.replace(inputs, toolchain=toolchain), ToolchainError)
    assert f"wanted nvcc {oldest} or later" in text and "torch" not in text


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ('DG_JIT_CPP_STANDARD: "c++20"', "DG_JIT_CPP_STANDARD: wanted a C++ standard, as 20, found 'c++20'"),
        ('DG_JIT_CPP_STANDARD: ""', "wanted a C++ standard, as 20, found ''"),
        ("DG_JIT_DEBUG: maybe", "DG_JIT_DEBUG: wanted a number"),
        ('DG_JIT_WITH_LINEINFO: "1.5"', "DG_JIT_WITH_LINEINFO: wanted a number"),
    ],
)
def test_a_value_that_deepgemm_does_not_take_is_refused_before_the_sweep(
    environment: str, words: str, deep_gemm: Path | None, tmp_path: Path
) -> None:
    with pytest.raises(ManifestError) as error:
        load_manifest(manifest(tmp_path, f"environment: {{{environment}}}\n"), deep_gemm=deep_gemm)
    assert words in str(error.value) and "x: environment:" in str(error.value)


def test_doctor_says_that_deepgemm_takes_neither_this_nvcc_nor_a_variable(
    deep_gemm: Path | None, run: Run, tmp_path: Path
) -> None:
    old, oldest = REFUSED[installations.find(deep_gemm).generation]
    here = ("--deep-gemm", deep_gemm) if deep_gemm else ()
    named = {"DG_JIT_NVCC_COMPILER": str(nvcc(tmp_path, old)), "DG_JIT_DEBUG": "maybe"}
    text = " ".join(run("doctor", *here, **named).stdout.split())
    assert f"note: this DeepGEMM wants nvcc {oldest} or later, found {old}" in text
    assert "note: DeepGEMM does not take a variable that is set here: DG_JIT_DEBUG: wanted a number" in text


def test_verify_refuses_a_value_that_deepgemm_does_not_take(built: building.Built, tmp_path: Path) -> None:
    path = manifest(tmp_path, 'environment: {DG_JIT_CPP_STANDARD: "new"}\n')
    with pytest.raises(ManifestError, match="DG_JIT_CPP_STANDARD: wanted a C"):
        check(built.packed.path, built.inputs.installation, path)


@pytest.mark.parametrize("value", ["0", "1", "-1", "yes", "False"])
def test_a_value_that_deepjit_takes_and_legacy_misreads_is_refused_for_legacy_only(value: str, tmp_path: Path) -> None:
    """Legacy reads `yes` as whatever number is in memory."""
    path = manifest(tmp_path, f'environment: {{DG_JIT_DEBUG: "{value}"}}\n')
    load_manifest(path)
    if value.lstrip("-").isdigit():
        load_manifest(path, deep_gemm=LEGACY)
    else:
        with pytest.raises(ManifestError, match=f"DG_JIT_DEBUG: wanted a number, found '{value}'"):
            load_manifest(path, deep_gemm=LEGACY)


@pytest.mark.slow
def test_deepjits_own_refusal_of_a_value_names_the_variable(tmp_path: Path) -> None:
    inputs = load_manifest(manifest(tmp_path))
    environment = {"DG_JIT_CPP_STANDARD": "c++20"}
    changed = inputs.manifest.model_copy(update={"environment": environment})
    text = fail(dataclasses.replace(inputs, manifest=changed), ManifestError)
    assert "DeepGEMM does not take the value 'c++20' of DG_JIT_CPP_STANDARD" in text and "torch" not in text


@pytest.mark.slow
def test_a_standard_that_deepgemms_headers_do_not_compile_under_is_in_the_hint(run: Run, tmp_path: Path) -> None:
    path = manifest(tmp_path, 'environment: {DG_JIT_CPP_STANDARD: "11"}\n')
    done = run("build", path, "-o", tmp_path / "a.tar.zst")
    assert done.returncode == CompileError.exit_code
    assert "hint: DeepGEMM's headers are written for -std=c++20, found -std=c++11: remove DG_JIT_CPP_S" in done.stderr


@pytest.mark.slow
def test_a_missing_module_is_named_with_its_package(run: Run, tmp_path: Path) -> None:
    """The legacy DeepGEMM in a folder of its own, away from the tvm_ffi that it imports."""
    shutil.copytree(LEGACY, tmp_path / "deep_gemm", copy_function=lambda a, b: Path(b).symlink_to(a))
    done = run("plan", manifest(tmp_path), "--deep-gemm", tmp_path / "deep_gemm")
    assert done.returncode == InstallationError.exit_code
    assert "wanted the Python module tvm_ffi, found none" in done.stderr
    assert done.stderr.rstrip().endswith("hint: pip install apache-tvm-ffi, which brings it")


def changed_extension(folder: Path, deep_gemm: Path | None, old: str, new: str) -> Path:
    """A copy of a DeepGEMM whose extension wants another symbol or another library from the linker."""
    package = installations.find(deep_gemm).path
    copy = folder / "deep_gemm"
    shutil.copytree(package, copy, copy_function=lambda a, b: Path(b).symlink_to(a))
    for beside in package.parent.glob("*tvm_ffi*"):
        (folder / beside.name).symlink_to(beside)
    code = (package / "_C.so").read_bytes()
    assert len(old) == len(new) and f"{old}\0".encode() in code
    (copy / "_C.so").unlink()
    (copy / "_C.so").write_bytes(code.replace(f"{old}\0".encode(), f"{new}\0".encode()))
    return copy


@pytest.mark.slow
def test_a_deepgemm_built_for_another_torch_is_called_so_for_the_symbol_that_is_missing(
    deep_gemm: Path | None, tmp_path: Path
) -> None:
    copy = changed_extension(tmp_path, deep_gemm, "_ZTVN3c105ErrorE", "_ZTVN3c105ErrorX")
    text = fail(load_manifest(manifest(tmp_path), deep_gemm=copy), InstallationError)
    assert "cannot load DeepGEMM under torch " in text
    assert "it was built for another torch, since this one has no _ZTVN3c105ErrorX" in text
    assert "install the torch that this DeepGEMM was built for" in text


@pytest.mark.slow
@pytest.mark.parametrize("deep_gemm", ["deepjit"], indirect=True, scope="session")
def test_a_missing_library_of_cuda_is_named_with_its_package(deep_gemm: Path | None, tmp_path: Path) -> None:
    copy = changed_extension(tmp_path, deep_gemm, "libnvrtc.so.13", "libnvrtc.so.12")
    text = fail(load_manifest(manifest(tmp_path), deep_gemm=copy), InstallationError)
    assert "wanted the library libnvrtc.so.12, found none" in text
    assert "pip install nvidia-cuda-nvrtc-cu12, or install a DeepGEMM that was built for the CUDA of this torch" in text


@pytest.mark.slow
def test_a_failure_of_an_unknown_cause_claims_none(tmp_path: Path) -> None:
    for body, words in (
        ("raise RuntimeError('the moon is full')", "cannot load DeepGEMM under torch"),
        ("from deep_gemm.utils import layout\ndef f(t): raise RuntimeError('the moon is full')\n"
         "layout.get_mn_major_tma_aligned_tensor = f\n", "DeepGEMM failed at its first call, before all ops"),
    ):  # fmt: skip
        folder = tmp_path / str(len(body))
        folder.mkdir()
        inputs = load_manifest(manifest(folder), deep_gemm=fake_deep_gemm(folder, body))
        kind: type[CacheBuilderError] = InstallationError if "load" in words else PlanError
        text = fail(inputs, kind)
        assert words in text and "the moon is full" in text and "cachebuilder doctor" in text
        assert "was built for" not in text and "misreads" not in text


@pytest.mark.parametrize(
    ("reason", "kind", "words"),
    [
        ("No module named 'tvm_ffi.module'; 'tvm_ffi' is not a package", InstallationError, "pip install apache-tvm-ffi"),
        ("No module named 'deep_gemm._C'", InstallationError, "built for Python 3."),
        ("No module named 'torch'", InstallationError, "pip install torch"),
        ("/x/libtorch_cuda.so: cannot open shared object file: No such", InstallationError, "built for another torch"),
        ("libcudart.so.12: cannot open shared object file: No such", InstallationError, "nvidia-cuda-runtime-cu12"),
        ("libcuda.so.1: cannot open shared object file: No such", InstallationError, "comes with the GPU's driver"),
        ("libtvm_ffi.so: cannot open shared object file: No such", InstallationError, "pip install apache-tvm-ffi"),
        ("libdw.so.1: cannot open shared object file: No such", InstallationError, "system package"),
        ("x.so: undefined symbol: nvrtcGetTileIR", InstallationError, "another version of a library"),
        ("libstdc++.so.6: version `GLIBCXX_3.4.32' not found", InstallationError, "wanted GLIBCXX_3.4.32"),
        ("/x/_C.so: file too short", InstallationError, "extension is damaged: file too short"),
        ("failed to write: /t/x: No space left on device", InstallationError, "make room"),
        ("the sweep's process ended with signal 9", InstallationError, "memory runs out"),
        ("CUDA driver version is insufficient for CUDA runtime version", DeviceError, "nvidia-smi"),
        ("Assertion error (/a/layout.hpp:10): dim == 2 or dim == 3", PlanError, "misreads tensors"),
    ],
)  # fmt: skip
def test_each_known_cause_has_its_own_sentence(reason: str, kind: type[CacheBuilderError], words: str) -> None:
    error = causes.find(reason, "cannot load DeepGEMM")
    assert type(error) is kind and words in f"{error}\n{error.hint}"


def test_a_shape_that_an_op_refuses_is_not_called_a_misreading() -> None:
    assert causes.find("Assertion error (/a/gemm.hpp:10): t.dim() == N", "ops[0]", of_call=True) is None


#: What DeepJIT and torch print, with paths shortened.
TRACES = """\
Assertion error (/d/backend.hpp:72): major > 12: NVCC version must be at least 12.9
C++ trace (most recent call first):
  #0 /x/_C.so+0x1 deep_jit::CUDA::CUDA(deep_jit::Env const&) at ??:0
  #15 /x/_C.so+0x2 <unknown function> at /d/runtime.hpp:10
terminate called after throwing an instance of 'c10::Error'
  what():  wrong device Exception raised from f at /t/c10.cpp:5 (most recent call first):
frame #0: c10::Error::Error(c10::SourceLocation, std::string) + 0x80 (0x7f in /x/libc10.so)
frame #1: <unknown function> + 0x2 (0x7f in /x/libtorch.so)

C++ CapturedTraceback:
#4 std::_Function_handler<void ()>::_M_invoke(std::_Any_data const&) from /t/Logging.cpp:0
"""


def test_a_trace_of_cpp_is_left_out_and_everything_else_is_kept() -> None:
    assert without_traces(TRACES) == (
        "Assertion error (/d/backend.hpp:72): major > 12: NVCC version must be at least 12.9\n"
        "terminate called after throwing an instance of 'c10::Error'\n"
        "  what():  wrong device"
    )
    plain = 'kernel.cu(3): error #20: identifier "x" is undefined\n#include <a.h>'
    assert without_traces(plain) == plain
