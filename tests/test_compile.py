from __future__ import annotations

import random
import re
from collections.abc import Sequence
from pathlib import Path

import pytest

from cachebuilder import building
from cachebuilder.common.cache import scratch_folder
from cachebuilder.compiling import compiler as compiling
from cachebuilder.compiling import units
from cachebuilder.compiling.compiler import CompileOptions
from cachebuilder.compiling.front_end import FrontEnds
from cachebuilder.compiling.steps import Steps, check_order
from cachebuilder.compiling.store import CubinStore, NoStore
from cachebuilder.compiling.units import Unit
from cachebuilder.cuda import ptx
from cachebuilder.deepgemm import installation
from cachebuilder.errors import CompileError
from cachebuilder.manifest.inputs import Inputs, load_manifest
from cachebuilder.planning import make as planning
from cachebuilder.planning.plan import Kernel, Plan
from tests.conftest import MANIFESTS, check_code
from tests.test_plan import EVERY_OP


def plan_of(text: str, folder: Path, deep_gemm: Path | None) -> tuple[Inputs, Plan]:
    (folder / "m.yaml").write_text(text)
    inputs = load_manifest(folder / "m.yaml", deep_gemm=deep_gemm)
    return inputs, planning.make(inputs)


def compile_units(work: Sequence[Unit], inputs: Inputs) -> dict[str, bytes]:
    cubins: dict[str, bytes] = {}
    with scratch_folder() as scratch, FrontEnds(inputs, 2) as front_ends:
        steps = Steps(front_ends, scratch, lambda kernel, cubin: cubins.update({kernel.entry: cubin}), hold=False)
        steps.run(work)
        assert steps.failures == []
    return cubins


@pytest.mark.slow
@pytest.mark.parametrize("gpu", ["H200", "B200"])
def test_the_code_of_every_family_is_what_deepgemms_own_nvcc_call_makes(
    gpu: str, deep_gemm: Path | None, tmp_path: Path
) -> None:
    inputs, plan = plan_of(EVERY_OP.format(gpu=gpu), tmp_path, deep_gemm)
    kernels = list(plan.kernels)
    cubins = compiling.compile_kernels(inputs, kernels, store=NoStore()).cubins
    one_of_each = {kernel.name: kernel for kernel in random.Random(0).sample(kernels, len(kernels))}
    assert len(one_of_each) >= 6
    check_code(one_of_each.values(), cubins, inputs)


@pytest.mark.slow
def test_a_difference_in_code_is_found(built: building.Built) -> None:
    one, two = [kernel for kernel in built.plan.kernels if "gemm" in kernel.name][:2]
    reports: list[tuple[str, int, int, float | None]] = []

    def watch(step: str, done: int, total: int, share: float | None = None) -> None:
        reports.append((step, done, total, share))

    cubins = compiling.compile_kernels(built.inputs, [one, two], store=NoStore(), progress=watch).cubins
    assert reports[0] == ("compile", 0, 2, 0.0) and reports[-1] == ("compile", 2, 2, 1.0)
    shares = [share for *_, share in reports if share is not None]
    assert shares == sorted(shares), "work that is done stays done"
    assert any(done == 0 and share for _, done, _, share in reports), "a front end counts before its kernels are there"
    swapped = {one.entry: cubins[two.entry]}
    with pytest.raises(CompileError, match=f"{one.entry}: the code is not what nvcc makes of it alone, in .*text"):
        check_code([one], swapped, built.inputs)


@pytest.mark.slow
def test_a_cubin_does_not_depend_on_what_shared_its_unit() -> None:
    inputs = load_manifest(MANIFESTS / "deepseek-v3-tp8-h200.yaml")
    plan = planning.make(inputs)
    family = [kernel for kernel in plan.kernels if kernel.name == "sm90_fp8_gemm_1d2d"]
    chosen = random.Random(0)
    five, twenty = chosen.sample(family, 5), chosen.sample(family, 20)
    kernel = five[2]
    twenty[17:18] = [kernel] if kernel not in twenty else twenty[17:18]

    def module(members: Sequence[Kernel]) -> str:
        with scratch_folder() as scratch:
            return (
                Steps(FrontEnds(inputs, 1), scratch, lambda *_: None)
                .to_ptx(Unit(tuple(members)))[list(members).index(kernel)]
                .text
            )

    assert module([kernel]) == module(five) == module(twenty)


