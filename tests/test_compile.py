from __future__ import annotations

import random
import re
from collections.abc import Sequence
from pathlib import Path

import pytest

from cachebuilder import building
from cachebuilder.common.cache import scratch_folder
from cachebuilder.compiling import check, units
from cachebuilder.compiling import compiler as compiling
from cachebuilder.compiling.compiler import CompileOptions, Compiler
from cachebuilder.compiling.front_end import FrontEnds
from cachebuilder.compiling.schedule import Schedule
from cachebuilder.compiling.steps import Steps, check_order
from cachebuilder.compiling.store import CubinStore, NoStore
from cachebuilder.compiling.units import Unit
from cachebuilder.cuda import ptx
from cachebuilder.cuda.processes import Processes
from cachebuilder.deepgemm import installation
from cachebuilder.errors import CompileError
from cachebuilder.manifest.inputs import Inputs, load_manifest
from cachebuilder.planning import make as planning
from cachebuilder.planning.plan import Kernel, Plan
from tests.conftest import LEGACY, check_code
from tests.test_plan import EVERY_OP


def plan_of(text: str, folder: Path, deep_gemm: Path | None) -> tuple[Inputs, Plan]:
    (folder / "m.yaml").write_text(text)
    inputs = load_manifest(folder / "m.yaml", deep_gemm=deep_gemm)
    return inputs, planning.make(inputs)


def compile_units(work: Sequence[Unit], front_ends: FrontEnds) -> dict[str, bytes]:
    cubins: dict[str, bytes] = {}
    with scratch_folder() as scratch:
        steps = Steps(front_ends, scratch, lambda kernel, cubin: cubins.update({kernel.entry: cubin}))
        steps.run(work)
        assert steps.failures == []
    return cubins


def light_kernels(built: building.Built) -> list[Kernel]:
    """Three kernels with the same headers, the shortest of all: the plan's transpose, for other block heights, too."""
    kernel = next(kernel for kernel in built.plan.kernels if kernel.name == "transpose_fp32")
    height = re.search(r"transpose_fp32<\s*\d+, (\d+),", kernel.source)
    assert height is not None
    start, end = height.span(1)
    return [
        kernel.model_copy(update={"entry": number, "source": kernel.source[:start] + number + kernel.source[end:]})
        for number in ("16", "32", "64")
    ]


@pytest.mark.slow
@pytest.mark.parametrize("deep_gemm", ["deepjit"], indirect=True, scope="session")
def test_compiling_reports_its_first_and_its_last_kernel(built: building.Built) -> None:
    reports: list[tuple[str, int, int, float | None]] = []

    def watch(step: str, done: int, total: int, share: float | None = None) -> None:
        reports.append((step, done, total, share))

    options = CompileOptions(check_code=0)
    compiling.compile_kernels(built.inputs, light_kernels(built)[:2], options, NoStore(), watch)
    assert reports[0] == ("compile", 0, 2, 0.0)
    assert reports[-1] == ("compile", 2, 2, 1.0)


@pytest.mark.slow
@pytest.mark.parametrize("deep_gemm", ["deepjit"], indirect=True, scope="session")
def test_a_difference_in_code_is_found(built: building.Built, tmp_path: Path) -> None:
    cubins = built.compiled.cubins
    one = next(kernel for kernel in built.plan.kernels if kernel.name == "transpose_fp32")
    two = next(kernel for kernel in built.plan.kernels if "gemm" in kernel.name)
    own = check.compile_alone(one, built.inputs, Processes(), tmp_path)
    check.require_equal(one, own, cubins[one.entry])
    with pytest.raises(CompileError, match=f"{one.entry}: the code differs from what nvcc makes .* alone, in .*text"):
        check.require_equal(one, own, cubins[two.entry])


