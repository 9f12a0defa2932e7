"""JSON schemas of the files that are read and written and of what ``--json`` prints, made from the models themselves.

``schemas/`` in the repository holds them for editors; a test says so when they are not these.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from pydantic import TypeAdapter

from cachebuilder.artifact.index import Index
from cachebuilder.compiling.record import BuildRecord
from cachebuilder.cuda.gpus import Gpu
from cachebuilder.inspecting import documents
from cachebuilder.manifest.schema import Manifest
from cachebuilder.planning.plan import Plan
from cachebuilder.restoring import misses
from cachebuilder.verifying.report import GpuReport, Report

Schema = dict[str, Any]

#: name → what the schema is of, and the schema.
SCHEMAS: dict[str, tuple[str, Callable[[], Schema]]] = {
    "manifest": ("a manifest", Manifest.model_json_schema),
    "plan": ("plan --json", Plan.model_json_schema),
    "artifact": ("artifact.json in an artifact, which inspect --json prints", TypeAdapter(Index).json_schema),
    "report": ("the report of verify --device cuda", GpuReport.model_json_schema),
    "build": ("the record of a build beside the artifact", BuildRecord.model_json_schema),
    "verify": ("verify --json", Report.model_json_schema),
    "diff": ("diff --json", TypeAdapter(documents.Diff).json_schema),
    "doctor": ("doctor --json", TypeAdapter(documents.Doctor).json_schema),
    "misses": ("misses --json", misses.Log.model_json_schema),
    "explain": ("explain --json", TypeAdapter(documents.Explain).json_schema),
    "gpus": ("gpus --json", TypeAdapter(list[Gpu]).json_schema),
}


def text(name: str) -> str:
    """The schema called ``name`` as JSON text, for draft 2020-12."""
    title, make = SCHEMAS[name]
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema"} | make() | {"title": f"cachebuilder: {title}"}
    return json.dumps(schema, indent=1, ensure_ascii=False) + "\n"
