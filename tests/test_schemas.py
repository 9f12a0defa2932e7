"""The JSON schemas: the shipped ones are current, and all of them describe what is read and written."""

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from pydantic import TypeAdapter
from ruamel.yaml import YAML

from cachebuilder.artifact.read import read_index
from cachebuilder.building import Built
from cachebuilder.compiling import record as build_record
from cachebuilder.inspecting import diff, doctor, explain, schemas
from tests.conftest import MANIFESTS, ROOT, SMALL, Run
from tests.test_report import report_on

#: manifest.json is for editors, artifact.json for other programs that read artifacts.
SHIPPED = sorted((ROOT / "schemas").iterdir())


def validator(name: str) -> jsonschema.Draft202012Validator:
    return jsonschema.Draft202012Validator(json.loads(schemas.text(name)))


def resolved(schema: Any, definitions: dict[str, Any], inside: tuple[str, ...] = ()) -> Any:
    """The schema with every ``$ref`` replaced by what it refers to."""
    if isinstance(schema, list):
        return [resolved(part, definitions, inside) for part in schema]
    if not isinstance(schema, dict):
        return schema
    if isinstance(reference := schema.get("$ref"), str):
        name = reference.removeprefix("#/$defs/")
        assert name not in inside, f"{name} contains itself"
        return resolved(definitions[name], definitions, (*inside, name))
    return {key: resolved(part, definitions, inside) for key, part in schema.items() if key != "$defs"}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_the_shipped_schemas_are_current(path: Path) -> None:
    assert path.read_text() == schemas.text(path.stem), f"cachebuilder schema {path.stem} > schemas/{path.name}"


@pytest.mark.parametrize("name", schemas.SCHEMAS)
def test_every_schema_is_one_and_says_what_its_model_says(name: str) -> None:
    schema = json.loads(schemas.text(name))
    jsonschema.Draft202012Validator.check_schema(schema)
    model = TypeAdapter(schemas.SCHEMAS[name][1]).json_schema(schema_generator=schemas.Generator)
    assert resolved(schema, schema.get("$defs", {})) == resolved(model, model.get("$defs", {})) | {
        "$schema": schema["$schema"],
        "title": schema["title"],
    }


def test_schema_prints_what_is_shipped(run: Run) -> None:
    assert run("schema", "manifest").stdout == (ROOT / "schemas" / "manifest.json").read_text()
    assert run("schema", "nothing").returncode == 2


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


def test_an_editor_finds_the_description_of_a_field_that_ops_share() -> None:
    definitions = json.loads((ROOT / "schemas" / "manifest.json").read_text())["$defs"]
    for op in ("Fp8GemmNt", "MGroupedFp8GemmNtContiguous"):
        field = definitions[op]["properties"]["n"]
        assert list(field) == ["$ref"] and "multiple of 8" in resolved(field, definitions)["description"]


def test_what_is_written_follows_its_schema(built: Built) -> None:
    artifact = built.packed.path
    entry = built.plan.kernels[0].entry
    for name, document in (
        ("artifact", read_index(artifact).model_dump(mode="json", exclude_none=True)),
        ("plan", json.loads(built.plan.model_dump_json(exclude_none=True))),
        ("report", report_on(built.packed.sha256, entry)),
        ("build", json.loads(build_record.path_for(artifact).read_text())),
        ("diff", json.loads(diff.compare(diff.read(artifact), diff.read(artifact)).to_json())),
        ("doctor", json.loads(doctor.examine(artifact).to_json())),
        ("explain", json.loads(explain.explain(entry, artifact).to_json())),
    ):
        validator(name).validate(document)
        with pytest.raises(jsonschema.ValidationError):
            validator(name).validate({})
