from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cachebuilder.cuda import gpus, toolchain
from cachebuilder.errors import InstallationError, PlanError
from cachebuilder.manifest.inputs import load_manifest
from cachebuilder.planning import make as planning
from cachebuilder.planning.kept import KeptPlans
from cachebuilder.planning.plan import Kernel, Plan
from cachebuilder.virtual_gpu import library as virtual_gpu
from tests.conftest import MANIFESTS, ROOT, Run

EVERY_OP = """\
name: every-op
target: {{gpu: {gpu}}}
max_tokens: 300
ops:
  - {{op: fp8_gemm_nt, n: 576, k: 7168}}
  - {{op: bf16_gemm_nt, n: 256, k: 7168, compiled_dims: nk}}
  - {{op: m_grouped_fp8_gemm_nt_contiguous, experts: 8, topk: 2, n: 1024, k: 512}}
  - {{op: m_grouped_bf16_gemm_nt_contiguous, experts: 8, topk: 2, n: 1024, k: 512}}
  - {{op: m_grouped_fp8_gemm_nt_masked, experts: 8, max_m: 512, n: 1024, k: 512}}
  - {{op: m_grouped_bf16_gemm_nt_masked, experts: 8, max_m: 512, n: 1024, k: 512}}
"""


def make(path: Path, text: str, deep_gemm: Path | None = None) -> Plan:
    path.write_text(text)
    inputs = load_manifest(path, deep_gemm=deep_gemm)
    return planning.make(inputs, plans=KeptPlans(own=False))


def points(kernel: Kernel, op: int) -> list[int]:
    """The values of the op's variable that select the kernel."""
    ranges = [part for selection in kernel.selected_by if selection.op == op for part in selection.ranges]
    return [value for part in ranges for value in range(part.first, part.last + 1, part.step)]


@pytest.mark.slow
@pytest.mark.parametrize("gpu", ["H200", "B200"])
def test_every_point_of_every_op_selects_exactly_one_gemm_kernel(
    gpu: str, deep_gemm: Path | None, tmp_path: Path
) -> None:
    plan = make(tmp_path / "m.yaml", EVERY_OP.format(gpu=gpu), deep_gemm)
    assert plan.generation == ("deepjit" if deep_gemm is None else "legacy")
    swept = {0: range(1, 301), 1: range(1, 301), 4: range(1, 513), 5: range(1, 513)}
    swept |= {op: range(128, 1665, 128) for op in (2, 3)}  # round_up(300·2 + 8·127, 128) = 1664
    for op, expected in swept.items():
        selecting = sorted(value for kernel in plan.kernels if "gemm" in kernel.name for value in points(kernel, op))
        if op == 1 and not selecting:
            assert plan.generation == "deepjit"  # cuBLASLt serves its dense BF16 GEMM
            continue
        assert selecting == list(expected), plan.ops[op]
    assert plan.calls == sum(map(len, swept.values()))


@pytest.mark.slow
def test_a_blackwell_workstation_gpu_can_be_planned_for(tmp_path: Path) -> None:
    plan = make(tmp_path / "m.yaml", EVERY_OP.format(gpu="RTX-PRO-6000"))
    assert plan.arch == "sm_120f"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "kernels", "arch"),
    [
        ("deepseek-v3-tp8-h200", 169, "sm_90a"),
        ("deepseek-v3-tp8-h20", 107, "sm_90a"),
        ("deepseek-v3-tp8-b200", 171, "sm_100f"),
    ],
)
def test_deepseek_v3_needs_the_known_number_of_kernels(name: str, kernels: int, arch: str) -> None:
    inputs = load_manifest(MANIFESTS / f"{name}.yaml")
    plan = planning.make(inputs)
    assert (len(plan.kernels), plan.calls, plan.arch) == (kernels, 66_624, arch)
    assert plan.peak_bytes < 2e9


@pytest.mark.slow
def test_an_sm_count_changes_the_kernels(tmp_path: Path) -> None:
    text = (
        "name: x\ntarget: {gpu: H200, sm_counts: [132, 100]}\nmax_tokens: 64\nops: [{op: fp8_gemm_nt, n: 576, k: 512}]"
    )
    plan = make(tmp_path / "m.yaml", text)
    entries: dict[int, set[str]] = {100: set(), 132: set()}
    for kernel in plan.kernels:
        for selection in kernel.selected_by:
            if "gemm" in kernel.name:
                entries[selection.sm_count].add(kernel.entry)
    assert plan.sm_counts == (100, 132)
    assert entries[100] and entries[132] and entries[100].isdisjoint(entries[132])
    assert all("100, GemmType" in kernel.source for kernel in plan.kernels if kernel.entry in entries[100])


