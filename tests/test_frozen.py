"""The frozen nvcc, run by the shells that there are, and the environment that names it."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cachebuilder import building
from cachebuilder.deepgemm.source import kernel_template
from cachebuilder.errors import ArtifactError, VerifyError
from cachebuilder.restoring import environment, frozen, place
from cachebuilder.restoring.folder import open_folder
from cachebuilder.restoring.machine import Machine
from cachebuilder.restoring.restore import restore
from tests.conftest import Run

TEXT = 'nvcc: NVIDIA (R) Cuda compiler driver\nit\'s "quoted" \\n $HOME `id` @ARTIFACT@\n\n'
DIGEST = "f" * 64
SHELLS = [path for name in ("dash", "bash", "busybox", "ksh", "mksh", "zsh") if (path := shutil.which(name))]

KERNEL = """\
#include <deep_gemm/impls/sm90_fp8_gemm_1d2d.cuh>
static void __instantiate_kernel() {
    auto ptr = reinterpret_cast<void*>(&sm90_fp8_gemm_1d2d_impl<
        128, 64, 128
    >);
};
"""


@pytest.fixture
def dir(tmp_path: Path) -> Path:
    frozen.write(tmp_path / "dir" / frozen.FOLDER, TEXT, "deepseek-v3", DIGEST)
    return tmp_path / "dir"


@pytest.fixture
def kernel(tmp_path: Path) -> Path:
    path = tmp_path / "kernel.cu"
    path.write_text(KERNEL)
    return path


def ask(
    dir: Path, *arguments: str | Path, shell: str | None = None, **variables: str
) -> subprocess.CompletedProcess[str]:
    # As /bin/sh, busybox and zsh run with these words.
    as_sh = {"busybox": ["sh"], "zsh": ["--emulate", "sh"]}
    start = [] if shell is None else [shell, *as_sh.get(Path(shell).name, [])]
    command = [*start, str(frozen.frozen_nvcc(dir)), *map(str, arguments)]
    clean = {"PATH": os.environ["PATH"], "TMPDIR": str(dir.parent)} | variables
    return subprocess.run(command, capture_output=True, text=True, env=clean, check=False)


def misses(dir: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (dir / "cachebuilder" / "misses.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("shell", [None, *SHELLS])
def test_the_version_is_the_recorded_text_to_the_byte(shell: str | None, dir: Path) -> None:
    done = ask(dir, "--version", shell=shell)
    assert (done.stdout, done.stderr, done.returncode) == (TEXT, "", 0)
    assert frozen.version_text(dir) == TEXT


@pytest.mark.parametrize("path", ["", "/nonexistent"])
def test_the_version_needs_no_other_program(path: str, dir: Path) -> None:
    assert ask(dir, "--version", PATH=path).stdout == TEXT
    code = frozen.frozen_nvcc(dir).read_text()
    assert code.startswith("#!/bin/sh\n") and "python" not in code.lower()


@pytest.mark.parametrize("shell", [None, *SHELLS])
def test_a_compilation_is_refused_and_logged(shell: str | None, dir: Path, kernel: Path) -> None:
    odd = 'a"b\\c\td\ne\u00e9'
    done = ask(dir, kernel, "--cubin", "-o", odd, shell=shell)
    assert done.returncode == 1 and done.stdout == ""
    for words in ("sm90_fp8_gemm_1d2d is not in the restored cache", "artifact deepseek-v3", "CACHEBUILDER_ON_MISS"):
        assert words in done.stderr
    (miss,) = misses(dir)
    assert miss["kernel"] == "sm90_fp8_gemm_1d2d" and miss["policy"] == "refuse"
    assert miss["artifact"] == "deepseek-v3" and miss["fingerprint"] == DIGEST
    assert isinstance(miss["time"], int) and isinstance(miss["pid"], int)
    assert f'{kernel} --cubin -o a"b\\c?d?e' in str(miss["command"])
    assert Path(str(miss["source"])).read_text() == KERNEL


def test_a_miss_is_reported_and_logged_with_no_program_at_all(dir: Path, kernel: Path, tmp_path: Path) -> None:
    """In a folder tree without any program but the shell's own."""
    script = frozen.frozen_nvcc(dir)
    bare = script.read_text().replace("/usr/local/bin:/usr/bin:/bin", "/nonexistent")
    script.write_text(bare)
    done = ask(dir, kernel, PATH="")
    assert done.returncode == 1 and "sm90_fp8_gemm_1d2d is not in the restored cache" in done.stderr
    assert "not found" not in done.stderr
    (miss,) = misses(dir)
    assert (miss["kernel"], miss["time"], miss["source"]) == ("sm90_fp8_gemm_1d2d", None, None)