@pytest.mark.slow
def test_a_cubin_does_not_depend_on_the_other_kernels_of_its_unit(tmp_path: Path) -> None:
    inputs, plan = plan_of(EVERY_OP.format(gpu="H200"), tmp_path, None)
    family = [kernel for kernel in plan.kernels if kernel.name == "sm90_m_grouped_fp8_gemm_contiguous_1d2d"]
    kernel, *others = random.Random(0).sample(family, 7)

    three = [others[0], kernel, others[1]]
    seven = [*others[2:], kernel, *others[:2]]
    with FrontEnds(inputs, 1) as front_ends:
        held = front_ends.of(kernel.source, kernel.flags)
        assert held.open()
        steps = Steps(front_ends, tmp_path, lambda *_: None)

        def module(members: Sequence[Kernel]) -> str:
            return steps.to_ptx(Unit(tuple(members)), held)[list(members).index(kernel)].text

        assert module([kernel]) == module(three) == module(seven)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("gpu", "legacy", "name"),
    [("B200", True, "transpose_and_pack_fp32_into_ue8m0"), ("RTX-PRO-6000", False, "sm120_fp8_fp4_gemm_1d1d")],
)
def test_the_cubin_of_a_kernel_with_strings_does_not_depend_on_its_unit(
    gpu: str, legacy: bool, name: str, tmp_path: Path
) -> None:
    text = f"name: x\ntarget: {{gpu: {gpu}}}\nmax_tokens: 16\nops: [{{op: fp8_gemm_nt, n: 576, k: 7168}}, {{op: fp8_gemm_nt, n: 576, k: 512}}]"
    inputs, plan = plan_of(text, tmp_path, LEGACY if legacy else None)
    kernels = [kernel for kernel in plan.kernels if kernel.name == name]
    assert len(kernels) >= 2
    with FrontEnds(inputs, 2) as front_ends:
        separately = compile_units(units.separate(kernels), front_ends)
        random.Random(0).shuffle(kernels)
        assert compile_units(units.group(kernels, 1), front_ends) == separately
    check_code(kernels[:1], separately, inputs)


@pytest.mark.slow
@pytest.mark.parametrize("deep_gemm", ["deepjit"], indirect=True, scope="session")
def test_one_bad_kernel_does_not_fail_the_others_of_its_unit(built: building.Built, tmp_path: Path) -> None:
    kernels = light_kernels(built)
    bad = kernels[1].model_copy(update={"source": kernels[1].source + '\nstatic_assert(false, "not today");\n'})
    members = [kernels[0], bad, *kernels[2:]]
    store = CubinStore(tmp_path / "store")
    with Compiler(built.inputs, CompileOptions(jobs=1, check_code=0), store) as compiler:
        compiler.expect(bad.source, bad.flags)  # so that the halves of the unit do not parse the headers again
        with pytest.raises(CompileError) as error:
            compiler.compile(members)
    assert f"1 of {len(members)} kernels did not compile" in str(error.value)
    assert f"{bad.entry}:" in str(error.value) and "not today" in str(error.value)
    good = [kernel for kernel in members if kernel is not bad]
    again = compiling.compile_kernels(built.inputs, good, store=store)
    assert (again.compiled, again.reused) == ([], len(good))


def test_an_error_that_several_kernels_share_is_printed_once(built: building.Built, tmp_path: Path) -> None:
    one, two = [kernel for kernel in built.plan.kernels if "gemm" in kernel.name][:2]
    bad = [kernel.model_copy(update={"source": "#include <no_such.h>\n" + kernel.source}) for kernel in (one, two)]
    with pytest.raises(CompileError) as error:
        compiling.compile_kernels(built.inputs, bad, store=CubinStore(tmp_path / "store"))
    message = str(error.value)
    assert "2 of 2 kernels did not compile" in message and one.entry in message and two.entry in message
    assert message.count("fatal error: no_such.h") == 1
    assert error.value.hint and "nvcc cannot find no_such.h: install that part of its CUDA toolkit" in error.value.hint


def test_the_share_of_the_work_never_falls_and_ends_at_one_even_if_a_failure_adds_work() -> None:
    shares: list[float] = []
    results: list[str] = []
    schedule = Schedule(1, shares.append, stop=lambda: None)

    def fail() -> str:
        raise CompileError("too large")

    def add_halves(message: str) -> None:
        schedule.add(3.0, lambda: "left", results.append, pytest.fail)
        schedule.add(2.0, lambda: "right", results.append, pytest.fail)

    schedule.add(0.1, fail, pytest.fail, add_halves)
    schedule.add(4.0, lambda: "longest", results.append, pytest.fail)
    schedule.run()
    assert results == ["longest", "left", "right"]
    assert len(shares) == 4 and shares == sorted(shares) and shares[-1] == 1.0


