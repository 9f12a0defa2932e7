from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import click
import kubernetes_validate
import pytest
from ruamel.yaml import YAML

from cachebuilder.cli.main import cli
from cachebuilder.fleet import schema
from tests.conftest import ROOT, Run

EXAMPLES = ROOT / "examples"
DOCKERFILES = sorted(EXAMPLES.glob("Dockerfile.*"))
PODS = sorted((EXAMPLES / "kubernetes").glob("*.yaml"))
TEXTS = [*DOCKERFILES, *PODS]


def commands(text: str) -> list[list[str]]:
    """Every command line of cachebuilder in ``text``: in a RUN, a script, a comment or an indented block."""
    lines = re.findall(r"(?:^ +|^RUN |&& |[:] )cachebuilder ([a-z]+ [^&|`,;\n]+)", text, re.MULTILINE)
    return [shlex.split(line) for line in lines]


def documents(name: str) -> list[dict[str, Any]]:
    return list(YAML(typ="safe").load_all((EXAMPLES / "kubernetes" / name).read_text()))


def pod(name: str) -> dict[str, Any]:
    return next(found for found in documents(name) if found["kind"] == "Pod")


def environment(container: dict[str, Any]) -> dict[str, str]:
    return {item["name"]: item["value"] for item in container["env"]}


def mounts(container: dict[str, Any]) -> dict[str, str]:
    return {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.name)
def test_every_command_is_one_that_cachebuilder_takes(path: Path) -> None:
    found = commands(path.read_text())
    assert {verb for verb, *_ in found} & {"verify", "env", "sync"}
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


@pytest.mark.parametrize("path", PODS, ids=lambda path: path.name)
def test_kubernetes_own_schema_takes_it_and_every_volume_is_there(path: Path) -> None:
    """The OpenAPI schema of Kubernetes 1.35, in its strict form: no field that it does not know."""
    for document in documents(path.name):
        kubernetes_validate.validate(document, "1.35", strict=True)
        spec = document["spec"].get("template", document)["spec"]
        containers = spec.get("initContainers", []) + spec["containers"]
        names = {volume["name"] for volume in spec["volumes"]}
        assert {mount["name"] for container in containers for mount in container["volumeMounts"]} == names


FLEET = EXAMPLES / "fleet"


@pytest.mark.parametrize("path", sorted(FLEET.glob("*")), ids=lambda path: path.name)
def test_a_fleets_recipe_has_commands_that_cachebuilder_takes(path: Path) -> None:
    lines = re.findall(r"cachebuilder fleet ([a-z]+ [^\n]+)", path.read_text())
    assert lines or path.name == "fleet.yaml"
    group = cli.get_command(click.Context(cli), "fleet")
    assert isinstance(group, click.Group)
    for verb, *arguments in map(shlex.split, lines):
        command = group.commands[verb]
        command.make_parser(click.Context(command)).parse_args(arguments)


def test_the_fleet_of_the_examples_is_one_and_its_job_is_one_that_kubernetes_takes() -> None:
    fleet = schema.load(FLEET / "fleet.yaml")
    assert {"vllm-0.25.0", "sglang-0.5.23"} == set(fleet.engines)
    for document in YAML(typ="safe").load_all((FLEET / "kubernetes-job.yaml").read_text()):
        kubernetes_validate.validate(document, "1.35", strict=True)
    ray = YAML(typ="safe").load(FLEET / "rayjob.yaml")
    for group in (ray["spec"]["rayClusterSpec"]["headGroupSpec"], *ray["spec"]["rayClusterSpec"]["workerGroupSpecs"]):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "ray"}, "spec": group["template"]["spec"]}
        kubernetes_validate.validate(pod, "1.35", strict=True)
        resources = json.loads(json.loads(group["rayStartParams"].get("resources", '"{}"')))
        assert set(resources) <= set(fleet.engines)


def test_the_schema_refuses_what_is_wrong() -> None:
    wrong = pod("image-volume.yaml")
    wrong["spec"]["volumes"][0]["image"]["referense"] = "x"
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, "1.35", strict=True)