def test_the_kernels_of_a_real_cache_are_named(built: building.Built, dir: Path, tmp_path: Path) -> None:
    for plan_kernel in built.plan.kernels:
        (tmp_path / "kernel.cu").write_text(plan_kernel.source)
        ask(dir, tmp_path / "kernel.cu")
        template = kernel_template(plan_kernel.source)
        assert template is not None and misses(dir)[-1]["kernel"] == template.removesuffix("_impl")


@pytest.mark.slow
def test_every_miss_is_a_whole_line_with_many_writers(dir: Path, kernel: Path) -> None:
    long = "x" * 3000
    with ThreadPoolExecutor(32) as pool:
        done = list(pool.map(lambda n: ask(dir, kernel, f"--{n}", long), range(400)))
    assert all(one.returncode == 1 for one in done)
    found = misses(dir)
    assert len(found) == 400
    assert {str(miss["command"]).split()[2] for miss in found} == {f"--{n}" for n in range(400)}
    lines = (dir / "cachebuilder" / "misses.jsonl").read_bytes().splitlines()
    assert max(map(len, lines)) < 4096
    assert len(list((dir / "cachebuilder" / "misses.jsonl.d").iterdir())) == 1


@pytest.mark.skipif(shutil.which("strace") is None, reason="wants strace")
def test_a_miss_is_one_write(dir: Path, kernel: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    nvcc = str(frozen.frozen_nvcc(dir))
    subprocess.run(["strace", "-f", "-e", "write", "-o", trace, nvcc, kernel], capture_output=True, check=False)
    assert trace.read_text().count('{\\"time\\"') == 1


def real_nvcc(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "nvcc").write_text('#!/bin/sh\nprintf "%s|" "$@"\necho warned >&2\nexit 7\n')
    (folder / "nvcc").chmod(0o755)
    return folder / "nvcc"


@pytest.mark.parametrize("policy", ["compile", "compile-and-warn"])
@pytest.mark.parametrize("where", ["variable", "path", "path-behind-a-frozen-one"])
def test_a_compiling_policy_runs_the_real_nvcc_with_the_same_arguments(
    policy: str, where: str, dir: Path, kernel: Path, tmp_path: Path
) -> None:
    real = real_nvcc(tmp_path / "real" / "bin")
    path = {
        "variable": "/usr/bin:/bin",
        "path": f"{real.parent}:/usr/bin:/bin",
        "path-behind-a-frozen-one": f"{frozen.frozen_nvcc(dir).parent}:{real.parent}:/usr/bin:/bin",
    }[where]
    variables = {"CACHEBUILDER_REAL_NVCC": str(real)} if where == "variable" else {}
    done = ask(dir, kernel, "-DX=a b", "", "*", PATH=path, CACHEBUILDER_ON_MISS=policy, **variables)
    assert (done.returncode, done.stdout) == (7, f"{kernel}|-DX=a b||*|")
    warned = "frozen nvcc: sm90_fp8_gemm_1d2d is not in the restored cache" in done.stderr
    assert warned == (policy == "compile-and-warn")
    assert [miss["policy"] for miss in misses(dir)] == [policy]


def test_a_compiling_policy_with_no_real_nvcc_says_so_and_never_calls_itself(dir: Path, kernel: Path) -> None:
    own = str(frozen.frozen_nvcc(dir))
    done = ask(dir, kernel, CACHEBUILDER_ON_MISS="compile", CACHEBUILDER_REAL_NVCC=own)
    assert done.returncode == 1 and "wants a real nvcc, found none" in done.stderr
    assert len(misses(dir)) == 1


def test_an_unknown_policy_refuses(dir: Path, kernel: Path) -> None:
    done = ask(dir, kernel, CACHEBUILDER_ON_MISS="always")
    assert done.returncode == 1 and "found always" in done.stderr


def test_what_is_no_compilation_is_no_miss(dir: Path) -> None:
    done = ask(dir, "--list-gpu-arch")
    assert done.returncode == 1 and "wanted --version or a kernel to compile" in done.stderr
    assert not (dir / "cachebuilder" / "misses.jsonl").exists()


def test_the_log_is_where_the_variable_says_else_in_dir_else_in_tmp(
    dir: Path, kernel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    ask(dir, kernel, CACHEBUILDER_MISS_LOG=str(tmp_path / "own.jsonl"))
    assert (tmp_path / "own.jsonl").exists()
    ask(dir, kernel, CACHEBUILDER_MISS_LOG=str(tmp_path / "none" / "own.jsonl"))
    private = tmp_path / f"cachebuilder-misses-{os.getuid()}"
    assert len((private / "misses.jsonl").read_text().splitlines()) == 1
    assert stat.S_IMODE(private.stat().st_mode) == 0o700
    assert not (dir / "cachebuilder" / "misses.jsonl").exists()
    ask(dir, kernel)
    assert len(misses(dir)) == 1


def test_dir_may_be_moved(dir: Path, kernel: Path, tmp_path: Path) -> None:
    dir.rename(tmp_path / "elsewhere")
    ask(tmp_path / "elsewhere", kernel)
    assert len(misses(tmp_path / "elsewhere")) == 1


def test_the_script_is_what_every_user_may_run(dir: Path) -> None:
    assert stat.S_IMODE(frozen.frozen_nvcc(dir).stat().st_mode) == 0o755


# The environment


@pytest.fixture
def restored(built: building.Built, tmp_path: Path) -> Path:
    restore([built.packed.path], tmp_path / "root", machine=Machine(built.inputs.installation))
    return tmp_path / "root"


def served(
    dir: Path, engine: environment.Engine, scratch: Path | None, variables: dict[str, str]
) -> list[environment.Variable]:
    indexes = open_folder(dir).indexes
    return environment.variables(place.usual(dir, indexes, scratch), indexes, engine, variables)


def test_deepgemms_variables_name_the_restored_root_and_the_frozen_nvcc(built: building.Built, restored: Path) -> None:
    empty = {"PATH": "/nonexistent", "CUDA_HOME": str(restored)}
    found = {v.name: v.value for v in served(restored, "none", Path("/scratch"), empty)}
    roots = f"/scratch:{restored}" if built.plan.generation == "deepjit" else str(restored)
    nvcc = f"{restored}/cachebuilder/bin/nvcc"
    assert found == {"DG_JIT_CACHE_DIR": roots, "DG_JIT_NVCC_COMPILER": nvcc}


@pytest.mark.parametrize(
    ("variables", "has"),
    [
        pytest.param({"CUDA_HOME": "/usr"}, True, id="home"),
        pytest.param({"CUDA_PATH": "/usr"}, True, id="path-variable"),
        pytest.param({"CUDA_HOME": "/nonexistent"}, False, id="home-that-is-not-there"),
    ],
)
def test_cuda_home_is_set_only_where_there_is_none(variables: dict[str, str], has: bool, restored: Path) -> None:
    found = served(restored, "none", None, variables)
    named = {v.name: v.value for v in found}.get("CUDA_HOME")
    assert named == (None if has else str(restored))


def test_each_engines_own_variables_are_set(built: building.Built, restored: Path) -> None:
    def of(engine: environment.Engine) -> dict[str, str]:
        found = served(restored, engine, Path("/scratch"), {"CUDA_HOME": "/usr"})
        return {v.name: v.value for v in found}

    vllm = {("VLLM_DEEP_GEMM_WARMUP", "skip"), ("VLLM_BLOCKSCALE_FP8_GEMM_FLASHINFER", "0")}
    assert of("vllm").items() - of("none").items() == vllm
    wanted = {("SGLANG_DG_CACHE_DIR", of("none")["DG_JIT_CACHE_DIR"]), ("SGLANG_JIT_DEEPGEMM_PRECOMPILE", "0")}
    if built.plan.generation == "legacy":  # DeepJIT has no NVRTC
        wanted |= {("SGL_DG_USE_NVRTC", "0"), ("SGLANG_DG_USE_NVRTC", "0")}
    assert of("sglang").items() - of("none").items() == wanted


def test_every_format_says_the_same(run: Run, restored: Path) -> None:
    wanted = json.loads(run("env", restored, "--engine", "sglang", "--format", "json").stdout)
    shell = run("env", restored, "--engine", "sglang").stdout
    said = subprocess.run(
        ["sh", "-c", f"{shell}\n{sys.executable} -c 'import json, os; print(json.dumps(dict(os.environ)))'"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(said.stdout).items() >= wanted.items()
    docker = run("env", restored, "--engine", "sglang", "--format", "docker").stdout.splitlines()
    assert dict(line[4:].split("=", 1) for line in docker if line.startswith("ENV ")) == wanted
    k8s = run("env", restored, "--engine", "sglang", "--format", "k8s").stdout
    from ruamel.yaml import YAML

    assert {item["name"]: item["value"] for item in YAML(typ="safe").load(k8s)} == wanted


def test_a_folder_that_nothing_was_restored_into_is_refused(run: Run, tmp_path: Path) -> None:
    done = run("env", tmp_path)
    assert done.returncode == ArtifactError.exit_code and "cachebuilder restore ARTIFACT --to" in done.stderr


def test_run_restores_sets_the_environment_and_becomes_the_command(
    run: Run, built: building.Built, tmp_path: Path
) -> None:
    here = ("--deep-gemm", built.inputs.installation.imported_as)
    show = ("--", "sh", "-c", 'echo "$DG_JIT_NVCC_COMPILER $VLLM_DEEP_GEMM_WARMUP $1"; exit 5', "sh", "--to")
    done = run("run", built.packed.path, "--to", tmp_path / "dir", "--engine", "vllm", *here, *show)
    assert (done.returncode, done.stdout) == (5, f"{tmp_path}/dir/cachebuilder/bin/nvcc skip --to\n"), done.stderr
    again = run("run", tmp_path / "dir", "--engine", "vllm", *here, *show)
    assert (again.returncode, again.stdout) == (5, done.stdout)
    default = run("run", built.packed.path, *here, "--", "sh", "-c", "$DG_JIT_NVCC_COMPILER --version")
    assert default.stdout == built.inputs.toolchain.version_text
    assert run("run", tmp_path / "dir", *here, "--", "no-such-command").returncode == 127


def test_run_does_not_start_a_process_from_damaged_entries(run: Run, built: building.Built, tmp_path: Path) -> None:
    here = ("--deep-gemm", built.inputs.installation.imported_as)
    assert run("restore", built.packed.path, "--to", tmp_path, *here).returncode == 0
    cubin = next((tmp_path / "cache").glob("*/kernel.cubin"))
    whole = cubin.read_bytes()
    cubin.chmod(0o644)
    cubin.write_bytes(whole[: len(whole) // 2])
    done = run("run", tmp_path, "--", "echo", "started")
    assert (done.returncode, done.stdout) == (VerifyError.exit_code, ""), done.stderr
    assert f"{cubin.parent.name}/kernel.cubin: wanted {len(whole)} bytes, found {len(whole) // 2}" in done.stderr
    cubin.write_bytes(whole)
    assert run("run", tmp_path, *here, "--", "echo", "started").stdout == "started\n"


def call_deepgemm(
    built: building.Built, dir: Path, folder: Path, m: int, **more: str
) -> subprocess.CompletedProcess[str]:
    """One dense product of DeepGEMM itself on the virtual GPU, from ``dir``, with no CUDA toolkit in reach."""
    from cachebuilder.virtual_gpu import library as virtual_gpu

    found = served(dir, "none", folder / "scratch", {"CUDA_HOME": "/nonexistent"})
    code = (
        "import sys, torch; sys.path.insert(0, sys.argv[1]); import deep_gemm\n"
        "empty = lambda *shape, dtype: torch.empty(shape, device='cuda', dtype=dtype)\n"
        "fp8, scales, m = torch.float8_e4m3fn, torch.float32, int(sys.argv[2])\n"
        "a, b = (empty(m, 512, dtype=fp8), empty(m, 4, dtype=scales)), (empty(576, 512, dtype=fp8), empty(5, 4, dtype=scales))\n"
        "deep_gemm.fp8_gemm_nt(a, b, empty(m, 576, dtype=torch.bfloat16))"
    )
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("DG_", "DJ_", "CUDA_"))}
    clean |= {v.name: v.value for v in found} | virtual_gpu.environment(built.plan.gpu)
    return subprocess.run(
        [sys.executable, "-c", code, built.inputs.installation.imported_as.parent, str(m)],
        capture_output=True,
        text=True,
        env=clean | more,
        check=False,
    )


@pytest.mark.slow
def test_deepgemm_itself_takes_the_frozen_nvccs_word_and_its_refusal(built: building.Built, tmp_path: Path) -> None:
    """From an empty cache: asks the version, asks to compile, and is told."""
    dir = tmp_path / "dir"
    restore([built.packed.path], dir, machine=Machine(built.inputs.installation))
    shutil.rmtree(dir / "cache")
    (dir / "cache").mkdir()
    done = call_deepgemm(built, dir, tmp_path, 64)
    assert done.returncode != 0
    told = done.stdout + done.stderr
    assert "transpose_fp32" in told and "is not in the restored cache" in told
    assert "transpose_fp32" in str(misses(dir)[0]["kernel"])


@pytest.mark.slow
def test_with_a_compiling_policy_deepgemm_gets_the_missing_kernel_under_the_name_it_was_planned_with(
    built: building.Built, tmp_path: Path
) -> None:
    """The real nvcc compiles it, the process goes on, and the miss is still an event."""
    dir, removed = tmp_path / "dir", [k for k in built.plan.kernels if k.name == "transpose_fp32"]
    restore([built.packed.path], dir, machine=Machine(built.inputs.installation))
    for kernel in removed:
        shutil.rmtree(dir / "cache" / kernel.entry)
    real = {"CACHEBUILDER_REAL_NVCC": str(built.inputs.toolchain.nvcc), "CACHEBUILDER_ON_MISS": "compile-and-warn"}
    done = call_deepgemm(built, dir, tmp_path, 24, **real)
    assert done.returncode == 0, done.stderr
    written = tmp_path / "scratch" if built.plan.generation == "deepjit" else dir
    [entry] = {kernel.entry for kernel in removed} & {path.name for path in (written / "cache").iterdir()}
    assert (written / "cache" / entry / "kernel.cubin").read_bytes()[:4] == b"\x7fELF"
    [miss] = misses(dir)
    assert (miss["kernel"], miss["policy"]) == ("transpose_fp32", "compile-and-warn")
