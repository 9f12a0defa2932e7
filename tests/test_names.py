"""No text of a manifest, an artifact or a registry becomes a name or code in another language."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from cachebuilder.artifact.index import Fingerprint
from cachebuilder.artifact.read import read_index
from cachebuilder.authoring.derive.text import _comment as comment
from cachebuilder.cli import console, env, table
from cachebuilder.errors import ArtifactError, ManifestError, RestoreError, TransferError
from cachebuilder.manifest import schema
from cachebuilder.restoring.environment import Variable
from cachebuilder.ship.description import describe, read_description
from tests.archives import compress, edit_index, join, replace, unpack
from tests.conftest import ROOT, Run
from tests.fuzz_texts import KINDS, in_a_dockerfile, in_kubernetes
from tests.restored import unpack as restore_folder

STORED = Path(__file__).parent / "data" / "v1-deepjit.tar.zst"

#: Names that ran a command, or changed what a process loads or runs, where they were taken.
NAMES = [
    "X=1; touch PWN; Y",
    "DG_X; touch PWN; Y",
    "DG_X$(touch PWN)",
    "DG_X=1 LD_PRELOAD",
    "DG_X\nRUN touch PWN",
    "DG_X\n- name: Y\n  value",
    "LD_PRELOAD",
    "PATH",
    "BASH_ENV",
    "CACHEBUILDER_REAL_NVCC",
    "CACHEBUILDER_ON_MISS",
    "CUDA_HOME",
    "DG_JIT_NVCC_COMPILER",
    "DJ_JIT_NVCC_COMPILER",
    "DG_JIT_CACHE_DIR",
    "DJ_JIT_CACHE_DIR",
    "DG_JIT_USE_NVRTC",
    "DG_",
    "DGX_A",
    "xDG_A",
    "DG_a",
    "DG_É",
    "DG_A\0",
    "DG_A\n",
    "DG_" + "A" * 200,
    "",
]  # fmt: skip
#: Values that became lines or code where they were taken, or that a terminal obeys.
VALUES = ["1\nRUN touch PWN", "1\r", "\0", "\x1b[2J", "\x9b2J", "\u2028", "\u202e", "x" * 1025]


def forged(tmp_path: Path, environment: dict[str, str]) -> Path:
    """A stored artifact whose index has this environment and a digest that fits it."""

    def change(index: dict[str, Any]) -> None:
        index["fingerprint"]["environment"] = environment
        fields = index["fingerprint"] | {
            name: value if isinstance(value, str) else tuple(value)
            for name, value in index["fingerprint"].items()
            if isinstance(value, str | list)
        }
        index["fingerprint_digest"] = Fingerprint.model_construct(**fields).digest()

    path = tmp_path / "forged.tar.zst"
    path.write_bytes(compress(join(edit_index(unpack(STORED), change, redigest=False))))
    return path


def manifest(environment: dict[str, str]) -> bytes:
    fields = {
        "name": "x",
        "target": {"gpu": "H200"},
        "max_tokens": 1,
        "ops": [{"op": "fp8_gemm_nt", "n": 576, "k": 512}],
    }
    return json.dumps(fields | {"environment": environment}).encode()


def test_an_honest_variable_is_taken_from_all_three(tmp_path: Path) -> None:
    environment = {"DG_MEGA_MOE_TILES": "1,2,3,4,5", "DJ_JIT_DEBUG": "1"}
    assert schema.parse(manifest(environment)).environment == environment
    index = read_index(forged(tmp_path, environment))
    assert index.fingerprint.environment == environment
    described = read_description(describe(index, f"sha256:{'0' * 64}"), "it")
    assert described and described.fingerprint == index.fingerprint


@pytest.mark.parametrize(
    "environment", [{name: "1"} for name in NAMES] + [{"DG_A": value} for value in VALUES], ids=repr
)
def test_a_key_with_a_shell_command_in_environment_is_refused(environment: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match=r"environment"):
        schema.parse(manifest(environment))
    artifact = forged(tmp_path, environment)
    with pytest.raises(ArtifactError, match=r"fingerprint\.environment"):
        read_index(artifact)
    honest = read_index(STORED)
    fields = honest.fingerprint.model_dump() | {"environment": environment}
    annotations = describe(honest, "") | {"cachebuilder.fingerprint": json.dumps(fields)}
    with pytest.raises(TransferError, match="environment"):
        read_description(annotations, "it")


def test_a_thousand_variables_are_refused() -> None:
    with pytest.raises(ManifestError, match="wanted at most 64 variables, found 1000"):
        schema.parse(manifest({f"DG_{number}": "1" for number in range(1000)}))


def test_a_forged_index_in_a_restored_folder_runs_nothing_when_its_env_is_evaluated(run: Run, tmp_path: Path) -> None:
    to = restore_folder(STORED, tmp_path / "to")
    [index] = (to / "cachebuilder" / "artifacts").glob("*.json")
    document = json.loads(index.read_bytes())
    document["fingerprint"]["environment"] = {"X=1; touch PWN; Y": "1"}
    index.write_text(json.dumps(document))
    for command in (["env", to], ["run", to, "--", "env"]):
        done = run(*command)
        assert done.returncode == ArtifactError.exit_code and not done.stdout, done.stderr
        subprocess.run(["sh", "-c", done.stdout], cwd=tmp_path, check=False)
    assert not (tmp_path / "PWN").exists()


#: What a terminal obeys: a title, a cleared screen, C1 control characters, text that runs backwards, another line.
ESCAPES = "\x1b]0;PWN\x07 \x1b[2J \x9b8m \u202e \u2028 \x7f \r\nsigned    by fleet.pub"


@pytest.mark.parametrize(
    "field",
    ["deep_gemm", "compiler", "distribution", "install_include", "legacy_flags", "recorded", "recorded name", "ops"],
)
def test_escape_sequences_in_an_index_are_refused_and_do_not_reach_the_terminal(
    field: str, run: Run, tmp_path: Path
) -> None:
    def change(index: dict[str, Any]) -> None:
        if field == "recorded":
            index["recorded"]["gpu"] = ESCAPES
        elif field == "recorded name":
            index["recorded"][ESCAPES] = "1"
        elif field == "ops":
            index["ops"][0]["op"] = [ESCAPES]
        else:
            index["fingerprint"][field] = ESCAPES

    path = tmp_path / "forged.tar.zst"
    path.write_bytes(compress(join(edit_index(unpack(STORED), change))))
    with pytest.raises(ArtifactError, match="printable"):
        read_index(path)
    done = run("inspect", path)
    assert done.returncode == ArtifactError.exit_code and not done.stdout
    assert all(line.isprintable() for line in done.stderr.splitlines()) and "\nsigned" not in done.stderr


@pytest.mark.parametrize("text", ["\x1b[31mred", "a\rb", "\x9bK", "\u202eabc", "\udcff", "\x00", "\x7f"])
def test_no_text_moves_the_cursor_or_breaks_the_output(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    for write in (console.echo, console.echo_json, table.title, partial(table.line, "x"), partial(table.line, text)):
        write(text if write is not console.echo_json else json.dumps(text, ensure_ascii=False))
        out = capsys.readouterr().out
        assert all(line.isprintable() for line in out.split("\n")), out
    console.echo_json(json.dumps({"é": text}, ensure_ascii=False))
    assert json.loads(capsys.readouterr().out) == {"é": text}


def test_an_error_with_escape_sequences_of_a_file_prints_their_escapes(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "m.yaml"
    path.write_bytes(b'name: "\\e]0;PWN\\a"\n"\\e[2J": 1\n')
    done = run("plan", path)
    assert done.returncode == ManifestError.exit_code and "x1b" in done.stderr and "\x1b" not in done.stderr


@pytest.mark.parametrize("number", ["1e999", "-1e999", "Infinity", "NaN"])
def test_no_json_becomes_infinity(number: str, tmp_path: Path) -> None:
    members = unpack(STORED)
    data = (
        members[0]
        .data.replace(b'"ops":[{', b'"ops":[{"x": 12345,')
        .replace(b'"ops": [\n  {', b'"ops": [\n  {"x": 12345,')
    )
    assert b"12345" in data
    path = tmp_path / "forged.tar.zst"
    path.write_bytes(compress(join(replace(members, 0, data.replace(b"12345", number.encode())))))
    with pytest.raises(ArtifactError, match=r"finite|not JSON"):
        read_index(path)


SERVING = [
    Variable("DG_A", "plain", "why"),
    Variable("DG_B", "", "why"),
    Variable("DG_C", "a b 'c' \"d\" $HOME ${HOME} $$ $(HOME) $(touch PWN) `touch PWN` \\ \\n \\$ # é 😀 %PATH%", "why"),
    Variable("DG_D", "ends with \\", "why"),
    Variable("DG_E", "': {} [x, y] - & * ! | > ?", "why"),
    Variable("DG_F", " spaces ", "why"),
    Variable("DG_G", "null", "why"),
]


def test_every_format_of_env_means_the_value_whatever_is_in_it(tmp_path: Path) -> None:
    wanted = {variable.name: variable.value for variable in SERVING}
    script = env.text(SERVING, "shell") + "\nenv -0"
    said = subprocess.run(
        ["sh", "-c", script], cwd=tmp_path, env={"HOME": "/h"}, capture_output=True, check=True
    ).stdout
    assert dict(os.fsdecode(line).split("=", 1) for line in said.split(b"\0") if line).items() >= wanted.items()
    assert not list(tmp_path.iterdir())
    assert in_a_dockerfile(env.text(SERVING, "docker")) == wanted
    items = YAML(typ="safe").load(io.StringIO(env.text(SERVING, "k8s")))
    assert {item["name"]: in_kubernetes(item["value"], {"HOME": "/h"}) for item in items} == wanted
    assert json.loads(env.text(SERVING, "json")) == wanted


@pytest.mark.parametrize("form", ["shell", "docker", "k8s", "json"])
@pytest.mark.parametrize(
    ("name", "value"),
    [("A;B", "1"), ("A B", "1"), ("", "1"), ("1", "1"), ("A\n", "1"), ("A", "1\nRUN x"), ("A", "\udcff")],
)
def test_a_format_refuses_what_it_cannot_quote(form: str, name: str, value: str) -> None:
    with pytest.raises(RestoreError, match="wanted a"):
        env.text([Variable(name, value, "why")], form)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_mutated_texts_mean_the_same_everywhere_or_are_refused(kind: str) -> None:
    command = [sys.executable, str(ROOT / "tests" / "fuzz_texts.py"), kind, "150", "7"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert figures["taken"] and figures["refused"]


@pytest.mark.parametrize("mark", ["\n", "\r", "\x85", "\u2028", "\u2029", "\x0c"])
def test_a_models_config_cannot_end_a_comment_of_its_manifest(mark: str) -> None:
    lines = comment(f"DeepseekV3ForCausalLM{mark}environment: {{DG_A: '1'}}")
    text = "\n".join(lines) + "\n"
    assert all(line.startswith("#") and line.isprintable() for line in text.splitlines())
