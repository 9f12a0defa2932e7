from __future__ import annotations

import json
import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from contextvars import Context
from pathlib import Path
from typing import Any

import pytest

import cachebuilder
from cachebuilder.compiling import compiler as compiling
from cachebuilder.compiling.compiler import CompileOptions
from cachebuilder.cuda import gpus, toolchain
from cachebuilder.deepgemm import installation
from cachebuilder.deepgemm.source import kernel_template
from cachebuilder.errors import ManifestError, PlanError
from cachebuilder.manifest.inputs import load_manifest
from cachebuilder.ops.catalog import OPS
from cachebuilder.planning import make as planning
from cachebuilder.planning.plan import Kernel
from cachebuilder.sweep import process, recorder, warm
from cachebuilder.virtual_gpu import library as virtual_gpu
from tests import entry_points
from tests.conftest import LEGACY, MANIFESTS, ROOT, check_code, kept_cubins
from tests.test_plan import make

#: The kernels of the engines' GEMMs and of their scales' layout: dense, grouped and masked, in FP8 and BF16.
GEMMS = re.compile(
    r"sm90_fp8_gemm_1d2d|sm100_fp8_fp4_gemm_1d1d|sm(90|100)_bf16_gemm|sm(90|100)_(\w+_)?m_grouped_\w+|transpose_\w+"
)


@pytest.mark.slow
@pytest.mark.parametrize(("arch", "generation"), entry_points.PAIRS)
def test_every_op_is_planned_and_compiled_to_deepgemms_own_code(arch: str, generation: str, tmp_path: Path) -> None:
    manifest = entry_points.write_manifest(tmp_path / "m.yaml", arch, generation)
    inputs = load_manifest(manifest, deep_gemm=LEGACY if generation == "legacy" else None)
    plan = planning.make(inputs)
    assert plan.generation == generation
    planned = {selection.op for kernel in plan.kernels for selection in kernel.selected_by}
    assert planned == set(range(len(plan.ops))), "each op asks for a kernel"
    # Of kernels whose sources differ in numbers only, one is compiled.
    forms = {(kernel.name, re.sub(r"\b[0-9]\w*", "0", kernel.source)): kernel for kernel in plan.kernels}
    kernels = list(forms.values())
    if generation == "legacy":
        kernels = one_of_each_op_and_template(kernels, [str(op["op"]) for op in plan.ops])
    store = kept_cubins("of-every-op")
    cubins = compiling.compile_kernels(inputs, kernels, CompileOptions(check_code=0), store).cubins
    assert cubins.keys() == {kernel.entry for kernel in kernels}
    # Compared, chosen at random: one kernel of every template of the engines' GEMMs, and of one other template.
    of_template = {
        template(kernel): kernel for kernel in random.Random(f"{arch} {generation}").sample(kernels, len(kernels))
    }
    gemms = [kernel for kernel in of_template.values() if GEMMS.fullmatch(kernel.name)]
    others = [kernel for kernel in of_template.values() if kernel not in gemms]
    assert len(gemms) >= 4 or arch == "sm120"
    check_code([*gemms, *others[:1]], cubins, inputs)


def template(kernel: Kernel) -> tuple[str | None, bool]:
    """The kernel's template. Kernels with FP4 operands are not in one unit with others."""
    return kernel_template(kernel.source), "float_e2m1" in kernel.source


def one_of_each_op_and_template(kernels: Sequence[Kernel], ops: Sequence[str]) -> list[Kernel]:
    """Kernels of as many ops and templates as ``kernels``. An op's other variants are compiled with DeepJIT's headers."""
    chosen: list[Kernel] = []
    covered: set[object] = set()
    for kernel in kernels:
        new = {ops[selection.op] for selection in kernel.selected_by} | {(kernel.name, template(kernel))}
        if not new <= covered:
            chosen.append(kernel)
            covered |= new
    return chosen


def test_every_op_has_a_case() -> None:
    assert {fields["op"] for fields, _, _ in entry_points.CASES} == OPS.keys()


def test_the_docs_tables_are_current() -> None:
    text = entry_points.DOCS.read_text()
    assert entry_points.with_tables(text) == text, "run python -m tests.entry_points"


def test_what_was_run_is_an_op() -> None:
    runs = json.loads(entry_points.RUNS.read_text())
    assert set(runs) <= {f"{arch} {generation}" for arch, generation in entry_points.PAIRS}
    assert {name for names in runs.values() for name in names} <= OPS.keys()