@pytest.mark.slow
def test_an_ops_own_sm_count_changes_its_kernels_alone(tmp_path: Path, run: Run) -> None:
    text = (
        "name: x\ntarget: {gpu: H200}\nmax_tokens: 64\n"
        "ops: [{op: fp8_gemm_nt, n: 576, k: 512}, {op: fp8_gemm_nt, n: 2112, k: 512, sm_counts: [100, 98]}]"
    )
    plan = make(tmp_path / "m.yaml", text)
    assert (plan.sm_counts, plan.calls) == ((98, 100, 132), 64 + 2 * 64)
    gemm_kernels = [kernel for kernel in plan.kernels if "gemm" in kernel.name]
    swept = {(selection.op, selection.sm_count) for kernel in gemm_kernels for selection in kernel.selected_by}
    assert swept == {(0, 132), (1, 98), (1, 100)}
    output = run("plan", tmp_path / "m.yaml").stdout
    titles = [line for line in output.splitlines() if line.startswith("ops[")]
    assert [title.partition(", ")[2] for title in titles] == ["132 SMs: m", "98 SMs: m", "100 SMs: m"]
    assert "nothing to compile" not in output


@pytest.mark.slow
def test_the_environment_of_the_manifest_reaches_deepgemm(tmp_path: Path) -> None:
    text = "name: x\ntarget: {gpu: H200}\nmax_tokens: 1\nops: [{op: fp8_gemm_nt, n: 576, k: 512}]\n"
    plain = make(tmp_path / "m.yaml", text)
    info = make(tmp_path / "m.yaml", text + 'environment: {DG_JIT_WITH_LINEINFO: "1"}')
    assert "--generate-line-info" in info.kernels[0].flags
    assert {kernel.entry for kernel in plain.kernels}.isdisjoint(kernel.entry for kernel in info.kernels)