@pytest.mark.slow
@pytest.mark.parametrize(("gpu", "legacy"), [("B200", True), ("RTX-PRO-6000", False)])
def test_kernels_with_strings_do_not_depend_on_their_unit_either(
    gpu: str, legacy: bool, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    from tests.conftest import LEGACY

    text = f"name: x\ntarget: {{gpu: {gpu}}}\nmax_tokens: 64\nops: [{{op: fp8_gemm_nt, n: 576, k: 7168}}, {{op: fp8_gemm_nt, n: 576, k: 512}}]"
    inputs, plan = plan_of(text, tmp_path, LEGACY if legacy else None)
    kernels = list(plan.kernels)
    apart = compile_units(units.separate(kernels), inputs)
    random.Random(0).shuffle(kernels)
    assert compile_units(units.group(kernels, 1), inputs) == compile_units(units.group(kernels, 2), inputs) == apart
    check_code([k for k in kernels if "transpose" in k.name], apart, inputs)


@pytest.mark.slow
def test_one_bad_kernel_does_not_take_its_unit_down(built: building.Built, tmp_path: Path) -> None:
    kernels = [kernel for kernel in built.plan.kernels if "gemm" in kernel.name]
    bad = kernels[1].model_copy(update={"source": kernels[1].source + '\nstatic_assert(false, "not today");\n'})
    members = [kernels[0], bad, *kernels[2:]]
    store = CubinStore(tmp_path / "store")
    with pytest.raises(CompileError) as error:
        compiling.compile_kernels(built.inputs, members, CompileOptions(jobs=1), store)
    assert f"1 of {len(members)} kernels did not compile" in str(error.value)
    assert f"{bad.entry}:" in str(error.value) and "not today" in str(error.value)
    good = [kernel for kernel in members if kernel is not bad]
    again = compiling.compile_kernels(built.inputs, good, store=store)
    assert (again.compiled, again.reused) == ([], len(good))


def test_what_nvcc_says_of_several_kernels_is_said_once(built: building.Built, tmp_path: Path) -> None:
    one, two = [kernel for kernel in built.plan.kernels if "gemm" in kernel.name][:2]
    bad = [kernel.model_copy(update={"source": "#include <no_such.h>\n" + kernel.source}) for kernel in (one, two)]
    with pytest.raises(CompileError) as error:
        compiling.compile_kernels(built.inputs, bad, store=CubinStore(tmp_path / "store"))
    said = str(error.value)
    assert "2 of 2 kernels did not compile" in said and one.entry in said and two.entry in said
    assert said.count("fatal error: no_such.h") == 1
    assert error.value.hint and "nvcc finds no no_such.h: install that part of its CUDA toolkit" in error.value.hint


def test_a_source_that_makes_another_kernel_than_it_names_is_refused(built: building.Built) -> None:
    one, two = [kernel for kernel in built.plan.kernels if "gemm" in kernel.name][:2]
    with pytest.raises(CompileError, match="wanted a kernel with template arguments"):
        modules = [ptx.KernelPtx("_Z3fooILi3EEvv", "", ()), ptx.KernelPtx("_Z3fooILi4EEvv", "", ())]
        check_order(Unit((one, two)), modules)
    with pytest.raises(CompileError, match="wanted 2 kernels in the compiled source, found 1"):
        check_order(Unit((one, two)), modules[:1])


def test_units_hold_every_kernel_once_and_only_with_its_like() -> None:
    kernels = [
        Kernel(entry=f"{name}.{number}", name=name, source=f"#include <{name}.cuh>\n&{name}<{number}>", flags=flags, selected_by=())
        for name in ("a", "b")
        for flags in (("-O3",), ("-O2",))
        for number in range(40)
    ]  # fmt: skip
    for jobs in (1, 2, 16, 64):
        work = units.group(kernels, jobs)
        assert sorted(k.entry for u in work for k in u.kernels) == sorted(k.entry for k in kernels)
        assert all(len({(k.name, k.flags) for k in u.kernels}) == 1 for u in work)
        assert len(work) <= max(jobs, 4) + 2
    assert max(len(unit.kernels) for unit in units.group(kernels * 20, 1)) <= units.MAX_KERNELS


def test_shared_memory_of_template_dependent_alignment_keeps_kernels_apart(deep_gemm: Path | None) -> None:
    include = installation.find(deep_gemm).include / "deep_gemm"
    dependent = [
        file.stem
        for file in sorted(include.rglob("*.cuh"))
        if re.search(r"extern\s+__shared__\s+__align__\(\s*[A-Za-z_]", file.read_text())
    ]
    assert len(dependent) >= 10
    assert [name for name in dependent if not any(part in name for part in units.ALONE)] == []
    kernels = [
        Kernel(entry=str(n), name="sm100_mqa_logits", source=f"&a<{n}>", flags=(), selected_by=()) for n in (1, 2)
    ]
    assert all(len(unit.kernels) == 1 for unit in units.group(kernels, 1))


def test_template_arguments_are_those_of_the_kernel_and_no_floats() -> None:
    source = "#include <a.cuh>\nstatic_assert(sizeof(s::S<\n1, 2>) == 3);\nauto p = &k::a<4, true, 0x0p+0f, T, 0x1.9p+4f, 5>;"
    assert units.literals(source) == ("4", "1", "5")
    assert ptx.KernelPtx("_Z1aILj4ELb1ELf00000000ELf41c80000ELj5EEvv", "", ()).literals == ("4", "1", "5")


def test_line_information_keeps_kernels_apart() -> None:
    kernels = [
        Kernel(entry=str(n), name="a", source=f"&a<{n}>", flags=("-lineinfo",), selected_by=()) for n in range(3)
    ]
    assert all(len(unit.kernels) == 1 for unit in units.group(kernels, 1))


MODULE = """\
// made up
.version 9.0
.target sm_90a
.address_size 64
\t// .globl\tone
.extern .func  (.param .b32 func_retval0) vprintf
(
\t.param .b64 vprintf_param_0
)
;
.global .align 1 .b8 _ZN39_INTERNAL_84f6a6b5_9_kernel_cu_8cdc1683_4thingE[1];
.global .align 1 .b8 $str[2] = {97, 0};
.global .align 1 .b8 $str$1[2] = {98, 0};

.visible .entry _Z3oneILi1EEvv(
\t.param .u64 p
)
.maxntid 32, 1, 1
{
\tmov.u64 %rd1, $str;
$L__BB0_1:
\tbra $L__BB0_1;
}
.entry _Z3oneILi2EEvv()
{
\t{ // inline asm
\tmov.u64 %rd1, $str$1;
\t}
$L__BB1_1:
\tcall vprintf;
\tbra $L__BB1_1;
}
"""


def test_a_module_is_taken_apart_into_canonical_ones() -> None:
    one, two = ptx.split(MODULE)
    assert (one.name, one.literals, one.strings) == ("_Z3oneILi1EEvv", ("1",), ("[2] = {97, 0};",))
    assert two.strings == ("[2] = {98, 0};",)
    assert "$canonical_0[2] = {97" in one.text and "98" not in one.text
    assert "$canonical_0[2] = {98" in two.text and "97" not in two.text
    assert "84f6a6b5" not in one.text + two.text
    assert "BB1_" not in two.text.replace("$L__BB3_", "") and "//" not in two.text


def test_taking_apart_what_is_apart_changes_nothing() -> None:
    for kernel in ptx.split(MODULE):
        (again,) = ptx.split(kernel.text)
        assert again.text == kernel.text


@pytest.mark.parametrize("cut", [40, 320, 600])
def test_text_that_is_not_understood_is_refused_not_guessed(cut: int) -> None:
    with pytest.raises(ptx.PtxError):
        ptx.split(MODULE[:cut] + "\n.strange thing\n")
