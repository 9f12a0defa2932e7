"""The JSON schemas: current, shipped, and true of what is read and written."""

import json
from pathlib import Path

import jsonschema
import pytest
from ruamel.yaml import YAML

from cachebuilder.artifact.read import read_index
from cachebuilder.building import Built
from cachebuilder.compiling import record as build_record
from cachebuilder.inspecting import schemas
from tests.conftest import MANIFESTS, ROOT, SMALL, Run
from tests.test_report import report_on


def validator(name: str) -> jsonschema.Draft202012Validator:
    return jsonschema.Draft202012Validator(json.loads((ROOT / "schemas" / f"{name}.json").read_text()))


@pytest.mark.parametrize("name", schemas.SCHEMAS)
def test_the_shipped_schemas_are_current(name: str) -> None:
    shipped = (ROOT / "schemas" / f"{name}.json").read_text()
    assert shipped == schemas.text(name), f"cachebuilder schema {name} > schemas/{name}.json"
    jsonschema.Draft202012Validator.check_schema(json.loads(shipped))


@pytest.mark.parametrize("path", sorted(MANIFESTS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_manifest_names_its_schema_and_follows_it(path: Path) -> None:
    first = path.read_text().splitlines()[0]
    assert first.startswith("# yaml-language-server: $schema=")
    assert (path.parent / first.partition("=")[2]).resolve() == ROOT / "schemas" / "manifest.json"
    validator("manifest").validate(YAML(typ="safe").load(path))


@pytest.mark.parametrize(
    "wrong", ["gpu: H200 →gpus: H200 ", "n: 576→n: wide", "max_tokens: 40→max_tokens: 0", "op: fp8_gemm_nt→op: gemm"]
)
def test_the_manifests_schema_refuses_what_the_program_refuses(wrong: str) -> None:
    before, _, after = wrong.partition("→")
    text = SMALL.replace(before.strip(), after.strip(), 1)
    assert text != SMALL and list(validator("manifest").iter_errors(YAML(typ="safe").load(text)))


def test_what_is_written_follows_its_schema(built: Built) -> None:
    index = read_index(built.packed.path)
    record = build_record.path_for(built.packed.path)
    for name, document in (
        ("artifact", index.model_dump(exclude_none=True)),
        ("plan", json.loads(built.plan.model_dump_json(exclude_none=True))),
        ("report", report_on(built.packed.sha256, built.plan.kernels[0].entry)),
        ("build", json.loads(record.read_text())),
    ):
        validator(name).validate(document)
        with pytest.raises(jsonschema.ValidationError):
            validator(name).validate({})


def test_schema_prints_what_is_shipped(run: Run) -> None:
    assert run("schema", "manifest").stdout == (ROOT / "schemas" / "manifest.json").read_text()
    assert run("schema", "nothing").returncode == 2