def on_virtual_gpu(gpu: str, folder: Path, *arguments: str | Path) -> Any:
    """The JSON that Python prints last when it runs ``arguments`` with a virtual GPU and the recording compiler."""
    compiler = recorder.recording_compiler(folder, toolchain.find().version_text)
    environment = os.environ | virtual_gpu.environment(gpus.find(gpu)) | compiler.environment
    environment |= {
        "DG_JIT_CACHE_DIR": str(folder / "root"),
        "DG_JIT_NVCC_COMPILER": str(compiler.nvcc),
        "CUDA_HOME": str(compiler.home),
    }
    completed = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert completed.returncode == 0, completed.stderr
    return json.loads(completed.stdout.splitlines()[-1])


FUNCTIONS = """
import json, os, sys
from tests import without_op
from cachebuilder.ops.catalog import OPS
from cachebuilder.sweep.loading import import_package
deep_gemm = import_package("deep_gemm", sys.argv[1])
print(json.dumps([without_op.functions(deep_gemm), without_op.unexplained(deep_gemm, OPS)]), flush=True)
os._exit(0)
"""


@pytest.mark.slow
def test_every_function_of_deepgemm_has_an_op_or_a_reason(deep_gemm: Path | None, tmp_path: Path) -> None:
    functions, unexplained = on_virtual_gpu("H200", tmp_path, "-c", FUNCTIONS, installation.find(deep_gemm).path)
    assert len(functions) > 40
    assert unexplained == [], "give each an op, or a reason in tests/without_op.py"


@pytest.mark.slow
@pytest.mark.parametrize(("arch", "generation"), entry_points.PAIRS)
def test_every_ops_trial_runs_through_deepgemms_own_host_code(arch: str, generation: str, tmp_path: Path) -> None:
    """No kernel runs, so every result is found wrong; the expected results are computed all the same."""
    copy = installation.find(LEGACY if generation == "legacy" else None)
    # The references take as long as the experts are many and large.
    less = {"ranks": 1, "experts": 4, "hidden": 512, "intermediate": 512}
    cases = [fields | (less if "ranks" in fields else {}) for fields in entry_points.ops(arch, generation)]
    trials = on_virtual_gpu(
        entry_points.GPUS[arch], tmp_path, "-m", "tests.trials_on_virtual_gpu", copy.path, json.dumps(cases)
    )
    for fields, outputs in zip(cases, trials, strict=True):
        if "weight_layout" in fields or (fields["op"] == "nvfp4_mega_moe" and "shared_experts" in fields):
            assert outputs is None, "docs/entry-points.md says why"
            continue
        assert outputs, f"no reference: {fields}"
        for output in outputs:
            assert output["actual"] == output["expected"], fields
            assert output["finite"] and output["size"] > 0 and output["problem"], fields


@pytest.mark.parametrize(
    ("gpu", "op", "words"),
    [
        pytest.param("H200", "op: fp8_fp4_gemm_nt, n: 512, k: 512", "FP4 operands are Blackwell", id="no-fp4"),
        pytest.param("H200", "op: fp8_gemm_nt, n: 512, k: 512, scales: packed", "packed UE8M0 scales", id="packed"),
        pytest.param("H200", "op: bf16_mega_gate, hidden: 1024, experts: 64, topk: 4", "SM100 only", id="mega-gate"),
        pytest.param("B200", "op: k_grouped_fp8_gemm_nt_contiguous, experts: 2, m: 64, n: 64, max_k: 128", "SM90, SM120 only", id="k-grouped"),
        pytest.param("H200", "op: fp8_fp4_mqa_logits, heads: 64, format: fp4", "Blackwell", id="fp4-logits"),
    ],
)  # fmt: skip
def test_an_op_that_the_arch_lacks_is_refused_with_the_reason(gpu: str, op: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match=rf"m\.yaml:4: ops\[0\]: not on {gpu}: .*{words}"):
        make(tmp_path / "m.yaml", f"name: x\ntarget: {{gpu: {gpu}}}\nmax_tokens: 8\nops: [{{{op}}}]")


MEGA_MOE = "op: bf16_mega_moe, ranks: 2, experts: 16, topk: 4, hidden: 1024, intermediate: 512"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("op", "copy", "words"),
    [
        ("op: mega_mhc, hidden: 1024", LEGACY, "mega_mhc (found in sgl-deep-gemm 0.2.3.post2 and vLLM 0.33.0's copy)"),
        (
            "op: fp4_fp4_mega_moe, ranks: 2, experts: 16, topk: 4, hidden: 1024, intermediate: 512",
            None,
            "fp4_fp4_mega_moe (found in vLLM 0.33.0's copy)",
        ),
        (
            f"{MEGA_MOE}, activation_alpha: 1.702",
            None,
            "bf16_mega_moe with activation_alpha (found in vLLM 0.33.0's copy)",
        ),
        (
            f"{MEGA_MOE}, post_expert_norm: true",
            LEGACY,
            "bf16_mega_moe with post_expert_norm (found in sgl-deep-gemm 0.2.3.post2 and 0.2.5, and ",
        ),
    ],
    ids=["mega_mhc", "fp4_fp4_mega_moe", "activation_alpha", "post_expert_norm"],
)
def test_an_op_that_the_installed_deepgemm_lacks_is_refused_with_the_copies_that_have_it(
    op: str, copy: Path | None, words: str, tmp_path: Path
) -> None:
    text = f"name: x\ntarget: {{gpu: B200}}\nmax_tokens: 8\nops: [{{{op}}}]"
    with pytest.raises(PlanError, match=f"has no {re.escape(words)}"):
        make(tmp_path / "m.yaml", text, copy)


