from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import click
import pytest
from ruamel.yaml import YAML

from cachebuilder.cli import cli
from tests.conftest import ROOT, Run

EXAMPLES = ROOT / "examples"
DOCKERFILES = sorted(EXAMPLES.glob("Dockerfile.*"))
TEXTS = [*DOCKERFILES, EXAMPLES / "kubernetes.yaml"]


def commands(text: str) -> list[list[str]]:
    """Every command line of cachebuilder in ``text``: in a RUN, a script, a comment or an indented block."""
    lines = re.findall(r"(?:^ +|^RUN |&& |[:] )cachebuilder ([a-z]+ [^&|`,;\n]+)", text, re.MULTILINE)
    return [shlex.split(line) for line in lines]


def pod() -> dict[str, Any]:
    loaded: dict[str, Any] = YAML(typ="safe").load((EXAMPLES / "kubernetes.yaml").read_text())
    return loaded


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.name)
def test_every_command_is_one_that_cachebuilder_takes(path: Path) -> None:
    found = commands(path.read_text())
    assert {"verify"} <= {verb for verb, *_ in found}
    for verb, *arguments in found:
        command = cli.get_command(click.Context(cli), verb)
        assert command is not None, f"no verb {verb}"
        command.make_parser(click.Context(command)).parse_args(arguments)  # raises on an unknown option


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_a_dockerfile_restores_verifies_and_then_sets_the_environment(path: Path) -> None:
    lines = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
    instructions = [line.split(" ", 1)[0] for line in lines]
    assert set(instructions) == {"ARG", "FROM", "COPY", "RUN", "ENV"}
    runs = [line for line in lines if "cachebuilder restore" in line or "cachebuilder verify" in line]
    assert ["restore" in line for line in runs] == [True, False]
    assert lines.index(runs[-1]) < instructions.index("ENV")
    copied = next(line for line in lines if line.startswith("COPY ${ARTIFACT}")).split()[-1]
    assert f"cachebuilder restore {copied} --to /opt/deep_gemm" in runs[0]


def test_the_init_container_restores_into_the_folder_that_the_server_reads() -> None:
    [init], [server] = pod()["spec"]["initContainers"], pod()["spec"]["containers"]
    assert init["image"] == server["image"]
    verbs = [verb for verb, *_ in commands(init["args"][0].replace("cachebuilder", " cachebuilder"))]
    assert verbs == ["restore", "verify"]
    mounts = {mount["name"]: mount["mountPath"] for mount in server["volumeMounts"]}
    environment = {item["name"]: item["value"] for item in server["env"]}
    assert environment["DG_JIT_CACHE_DIR"].endswith(f":{mounts['deep-gemm']}")
    assert f"--to {mounts['deep-gemm']}" in init["args"][0]
    names = {volume["name"] for volume in pod()["spec"]["volumes"]}
    assert {mount["name"] for mount in [*init["volumeMounts"], *server["volumeMounts"]]} == names


@pytest.mark.parametrize("engine", ["vllm", "sglang", "k8s"])
def test_the_environment_is_the_one_that_env_prints(engine: str, small: Path, run: Run, tmp_path: Path) -> None:
    (tmp_path / "cuda").mkdir()
    artifact, folder = tmp_path / "small.tar.zst", tmp_path / "restored"
    assert run("build", small, "-o", artifact).returncode == 0
    assert run("restore", artifact, "--to", folder).returncode == 0
    form, name = ("k8s", "vllm") if engine == "k8s" else ("docker", engine)
    done = run("env", folder, "--engine", name, "--format", form, CUDA_HOME=str(tmp_path / "cuda"))
    assert done.returncode == 0, done.stderr
    place = "/deep-gemm" if engine == "k8s" else "/opt/deep_gemm"
    printed = [line for line in done.stdout.replace(str(folder), place).splitlines() if not line.startswith("#")]
    text = (EXAMPLES / ("kubernetes.yaml" if engine == "k8s" else f"Dockerfile.{engine}")).read_text()
    assert printed
    assert "\n".join(printed) in re.sub(r"^ {8}", "", text, flags=re.MULTILINE)