@pytest.mark.slow
def test_variables_of_this_process_do_not_change_a_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "name: x\ntarget: {gpu: H200}\nmax_tokens: 1\nops: [{op: fp8_gemm_nt, n: 576, k: 512}]\n"
    plain = make(tmp_path / "m.yaml", text)
    monkeypatch.setenv("DG_JIT_DEBUG", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert make(tmp_path / "m.yaml", text).kernels == plain.kernels


@pytest.mark.slow
def test_no_path_of_this_machine_is_in_a_plans_kernels(tmp_path: Path) -> None:
    plan = make(tmp_path / "m.yaml", EVERY_OP.format(gpu="H200"))
    text = "".join(f"{kernel.source}{kernel.flags}{kernel.metadata}" for kernel in plan.kernels)
    for path in (str(Path.home()), sys.prefix, os.environ["CACHEBUILDER_CACHE_DIR"]):
        assert path not in text


@pytest.mark.slow
def test_a_shape_that_deepgemm_refuses_names_the_op_and_the_point(tmp_path: Path) -> None:
    text = "name: x\ntarget: {gpu: B200, sm_counts: [1]}\nmax_tokens: 4\nops: [{op: fp8_gemm_nt, n: 576, k: 512}]"
    with pytest.raises(PlanError, match=r"ops\[0\] fp8_gemm_nt n=576 k=512 at m 1: DeepGEMM refused: .*num_sms"):
        make(tmp_path / "m.yaml", text)


def fake_deep_gemm(folder: Path, body: str) -> Path:
    """A package that looks like DeepGEMM from outside and runs ``body``, to reach our own error paths only."""
    package = folder / "deep_gemm"
    (package / "include" / "deep_gemm").mkdir(parents=True)
    (package / "utils").mkdir()
    (package / "_C.so").write_bytes(b".committed")
    (package / "__init__.py").write_text("import os\ndef set_num_sms(n): pass\n" + body)
    (package / "utils" / "__init__.py").touch()
    (package / "utils" / "layout.py").write_text(
        "import torch\ndef get_mn_major_tma_aligned_tensor(t): return torch.empty_strided(t.shape, (1, 72), device='cuda')\n"
    )
    return package


@pytest.mark.slow
@pytest.mark.parametrize(
    ("body", "kind", "words"),
    [
        pytest.param("def fp8_gemm_nt(a, b, d):\n if d.shape[0] == 3: os.abort()", PlanError, "at m 3: DeepGEMM died", id="abort"),
        pytest.param("def fp8_gemm_nt(a, b, d): assert d.shape[0] < 4, 'no'", PlanError, "at m 4: DeepGEMM refused: no", id="assert"),
        pytest.param("import nothing_like_it", InstallationError, "cannot load DeepGEMM", id="import"),
        pytest.param("", PlanError, "has no fp8_gemm_nt", id="missing-op"),
        pytest.param("from deep_gemm.utils import layout\nlayout.get_mn_major_tma_aligned_tensor = lambda t: t\n", PlanError, "misreads tensors", id="misreads"),
        pytest.param(
            "import torch\ndef fp8_gemm_nt(a, b, d): torch.cuda.Event(interprocess=True).ipc_handle()", PlanError,
            "virtual GPU does not answer cudaIpcGetEventHandle", id="unanswered-call",
        ),
        pytest.param(
            "import ctypes\ndef fp8_gemm_nt(a, b, d): ctypes.CDLL(None).cudaDeviceReset()", PlanError,
            "does not answer cudaDeviceReset", id="unanswered-call-whose-error-is-ignored",
        ),
        pytest.param("def fp8_gemm_nt(a, b, d): pass", PlanError, "nothing to build", id="no-kernel"),
    ],
)  # fmt: skip
def test_a_failure_in_the_sweep_is_an_error_that_names_it(
    body: str, kind: type[Exception], words: str, tmp_path: Path
) -> None:
    text = "name: x\ntarget: {gpu: H200}\nmax_tokens: 8\nops: [{op: fp8_gemm_nt, n: 576, k: 512}]"
    with pytest.raises(kind) as error:
        make(tmp_path / "m.yaml", text, fake_deep_gemm(tmp_path, body))
    assert words in str(error.value)


SERVING_CALLS = """
import sys, torch, deep_gemm
mode, n, k = sys.argv[1], 576, 1024
scales = k // 128
empty = lambda *shape, dtype: torch.empty(shape, device="cuda", dtype=dtype)
for m in range(1, 301):
    a, b = empty(m, k, dtype=torch.float8_e4m3fn), empty(n, k, dtype=torch.float8_e4m3fn)
    rows, columns = -(-m // 4) * 4, -(-n // 4) * 4
    if mode == "packed":  # UE8M0, four to an int32
        sfa = empty(scales // 4, rows, dtype=torch.int32).t()[:m]
        sfb = empty(scales // 4, columns, dtype=torch.int32).t()[:n]
    else:
        sfa, sfb = empty(scales, rows, dtype=torch.float32).t()[:m], empty(-(-n // 128), scales, dtype=torch.float32)
    deep_gemm.fp8_gemm_nt((a, sfa), (b, sfb), empty(m, n, dtype=torch.bfloat16))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("gpu", "mode"), [("H200", "aligned"), ("B200", "packed")])
def test_scales_in_the_layout_of_serving_ask_for_no_kernel_outside_the_plan(
    gpu: str, mode: str, tmp_path: Path
) -> None:
    text = f"name: x\ntarget: {{gpu: {gpu}}}\nmax_tokens: 300\nops: [{{op: fp8_gemm_nt, n: 576, k: 1024}}]"
    plan = make(tmp_path / "m.yaml", text)
    bin_folder = tmp_path / "cuda" / "bin"
    bin_folder.mkdir(parents=True)
    shutil.copy(ROOT / "cachebuilder" / "sweep" / "recording_nvcc.sh", bin_folder / "nvcc")
    (bin_folder / "nvcc").chmod(0o755)
    (bin_folder / "version.txt").write_text(toolchain.find().version_text)
    environment = os.environ | virtual_gpu.environment(gpus.find(gpu)) | {"CUDA_HOME": str(tmp_path / "cuda")}
    environment |= {"DG_JIT_CACHE_DIR": str(tmp_path / "root")}
    subprocess.run([sys.executable, "-c", SERVING_CALLS, mode], env=environment, check=True, capture_output=True)
    asked = set(os.listdir(tmp_path / "root" / "cache"))
    assert asked == {kernel.entry for kernel in plan.kernels if "gemm" in kernel.name}


def test_plan_prints_the_ranges_of_each_kernel_within_80_columns(run: Run, small: Path) -> None:
    process = run("plan", small)
    assert process.returncode == 0, process.stderr
    assert "ops[0] fp8_gemm_nt n=576 k=512, 132 SMs: m" in process.stdout
    assert "1–16" in process.stdout
    *lines, _ = process.stdout.splitlines()  # the last holds a path
    assert all(len(line) <= 80 for line in lines if line.startswith(" "))


def test_plan_as_json_is_the_plan(run: Run, small: Path) -> None:
    printed = Plan.model_validate_json(run("plan", small, "--json").stdout)
    plan = planning.make(load_manifest(small))
    assert (printed.kernels, printed.calls) == (plan.kernels, plan.calls)
