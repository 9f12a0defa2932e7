"""JSON schemas of the files that cachebuilder reads and writes and of what ``--json`` prints, made from the models.

``schemas/`` in the repository holds two of them, manifest.json for editors and artifact.json for other programs that
read artifacts. A test compares them with the models.
"""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

from pydantic import TypeAdapter
from pydantic.json_schema import GenerateJsonSchema

from cachebuilder.artifact.index import Index
from cachebuilder.compiling.record import BuildRecord
from cachebuilder.cuda.gpus import Gpu
from cachebuilder.fleet.schema import Fleet
from cachebuilder.fleet.status import Status
from cachebuilder.inspecting.diff import Comparison
from cachebuilder.inspecting.doctor import Findings
from cachebuilder.inspecting.explain import Explanation
from cachebuilder.manifest.schema import Manifest
from cachebuilder.planning.plan import Plan
from cachebuilder.restoring import misses
from cachebuilder.verifying.report import GpuReport, Report

Schema = dict[str, Any]

#: name → the document that it describes, and the document's type.
SCHEMAS: dict[str, tuple[str, Any]] = {
    "manifest": ("a manifest", Manifest),
    "plan": ("plan --json", Plan),
    "artifact": ("artifact.json in an artifact, which inspect --json prints", Index),
    "report": ("the report of verify --device cuda", GpuReport),
    "build": ("the record of a build beside the artifact", BuildRecord),
    "verify": ("verify --json", Report),
    "diff": ("diff --json", Comparison),
    "doctor": ("doctor --json", Findings),
    "misses": ("misses --json", misses.Log),
    "explain": ("explain --json", Explanation),
    "gpus": ("gpus --json", list[Gpu]),
    "fleet": ("fleet.yaml", Fleet),
    "status": ("fleet status --json", Status),
}

#: Characters of a line, within which a part of a schema stays on one line.
_WIDTH = 120


class Generator(GenerateJsonSchema):
    """Leaves out the titles of fields, which repeat the fields' names."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        """Never."""
        return False


def text(name: str) -> str:
    """The schema called ``name`` as JSON text, for draft 2020-12."""
    title, kind = SCHEMAS[name]
    schema = share_fields(TypeAdapter(kind).json_schema(schema_generator=Generator))
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema"} | schema | {"title": f"cachebuilder: {title}"}
    return _render(schema, 0) + "\n"


def share_fields(schema: Schema) -> Schema:
    """``schema`` with every field that several records have once, in ``$defs``, and a ``$ref`` to it in each of them.

    Records have a field in common where its name and its schema are equal. pydantic repeats such a field in each
    record, and the manifest's ops have most of their fields in common.
    """
    definitions = dict(schema.get("$defs", {}))
    records = {name: record for name, record in {"": schema, **definitions}.items() if "properties" in record}
    uses = Counter((name, json.dumps(field)) for r in records.values() for name, field in r["properties"].items())
    # A field of nothing but a type, or a reference, is no longer than another reference.
    shared = [(name, text) for (name, text), count in uses.items() if count > 1 and len(json.loads(text)) > 1]
    references: dict[tuple[str, str], Schema] = {}
    for name, text in shared:
        variants = sum(other == name for other, _ in references)
        key = f"{name}-{variants + 1}" if variants else name
        definitions[key] = json.loads(text)
        references[name, text] = {"$ref": f"#/$defs/{key}"}
    for record_name, record in records.items():
        fields = record["properties"].items()
        properties = {name: references.get((name, json.dumps(field)), field) for name, field in fields}
        if record_name:
            definitions[record_name] = record | {"properties": properties}
        else:
            schema = schema | {"properties": properties}
    return schema | {"$defs": definitions} if definitions else schema


def _render(value: Any, indent: int) -> str:
    """``value`` as JSON: what fits into a line stands on one line."""
    line = json.dumps(value, ensure_ascii=False)
    if len(line) + indent <= _WIDTH or not isinstance(value, dict | list):
        return line
    if isinstance(value, dict):
        parts = [f"{json.dumps(key)}: {_render(part, indent + 1)}" for key, part in value.items()]
    else:
        parts = [_render(part, indent + 1) for part in value]
    first, last = "{}" if isinstance(value, dict) else "[]"
    space = "\n" + " " * indent
    return first + ",".join(f"{space} {part}" for part in parts) + space + last