def test_a_compiled_source_with_other_kernels_than_it_names_is_refused(built: building.Built) -> None:
    one, two = [kernel for kernel in built.plan.kernels if "gemm" in kernel.name][:2]
    modules = [ptx.KernelPtx("_Z3fooILi3EEvv", "", ()), ptx.KernelPtx("_Z3fooILi4EEvv", "", ())]
    with pytest.raises(CompileError, match="wanted a kernel with template arguments"):
        check_order(Unit((one, two)), modules)
    with pytest.raises(CompileError, match="wanted 2 kernels in the compiled source, found 1"):
        check_order(Unit((one, two)), modules[:1])


def test_units_hold_every_kernel_once_and_share_headers_and_flags() -> None:
    kernels = [
        Kernel(entry=f"{name}.{number}", name=name, source=f"#include <{name}.cuh>\n&{name}<{number}>", flags=flags, selected_by=())
        for name in ("a", "b")
        for flags in (("-O3",), ("-O2",))
        for number in range(40)
    ]  # fmt: skip
    for jobs in (1, 2, 16, 64):
        work = units.group(kernels, jobs)
        grouped = [kernel.entry for unit in work for kernel in unit.kernels]
        assert sorted(grouped) == sorted(kernel.entry for kernel in kernels)
        assert all(len({(kernel.name, kernel.flags) for kernel in unit.kernels}) == 1 for unit in work)
        assert len(work) <= max(jobs, 4) + 2
    assert max(len(unit.kernels) for unit in units.group(kernels * 20, 1)) <= units.MAX_KERNELS


def test_kernels_of_two_templates_are_not_in_one_unit(deep_gemm: Path | None) -> None:
    header = installation.find(deep_gemm).include / "deep_gemm" / "impls" / "smxx_layout.cuh"
    types = set(re.findall(r"extern __shared__ (\w+) smem_buffer\[\]", header.read_text()))
    assert len(types) > 1, "the two declarations of one name, which no unit compiles with"
    kernels = [
        Kernel(entry=f"{name}.{n}", name=name, source=f"#include <a>\n&{name}<{n}>", flags=(), selected_by=())
        for name in ("a", "b")
        for n in range(3)
    ]
    assert [{kernel.name for kernel in unit.kernels} for unit in units.group(kernels, 1)] == [{"a"}, {"b"}]


def test_kernels_whose_shared_memory_alignment_depends_on_the_template_are_compiled_alone(
    deep_gemm: Path | None,
) -> None:
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


def test_template_arguments_are_those_of_the_kernel_without_floats() -> None:
    source = "#include <a.cuh>\nstatic_assert(sizeof(s::S<\n1, 2>) == 3);\nauto p = &k::a<4, true, 0x0p+0f, T, 0x1.9p+4f, 5>;"
    assert units.literals(source) == ("4", "1", "5")
    assert ptx.KernelPtx("_Z1aILj4ELb1ELf00000000ELf41c80000ELj5EEvv", "", ()).literals == ("4", "1", "5")


def test_kernels_with_line_information_are_compiled_alone() -> None:
    kernels = [
        Kernel(entry=str(n), name="a", source=f"&a<{n}>", flags=("-lineinfo",), selected_by=()) for n in range(3)
    ]
    assert all(len(unit.kernels) == 1 for unit in units.group(kernels, 1))


MODULE = """\
// not from a compiler
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


def test_a_module_is_split_into_one_canonical_module_for_each_kernel() -> None:
    one, two = ptx.split(MODULE)
    assert (one.name, one.literals, one.strings) == ("_Z3oneILi1EEvv", ("1",), ("[2] = {97, 0};",))
    assert two.strings == ("[2] = {98, 0};",)
    assert "$canonical_0[2] = {97" in one.text and "98" not in one.text
    assert "$canonical_0[2] = {98" in two.text and "97" not in two.text
    assert "84f6a6b5" not in one.text + two.text
    assert "BB1_" not in two.text.replace("$L__BB3_", "") and "//" not in two.text


def test_splitting_a_canonical_module_changes_nothing() -> None:
    for kernel in ptx.split(MODULE):
        (again,) = ptx.split(kernel.text)
        assert again.text == kernel.text


@pytest.mark.parametrize("cut", [40, 320, 600])
def test_text_of_an_unknown_form_is_refused(cut: int) -> None:
    with pytest.raises(ptx.PtxError):
        ptx.split(MODULE[:cut] + "\n.strange thing\n")