ONE_PIECE = "- {op: fp8_mqa_logits, heads: 64}\n- {op: fp8_fp4_mqa_logits, heads: 32, compressed: true}\n"
PAGED = "- {op: fp8_paged_mqa_logits, heads: 64, max_batch: 600, next_n: 2}\n"


@pytest.mark.slow
@pytest.mark.parametrize(("keys", "ops"), [(1, ONE_PIECE), (65536, ONE_PIECE + PAGED)])
def test_numbers_of_rows_and_keys_select_no_logits_kernel(
    keys: int, ops: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sweep's calls have 1024 keys, and batches up to the manifest's; any others give equal kernels."""
    monkeypatch.chdir(tmp_path)  # Python looks for the package in the working directory first
    pairs = [(gpu, deep_gemm) for gpu in ("H200", "B200") for deep_gemm in (None, LEGACY)]

    def kernels(ops: str) -> list[tuple[Kernel, ...]]:
        head = "name: x\ntarget: {gpu: %s}\nmax_tokens: 600\nops:\n"
        return [make(tmp_path / "m.yaml", head % gpu + ops, deep_gemm).kernels for gpu, deep_gemm in pairs]

    def kernels_of_copy() -> list[tuple[Kernel, ...]]:
        with warm.kept():  # a new server imports the copy
            return kernels(ops)

    expected = kernels(ONE_PIECE + PAGED)
    for plan in expected:
        assert all(r.first == 1 and r.last == 600 for k in plan for s in k.selected_by for r in s.ranges)
        assert [kernel.selected_by[0].op < 2 for kernel in plan].count(True) == 2 and len(plan) == 3
    imported = copy_package(tmp_path / "copy", keys)
    monkeypatch.setattr(process, "_PACKAGE_ROOT", tmp_path / "copy")
    assert Context().run(kernels_of_copy) == [
        tuple(kernel for kernel in plan if ops != ONE_PIECE or kernel.selected_by[0].op < 2) for plan in expected
    ]
    assert imported.exists(), "the child took another package"


def copy_package(folder: Path, keys: int) -> Path:
    """A copy of the package with another number of keys; returns a file that exists once the copy was imported."""
    shutil.copytree(Path(cachebuilder.__file__).parent, folder / "cachebuilder")
    file = folder / "cachebuilder" / "ops" / "attention.py"
    text = file.read_text()
    assert "\nKEYS = 1024\n" in text
    imported = folder / "imported"
    marked = text.replace("\nKEYS = 1024\n", f"\nKEYS = {keys}\n") + f"open({str(imported)!r}, 'w').close()\n"
    file.write_text(marked)
    return imported


@pytest.mark.slow
def test_scales_in_their_final_layout_select_the_same_gemms(tmp_path: Path) -> None:
    head = "name: x\ntarget: {gpu: B200}\nmax_tokens: 300\nops: [{op: fp8_gemm_nt, n: 576, k: 7168"
    plain, packed = (make(tmp_path / "m.yaml", f"{head}{more}}}]") for more in ("", ", scales: packed"))
    gemms = [{k.entry: k.selected_by for k in plan.kernels if "gemm" in k.name} for plan in (plain, packed)]
    assert gemms[0] == gemms[1] and len(packed.kernels) == len(gemms[1])


@pytest.mark.slow
@pytest.mark.parametrize(("gpu", "max_tokens", "kernels"), [("h200", 16384, 233), ("b200", 512, 105)])
def test_deepseek_v32_is_planned_with_all_its_ops(gpu: str, max_tokens: int, kernels: int, tmp_path: Path) -> None:
    """One of the two to its whole size; test_plan.py plans DeepSeek-V3 to its whole size on three GPUs."""
    text = (MANIFESTS / f"deepseek-v3.2-tp8-{gpu}.yaml").read_text()
    (tmp_path / "m.yaml").write_text(re.sub(r"(?m)^max_tokens: 16384$", f"max_tokens: {max_tokens}", text))
    plan = planning.make(load_manifest(tmp_path / "m.yaml"))
    assert {selection.op for kernel in plan.kernels for selection in kernel.selected_by} == set(range(len(plan.ops)))
    assert len(plan.kernels) == kernels
