"""What a manifest and an artifact say of FlashInfer: read exactly, or refused with a reason. Nothing is compiled here."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from cachebuilder import building
from cachebuilder.artifact.index import (
    Entry,
    File,
    FlashInferFingerprint,
    FlashInferPart,
    Index,
)
from cachebuilder.artifact.read import parse_index
from cachebuilder.authoring.derive.manifest import Deployment, derive_manifest
from cachebuilder.compiling import flashinfer as compiling
from cachebuilder.errors import ArtifactError, InstallationError, ManifestError, ModelError
from cachebuilder.flashinfer import entries, installation, stand_in
from cachebuilder.manifest import schema as manifest
from cachebuilder.manifest.inputs import load_manifest
from cachebuilder.restoring.machine import Machine
from cachebuilder.sweep import flashinfer as sweep
from tests.archives import unpack
from tests.configs import DEEPSEEK_V3
from tests.conftest import FLASHINFER, ROOT

HEAD = "name: x\ntarget: {gpu: H200}\nmax_tokens: 8\nops: [{op: fp8_gemm_nt, n: 576, k: 512}]\n"
FINGERPRINT = FlashInferFingerprint(version="0.6.13", headers="0" * 64, tvm_ffi="0.1.11", arch="sm_90a", glibc="2.34")
ENTRY = "gemm_swapAB_5120_2048_128_16_128_1_81_8_1_Normal"


def part(**fields: object) -> FlashInferPart:
    file = File(name="", size=1, sha256="0" * 64)
    whole = FlashInferPart(
        fingerprint=FINGERPRINT,
        modules=(Entry(name="page", files=(file.model_copy(update={"name": "page.so"}),), selected_by=()),),
        gemms=({"n": 5120, "k": 2048, "max_m": 31},),
        entries=(
            Entry(
                name=ENTRY,
                files=tuple(file.model_copy(update={"name": name}) for name in entries.FILES),
                selected_by=(),
            ),
        ),
    )
    return whole.model_copy(update=fields)


def with_part(artifact: Path, given: FlashInferPart) -> bytes:
    index = Index.model_validate_json(unpack(artifact)[0].data)
    return (
        index.model_copy(update={"flashinfer": given, "schema_version": 2}).model_dump_json(exclude_none=True).encode()
    )


def test_a_manifest_names_modules_and_shapes_and_the_shapes_bring_their_module() -> None:
    model = manifest.parse(f"{HEAD}flashinfer: {{modules: [page], gemms: [{{n: 576, k: 512}}]}}\n".encode())
    assert model.flashinfer is not None
    assert model.flashinfer.all_modules == ["fp8_blockscale_gemm_90", "page"]
    assert model.flashinfer.gemms[0].max_m == 31


@pytest.mark.parametrize(
    ("text", "words"),
    [
        pytest.param("{}", "wanted modules, or gemms; found neither", id="nothing"),
        pytest.param("{modules: [page, page]}", "modules: wanted each once, found page twice", id="twice"),
        pytest.param("{gemms: [{n: 64, k: 128}, {n: 64, k: 128, max_m: 3}]}", "wanted each once", id="shape-twice"),
        pytest.param("{modules: ['../page']}", "wanted the name of a FlashInfer module", id="path"),
        pytest.param("{gemms: [{n: 65, k: 128}]}", "flashinfer.gemms[0].n: wanted a multiple of 64, found 65", id="n"),
        pytest.param("{gemms: [{n: 64, k: 64}]}", "flashinfer.gemms[0].k", id="k"),
        pytest.param("{gemms: [{n: 64, k: 128, m: 3}]}", "known here: n, k, max_m", id="unknown-field"),
        pytest.param("{module: [page]}", "did you mean modules?", id="misspelt"),
    ],
)
def test_a_manifest_that_says_it_wrong_is_refused_with_the_field(text: str, words: str) -> None:
    with pytest.raises(ManifestError) as error:
        manifest.parse(f"{HEAD}flashinfer: {text}\n".encode(), "m.yaml")
    assert words in str(error.value)


def test_the_gemm_is_refused_on_a_gpu_for_which_flashinfer_has_none() -> None:
    with pytest.raises(ManifestError, match="FlashInfer has this GEMM on SM90 only"):
        manifest.parse(f"{HEAD.replace('H200', 'B200')}flashinfer: {{gemms: [{{n: 64, k: 128}}]}}\n".encode())


def test_an_index_with_a_part_for_flashinfer_is_read_as_it_was_written(artifact: Path) -> None:
    index = parse_index(with_part(artifact, part()), artifact)
    assert index.flashinfer == part()
    assert list(index.folders) == ["cache", "flashinfer/modules", "flashinfer/cache"]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        pytest.param({"modules": (Entry(name="../page", files=(), selected_by=()),)}, "names of modules", id="path"),
        pytest.param(
            {"modules": (Entry(name="page", files=(), selected_by=()),)}, "wanted the files page.so", id="files"
        ),
        pytest.param({"entries": (Entry(name="gemm_1", files=(), selected_by=()),)}, "names of the GEMM's", id="entry"),
        pytest.param({"modules": part().modules * 2}, "found page twice", id="twice"),
        pytest.param({"gemms": ({"n": "\x1b[2J"},)}, "control characters", id="control"),
        pytest.param(
            {"fingerprint": FINGERPRINT.model_copy(update={"glibc": "2.x"})}, "wanted major.minor", id="glibc"
        ),
    ],
)
def test_a_hostile_part_for_flashinfer_is_refused(artifact: Path, given: dict[str, object], words: str) -> None:
    with pytest.raises(ArtifactError, match=r"flashinfer|page") as error:
        parse_index(with_part(artifact, part(**given)), artifact)
    assert words in str(error.value)


def test_only_an_index_with_a_part_for_flashinfer_has_the_second_schema(artifact: Path) -> None:
    index = json.loads(with_part(artifact, part())) | {"schema_version": 1}
    with pytest.raises(ArtifactError, match="wanted 2 for what the index holds, found 1"):
        parse_index(json.dumps(index).encode(), artifact)
    del index["flashinfer"]
    assert parse_index(json.dumps(index).encode(), artifact).schema_version == 1
    with pytest.raises(ArtifactError, match="wanted 1 for what the index holds, found 2"):
        parse_index(json.dumps(index | {"schema_version": 2}).encode(), artifact)


def test_an_artifact_fits_the_flashinfer_that_it_was_built_with_and_no_other(built: building.Built) -> None:
    here = installation.find(FLASHINFER)
    fingerprint = FINGERPRINT.model_copy(update={"headers": here.headers_digest, "tvm_ffi": here.tvm_ffi})
    index = Index.model_validate_json(unpack(built.packed.path)[0].data)
    index = index.model_copy(update={"flashinfer": part(fingerprint=fingerprint)})
    machine = Machine(built.inputs.installation, flashinfer=here, glibc="2.36")
    assert not machine.differences(index, relocates=True)
    other = replace(here, version="0.7.2")
    [difference] = replace(machine, flashinfer=other).differences(index, relocates=True)
    assert (difference.field, difference.wanted, difference.found) == ("flashinfer", "0.6.13", "0.7.2")
    assert difference.causes_miss
    [difference] = replace(machine, glibc="2.31").differences(index, relocates=True)
    assert (difference.field, difference.wanted, difference.found) == ("glibc", "2.34", "2.31")
    [difference] = replace(machine, flashinfer=None).differences(index, relocates=True)
    assert difference.field == "flashinfer" and not difference.causes_miss


def test_flashinfers_version_and_sources_are_found_without_importing_it(tmp_path: Path) -> None:
    here = installation.find(FLASHINFER)
    assert (here.version, here.tvm_ffi) == ("0.6.13", "0.1.9")
    with pytest.raises(InstallationError, match=r"wanted a flashinfer package, with _build_meta\.py"):
        installation.find(tmp_path)


def test_the_stand_in_answers_both_generations_of_flashinfer(tmp_path: Path) -> None:
    package = tmp_path / "python" / stand_in.PACKAGE
    package.mkdir(parents=True)
    (tmp_path / "modules" / "page").mkdir(parents=True)
    (package / "__init__.py").write_text(stand_in.text("0.7.2", "sm_90a", "0" * 64))
    names: dict[str, object] = {"__file__": str(package / "__init__.py")}
    exec((package / "__init__.py").read_text(), names)
    assert names["__version__"] == "0.7.2"
    assert names["get_jit_cache_dir"]() == str(tmp_path / "modules")  # type: ignore[operator]
    [provider] = names["get_jit_cache_providers"]()  # type: ignore[operator]
    assert (provider.modules, provider.cuda_architectures) == (["page"], ["sm90a"])


def derived(folder: Path, **options: object) -> manifest.Manifest:
    (folder / "config.json").write_text(json.dumps(DEEPSEEK_V3))
    written = derive_manifest(folder, Deployment(with_flashinfer=True, **options))  # type: ignore[arg-type]
    return manifest.parse(written.text.encode())


def test_a_derived_manifest_carries_what_vllm_takes_from_flashinfer(tmp_path: Path) -> None:
    needs = derived(tmp_path, engine="vllm", gpu="H200", tp=8, ep=8).flashinfer
    assert needs is not None and needs.modules == ["sampling"]
    assert {(gemm.n, gemm.k) for gemm in needs.gemms} == {
        (2112, 7168), (3072, 1536), (4096, 512), (7168, 2048), (4608, 7168), (7168, 2304), (512, 7168), (7168, 256),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("ranks", "modules"),
    [
        pytest.param({"tp": 8, "ep": 8}, ["sampling"], id="16-heads-a-rank"),
        pytest.param({"dp": 8, "ep": 8}, ["concat_mla", "sampling"], id="all-heads"),
    ],
)
def test_derived_modules_are_those_that_the_observed_engine_asked_for(
    tmp_path: Path, ranks: dict[str, int], modules: list[str]
) -> None:
    recorded = [json.loads(line) for line in (ROOT / "benchmarks/results/observe-flashinfer.jsonl").open()]
    layout = "tp8-ep8" if "tp" in ranks else "tp1-ep8-dp8"
    [row] = [r for r in recorded if (r["model"], r["layout"], r["gpu"]) == ("deepseek-v3-4", layout, "H200")]
    assert row["flashinfer"]["modules"] == modules
    needs = derived(tmp_path, engine="vllm", gpu="H200", **ranks).flashinfer
    assert needs is not None and needs.modules == modules


@pytest.mark.parametrize(("engine", "gpu"), [("sglang", "H200"), ("vllm", "B200")])
def test_what_is_asked_for_and_not_taken_is_refused(tmp_path: Path, engine: str, gpu: str) -> None:
    with pytest.raises(ModelError, match="wanted vLLM on an SM90 GPU"):
        derived(tmp_path, engine=engine, gpu=gpu)


def test_a_modules_key_holds_the_headers_of_torchs_cuda_wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "m.yaml").write_text(f"{HEAD}flashinfer: {{modules: [page]}}\n")
    inputs = load_manifest(tmp_path / "m.yaml", flashinfer=FLASHINFER)
    wheel = tmp_path / "cu13"
    (wheel / "include").mkdir(parents=True)
    (wheel / "include" / "cublas_api.h").write_text("#define CUBLAS_VER_PATCH 3\n")
    monkeypatch.setattr(sweep.virtual_gpu, "find_cuda_runtime", lambda: wheel / "lib" / "libcudart.so.13")
    before = compiling.module_keys(inputs)
    assert compiling.module_keys(inputs) == before
    (wheel / "include" / "cublas_api.h").write_text("#define CUBLAS_VER_PATCH 4\n")
    assert compiling.module_keys(inputs)["page"] != before["page"]