def test_the_init_container_restores_into_the_folder_that_the_server_reads() -> None:
    [init], [server] = (
        pod("init-container.yaml")["spec"]["initContainers"],
        pod("init-container.yaml")["spec"]["containers"],
    )
    assert init["image"] == server["image"]
    verbs = [verb for verb, *_ in commands(init["args"][0].replace("cachebuilder", " cachebuilder"))]
    assert verbs == ["restore", "verify"]
    assert environment(server)["DG_JIT_CACHE_DIR"].endswith(f":{mounts(server)['deep-gemm']}")
    assert f"--to {mounts(server)['deep-gemm']}" in init["args"][0]
    assert environment(init)["CACHEBUILDER_TRUST"].startswith(mounts(init)["keys"])
    assert environment(init)["DOCKER_CONFIG"] == mounts(init)["registry"]


def test_the_image_volume_is_read_only_and_the_frozen_nvcc_is_copied_where_it_can_be_executed() -> None:
    [init], [server] = (
        pod("image-volume.yaml")["spec"]["initContainers"],
        pod("image-volume.yaml")["spec"]["containers"],
    )
    volume, writable = mounts(server)["deep-gemm"], mounts(server)["writable"]
    assert init["command"] == [
        "cp",
        "-r",
        f"{mounts(init)['deep-gemm']}/cachebuilder/bin",
        f"{mounts(init)['writable']}/",
    ]
    assert environment(server)["DG_JIT_NVCC_COMPILER"] == f"{writable}/bin/nvcc"
    scratch, root = environment(server)["DG_JIT_CACHE_DIR"].split(":")
    assert root == volume and scratch.startswith(f"{writable}/")


def test_the_server_reads_the_folder_that_the_daemon_set_keeps() -> None:
    daemon, server = documents("fleet.yaml")
    template = daemon["spec"]["template"]["spec"]
    of_sync, of_server = ({v["name"]: v for v in spec["volumes"]} for spec in (template, server["spec"]))
    assert of_sync["deep-gemm"]["hostPath"]["path"] == of_server["deep-gemm"]["hostPath"]["path"]
    assert template["nodeSelector"] == server["spec"]["nodeSelector"]
    assert template["containers"][0]["image"] == server["spec"]["containers"][0]["image"]


@pytest.fixture(scope="module")
def restored(small: Path, run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("examples")
    assert run("build", small, "-o", folder / "small.tar.zst").returncode == 0
    assert run("restore", folder / "small.tar.zst", "--to", folder / "restored").returncode == 0
    (folder / "cuda").mkdir()
    return folder / "restored"


@pytest.mark.parametrize("name", ["vllm", "sglang", "init-container", "image-volume"])
def test_the_environment_is_the_one_that_env_prints(name: str, restored: Path, run: Run) -> None:
    docker = name in ("vllm", "sglang")
    scratch = "/tmp/deep_gemm" if docker else "/writable/scratch" if name == "image-volume" else None
    more = ["--scratch", scratch] if scratch else []
    command = (
        "env",
        restored,
        "--engine",
        name if docker else "vllm",
        "--format",
        "docker" if docker else "k8s",
        *more,
    )
    done = run(*command, CUDA_HOME=str(restored.parent / "cuda"))
    assert done.returncode == 0, done.stderr
    place = "/opt/deep_gemm" if docker else "/deep-gemm"
    said = done.stdout.replace(str(restored), place)
    if name == "image-volume":
        said = said.replace("/deep-gemm/cachebuilder/bin/nvcc", "/writable/bin/nvcc")
    printed = [line for line in said.splitlines() if not line.startswith("#")]
    text = (EXAMPLES / (f"Dockerfile.{name}" if docker else f"kubernetes/{name}.yaml")).read_text()
    assert printed
    assert "\n".join(printed) in re.sub(r"^ {8}", "", text, flags=re.MULTILINE)
