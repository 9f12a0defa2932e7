"""The names of template arguments, held against the headers of the installed copies."""

from pathlib import Path

import pytest

from cachebuilder.artifact.read import open_archive
from cachebuilder.building import Built
from cachebuilder.deepgemm import installation, templates
from tools.templates import declared_templates

SOURCE = """
#include <deep_gemm/impls/sm90_fp8_gemm_1d2d.cuh>
static void __instantiate_kernel() {
    auto ptr = reinterpret_cast<void*>(&sm90_fp8_gemm_1d2d_impl<
        cute::UMMA::Major::K, 0, 3072, 1536, 1, 128, 96, 128, 128, 128, 64, 7, 128, 256, 1, false,
        132, GemmType::Normal, cutlass::bfloat16_t>);
};
"""


def test_the_table_holds_every_template_of_the_headers_here(deep_gemm: Path | None) -> None:
    declared = declared_templates(installation.find(deep_gemm).include / "deep_gemm")
    assert len(declared) > 30
    missing = [name for name, parameters in declared.items() if parameters not in templates._table().get(name, [])]
    assert not missing, "run tools/templates.py DEEP_GEMM_FOLDER"


def test_arguments_of_built_kernels_have_the_names_of_the_headers_they_were_built_with(built: Built) -> None:
    declared = declared_templates(built.inputs.installation.include / "deep_gemm")
    with open_archive(built.packed.path) as archive:
        sources = [data.decode() for member, data in archive.files() if member.file.name == "kernel.cu"]
    for source in sources:
        template, _ = templates.instantiated(source)
        for position, parameter in enumerate(templates.parameters(source)):
            assert parameter.name in (None, declared[template or ""][position].split()[-1].rstrip("?"))


def test_a_gemms_arguments_have_words() -> None:
    parameters = templates.parameters(SOURCE)
    assert templates.highlights(parameters) == {"block": "128×96×128", "stages": "7", "cluster": "1"}
    assert {parameter.plain_name: parameter.words for parameter in parameters}["NumStages"] == (
        "pipeline stages in shared memory"
    )


@pytest.mark.parametrize("source", ["", "int x;", SOURCE.replace("sm90_fp8", "sm999")])
def test_a_template_that_the_table_lacks_has_no_names(source: str) -> None:
    assert all(parameter.name is None for parameter in templates.parameters(source))
    assert templates.highlights(templates.parameters(source)) == {}
