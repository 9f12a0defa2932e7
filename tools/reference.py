"""Write the site's reference pages from the code, when the site is built (a hook of MkDocs)."""

from __future__ import annotations

import inspect
import re
import tempfile
import textwrap
from importlib import import_module
from pathlib import Path
from typing import Any

import click
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from pydantic import BaseModel

from cachebuilder.artifact import index
from cachebuilder.cli.main import VERBS, cli
from cachebuilder.cli.variables import OWN_VARIABLES
from cachebuilder.cuda.gpus import GPUS, Gpu
from cachebuilder.deepgemm import environment as deepgemm
from cachebuilder.deepgemm.entries import CUBIN, MAX_BYTES, SOURCE
from cachebuilder.errors import EXIT_CODES, CacheBuilderError
from cachebuilder.flashinfer.schema import FlashInferNeeds, Gemm
from cachebuilder.manifest.reader import MAX_NODES
from cachebuilder.manifest.schema import Manifest, Source, Target, Toolchain
from cachebuilder.ops.catalog import OPS
from cachebuilder.planning.selection import Range, Selection
from cachebuilder.restoring import environment as serving
from cachebuilder.restoring import place

ROOT = Path(__file__).parents[1]
#: Files of the repository's root that are also pages of the site.
BESIDE = {"changes.md": "CHANGELOG.md", "contributing.md": "CONTRIBUTING.md"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """MkDocs's hook: add the pages."""
    for name, page in PAGES.items():
        files.append(File.generated(config, f"reference/{name}.md", content=page()))
    for name, path in BESIDE.items():
        text = (ROOT / path).read_text()
        # Links in these files start at the root; links on the site start in docs/.
        files.append(File.generated(config, name, content=text.replace("](docs/", "](")))
    return files


def command_line() -> str:
    """Every verb with its arguments and options, from click."""
    parts = [
        "# Command line\n",
        "`cachebuilder VERB --help` prints the same. Results go to standard output, progress and remarks to standard "
        "error. [Exit codes](exit-codes.md) distinguish failures.\n",
    ]
    for verb in VERBS:
        command = getattr(import_module(f"cachebuilder.cli.{verb.replace('-', '_')}"), verb.replace("-", "_"))
        parts += _command(command, verb, "##")
        if isinstance(command, click.Group):
            for name, child in command.commands.items():
                parts += _command(child, f"{verb} {name}", "###")
    parts += [
        f"## Options of cachebuilder itself\n\n```text\n{cli.get_help(click.Context(cli, info_name='cachebuilder'))}\n```\n"
    ]
    return "\n".join(parts)


def _command(command: click.Command, name: str, heading: str) -> list[str]:
    context = click.Context(command, info_name=f"cachebuilder {name}", parent=None)
    usage = " ".join(command.collect_usage_pieces(context))
    rows = [
        (f"`{', '.join(p.opts + p.secondary_opts)}`{_value(p, context)}", (p.help or "") + _default(p))
        for p in command.get_params(context)
        if isinstance(p, click.Option) and "--help" not in p.opts
    ]
    text = [f"{heading} {name}\n", f"```text\ncachebuilder {name} {usage}\n```\n", _paragraphs(command.help or "")]
    return [*text, _table(("option", ""), rows)] if rows else text


def _value(option: click.Option, context: click.Context) -> str:
    if option.is_flag:
        return ""
    if isinstance(option.type, click.Choice):
        return " " + " \\| ".join(map(str, option.type.choices))
    return f" {option.make_metavar(context)}"


def _default(option: click.Option) -> str:
    shown = option.show_default and option.default is not None and not option.is_flag
    return f" Default: {option.default}." if shown else ""


def manifest() -> str:
    """Every field of the manifest, from its pydantic models."""
    parts = [
        "# Manifest\n",
        "A manifest is YAML of at most 4 MiB, and is read strictly: an unknown field, a duplicate key or a value of "
        "another type is an error with file and line. Anchors, aliases, tags and merge keys are refused, as are more "
        f"than {MAX_NODES:,} values, lists and mappings. A small one:\n",
        '```yaml\n--8<-- "manifests/quickstart.yaml"\n```\n',
        "## The manifest\n",
        _model(Manifest),
        "## target\n",
        _model(Target),
        "`gpu` is one of these names, or a mapping of the fields below:\n",
        _table(
            ("name", "capability", "SMs", "L2, MiB", "shared memory, KiB", "MHz", "from"),
            [
                (g.name, g.capability, g.sm_count, f"{g.l2_bytes / 2**20:g}", g.shared_memory_bytes // 1024,
                 g.clock_khz // 1000, g.source)
                for g in GPUS.values()
            ],
        ),
        _model(Gpu),
        "## flashinfer\n",
        _model(FlashInferNeeds),
        "### gemms\n",
        _model(Gemm),
        "## toolchain\n",
        _model(Toolchain),
        "## sources\n",
        _model(Source),
        "## ops\n",
        "One mapping for each op. [Entry points](../entry-points.md) says which ops exist on which GPU and in which "
        "DeepGEMM. N, K and experts are those of one rank.\n",
    ]  # fmt: skip
    for name, model in OPS.items():
        parts += [f"### {name}\n", _paragraphs(inspect.getdoc(model) or ""), _model(model, skip=("op",))]
    return "\n".join(parts)


def _model(model: type[BaseModel], skip: tuple[str, ...] = ()) -> str:
    schema = model.model_json_schema()
    rows = []
    for name, field in schema["properties"].items():
        if name in skip:
            continue
        required = "required" if name in schema.get("required", ()) else _json(field.get("default"))
        rows.append((f"`{name}`", _type(field, schema.get("$defs", {})), required, field.get("description", "")))
    return _table(("field", "wants", "default", ""), rows)


def _type(field: dict[str, Any], definitions: dict[str, Any]) -> str:
    """What a JSON schema allows, in a few words."""
    if "$ref" in field:
        name = field["$ref"].rpartition("/")[2]
        defined = definitions[name]
        return _type(defined, definitions) if "enum" in defined else f"a mapping ({name.lower()})"
    if "const" in field or "enum" in field:
        return " \\| ".join(f"`{_json(value)}`" for value in field.get("enum", [field.get("const")]))
    if several := field.get("anyOf") or field.get("oneOf"):
        texts = [_type(item, definitions) for item in several if item.get("type") != "null"]
        return " or ".join(dict.fromkeys(texts)) if len(texts) < 6 else "an op, by its `op`"
    kind = field.get("type")
    if kind == "array":
        if "prefixItems" in field:
            return f"a list of {len(field['prefixItems'])}: {_type(field['prefixItems'][0], definitions)}"
        return f"a list: {_type(field.get('items', {}), definitions)}"
    if kind == "object":
        return "a mapping of text" if field.get("additionalProperties") == {"type": "string"} else "a mapping"
    low, high = field.get("minimum", field.get("exclusiveMinimum")), field.get("maximum")
    bounds = f" {low} to {high}" if low is not None and high is not None else f" from {low}" if low is not None else ""
    pattern = f" that matches `{field['pattern']}`" if "pattern" in field else ""
    names = {"integer": "whole number", "string": "text", "boolean": "true or false", "number": "number"}
    return f"{names.get(str(kind), str(kind))}{bounds}{pattern}"


def _json(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if value is None:
        return "left out"
    return '""' if value == "" else "none" if value in ([], {}) else str(value)


def artifact() -> str:
    """The index's records, from their pydantic models."""
    parts = [
        "# Artifact\n",
        "`NAME.tar.zst` is one zstd frame with its content size and checksum; in it a ustar archive of regular files, in "
        "this order:\n",
        "| member | what it is |\n|---|---|\n"
        f"| `{index.INDEX}` | the index, below |\n"
        f"| `{index.MANIFEST}` | the manifest, byte for byte as it was given |\n"
        f"| `{index.CACHE}/ENTRY/FILE` | each kernel as DeepGEMM reads it: all entries' `kernel.cu`, then all `kernel.cubin`, "
        "and in the DeepJIT generation `meta.json` and `.committed` |\n"
        f"| `{index.FLASHINFER_MODULES}/NAME/NAME.so` | each of FlashInfer's modules, where the manifest asks for some |\n"
        f"| `{index.FLASHINFER_CACHE}/ENTRY/FILE` | each kernel of FlashInfer's GEMM: all `kernel.cu`, then all "
        "`nvcc_kernel.cubin` |\n",
        f"Owner 0, mode 644, mtime `SOURCE_DATE_EPOCH` or 0. At most {index.MAX_ENTRIES:,} entries, "
        f"{MAX_BYTES[CUBIN] >> 20} MiB a cubin and {MAX_BYTES[SOURCE] >> 10} KiB a source. `verify --device cuda` writes what it "
        f"saw beside the artifact, under its name and `{index.REPORT_SUFFIX}`. What a change of the schema means: "
        "[versions](../versions.md).\n",
        "`cachebuilder inspect ARTIFACT --json` prints the index.\n",
    ]
    flashinfer = (index.FlashInferPart, index.FlashInferFingerprint)
    for record in (index.Index, index.Fingerprint, index.Entry, index.File, Selection, Range, *flashinfer):
        text, described = _attributes(inspect.getdoc(record) or "")
        schema = record.model_json_schema()
        rows = [
            (f"`{name}`", _type(field, schema.get("$defs", {})), described.get(name, ""))
            for name, field in schema["properties"].items()
        ]
        parts += [f"## {record.__name__}\n", text + "\n", _table(("field", "type", ""), rows)]
    return "\n".join(parts)


def _attributes(doc: str) -> tuple[str, dict[str, str]]:
    """A docstring's first part, and what its section Attributes says of each."""
    text, _, rest = doc.partition("Attributes:")
    items = re.split(r"^ {4}(?=\w+: )", rest, flags=re.MULTILINE)[1:]
    return text.strip(), {name: " ".join(said.split()) for name, said in (i.split(": ", 1) for i in items)}


def exit_codes() -> str:
    """Exit codes with the exception behind each."""
    kinds = {kind.exit_code: kind for kind in CacheBuilderError.__subclasses__()}
    rows = [(code, means, inspect.getdoc(kinds[code]) if code in kinds else "") for code, means in EXIT_CODES.items()]
    return (
        "# Exit codes\n\nEvery expected failure is one message on standard error. It says what was wanted and what was "
        "found, and has a `hint:` if there is a next step. A traceback is a bug: report it with the output of "
        "`cachebuilder doctor`.\n\n" + _table(("code", "means", "more"), rows)
    )


def environment() -> str:
    """Variables: cachebuilder's own, those that serving sets, those that change keys."""
    rows = [(f"`{name}`", means) for name, means in OWN_VARIABLES.items()]
    parts = ["# Environment variables\n", "## That cachebuilder reads\n", _table(("variable", ""), rows)]
    parts += [
        "## That the serving process needs\n",
        "`cachebuilder env DIR --engine …` prints them. These are for `/opt/deep_gemm`, the DeepJIT generation and SM90.\n",
    ]
    for engine in serving.ENGINES:
        indexes = [_an_index()]
        here = place.usual(Path("/opt/deep_gemm"), indexes, None)
        found = serving.variables(here, indexes, engine, {"CUDA_HOME": tempfile.gettempdir()})
        parts += [
            f"### engine: {engine}\n",
            _table(("variable", "value", "why"), [(f"`{v.name}`", f"`{v.value}`", v.why) for v in found]),
        ]
    parts += [
        "## That change DeepGEMM's keys\n",
        "A cache is for one setting of these variables: give them in the manifest's `environment`, or leave them unset. "
        "Any other `DG_…` variable (for DeepJIT also `DJ_…`) counts as one that changes kernels, unless it only says "
        "where to look, what to print or what to dump.\n",
        _table(
            ("generation", "variables"),
            [
                (generation, ", ".join(f"`{deepgemm.PREFIXES[generation][0]}_{name}`" for name in names))
                for generation, names in deepgemm.FLAGS.items()
            ],
        ),
    ]
    return "\n".join(parts)


def _an_index() -> index.Index:
    fingerprint = index.Fingerprint.model_construct(generation="deepjit", arch="sm_90a", environment={})
    return index.Index.model_construct(name="", fingerprint=fingerprint)


def _paragraphs(text: str) -> str:
    return textwrap.dedent(inspect.cleandoc(text)).replace("\b\n", "") + "\n"


def _table(heads: tuple[str, ...], rows: list[tuple[object, ...]]) -> str:
    lines = [heads, ("---",) * len(heads), *rows]
    return "\n".join("| " + " | ".join(" ".join(str(cell).split()) for cell in line) + " |" for line in lines) + "\n"


PAGES = {
    "cli": command_line,
    "manifest": manifest,
    "artifact": artifact,
    "exit-codes": exit_codes,
    "environment": environment,
}
