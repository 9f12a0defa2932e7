"""A fleet: one file for many models, GPUs and engines, one store between all builders."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from cachebuilder import building
from cachebuilder.authoring.derive.manifest import Deployment
from cachebuilder.compiling.compiler import CompileOptions
from cachebuilder.errors import InstallationError, ManifestError
from cachebuilder.fleet import schema, shards
from cachebuilder.fleet.cells import expand
from cachebuilder.fleet.shards import Shard
from cachebuilder.manifest.inputs import load_manifest
from cachebuilder.ship.shared import open_store
from tests.conftest import LEGACY, ROOT, BuildSmall, Run, one_at_a_time
from tests.registries import Registry
from tests.test_signature import keys

__all__ = ["keys"]

#: The fleets here name the DeepGEMM of each engine.
GENERATIONS = ("deepjit",)

#: One kernel for each number of SMs, and one for all.
MANIFEST = "name: small-{gpu}\ntarget: {{gpu: {gpu}}}\nmax_tokens: 16\nops: [{{op: fp8_gemm_nt, n: 576, k: 512}}]\n"
FLEET = """\
name: first
store: store
models:
  small: {{manifest: "small-{{gpu}}.yaml"}}
gpus: [H100, H200, H20]
engines:
  new: {{engine: sglang}}
  old: {{engine: vllm, deep_gemm: {legacy}}}
"""
GPUS = ("H100-SXM", "H200", "H20")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a fleet of six cells, of which two pairs are equal."""
    for gpu in GPUS:
        (tmp_path / f"small-{gpu}.yaml").write_text(MANIFEST.format(gpu=gpu))
    (tmp_path / "fleet.yaml").write_text(FLEET.format(legacy=LEGACY))
    return tmp_path


def edited(folder: Path, old: str, new: str) -> Path:
    path = folder / "fleet.yaml"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    return path


def statuses(run: Run, path: Path) -> dict[str, Any]:
    done = run("fleet", "status", path, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)  # type: ignore[no-any-return]


# The file


@pytest.mark.parametrize(
    ("old", "new", "line", "words"),
    [
        ("name: first", "name: a b", 1, "name: wanted"),
        ("store: store", "stor: store", 2, "stor: unknown field; did you mean store"),
        ("gpus: [H100", "gpus: [H101", 1, "wanted one of .* found 'H101'; did you mean H100"),
        ("{engine: sglang}", "{engine: sglang, pyton: x}", 7, r"engines.new.pyton: unknown field; did you mean python\?"),
        ("{engine: sglang}", "{engine: trt}", 7, "engines.new.engine: wanted 'vllm' or 'sglang', found 'trt'"),
        ("{engine: sglang}", "{engine: sglang, python: p, image: i}", 7, "wanted one of python, lock and image"),
        ('{manifest: "small-{gpu}.yaml"}', "{}", 4, "models.small: wanted either config or manifest"),
        ('{manifest: "small-{gpu}.yaml"}', "{config: x}", 1, "serving: missing"),
        ("gpus:", "exclude: [{model: smal}]\ngpus:", 1, r"exclude\[0\].model: wanted one of small, found 'smal'"),
        ("gpus:", "models: {}\ngpus:", 5, "duplicate key"),
    ],
)  # fmt: skip
def test_a_wrong_fleet_is_one_line_with_its_place(old: str, new: str, line: int, words: str, folder: Path) -> None:
    path = edited(folder, old, new)
    with pytest.raises(ManifestError, match=f"fleet.yaml:{line}: .*{words}"):
        schema.load(path)


def test_the_schema_of_a_fleet_takes_the_fleet(run: Run, folder: Path) -> None:
    import jsonschema

    done = run("schema", "fleet")
    assert done.returncode == 0, done.stderr
    jsonschema.validate(YAML(typ="safe").load(folder / "fleet.yaml"), json.loads(done.stdout))


# Cells


def names(folder: Path) -> list[str]:
    return [cell.name for cell in expand(schema.load(folder / "fleet.yaml"), folder)]


def test_a_cell_is_every_combination(folder: Path) -> None:
    assert names(folder) == [f"small-{gpu}-{engine}" for engine in ("new", "old") for gpu in GPUS]


def test_exclude_takes_cells_away_and_include_brings_one_back(folder: Path) -> None:
    edited(folder, "gpus:", "exclude: [{engine: old}]\ninclude: [{model: small, gpu: H20, engine: old}]\ngpus:")
    assert names(folder) == [*(f"small-{gpu}-new" for gpu in GPUS), "small-H20-old"]


def test_a_manifest_without_placeholders_is_one_cell_for_each_engine(folder: Path) -> None:
    edited(folder, "small-{gpu}.yaml", "small-H20.yaml")
    assert names(folder) == ["small-H20-new", "small-H20-old"]


def test_a_cell_that_cannot_be_built_stops_the_build_with_the_line_that_excludes_it(folder: Path, run: Run) -> None:
    (folder / "small-H20.yaml").unlink()
    done = run("fleet", "build", folder / "fleet.yaml")
    assert done.returncode == 3, done.stderr
    assert "2 cells cannot be built" in done.stderr and "small-H20.yaml: cannot be read" in done.stderr
    assert "exclude: {model: small, gpu: H20, engine: new}" in done.stderr
    refused = [cell for cell in statuses(run, folder / "fleet.yaml")["cells"] if cell["state"] == "refused"]
    assert [cell["name"] for cell in refused] == ["small-H20-new", "small-H20-old"]


def test_a_manifest_for_another_gpu_than_the_cells_is_refused(folder: Path) -> None:
    shutil.copy(folder / "small-H200.yaml", folder / "small-H20.yaml")
    cell = next(cell for cell in expand(schema.load(folder / "fleet.yaml"), folder) if cell.gpu == "H20")
    assert cell.refusal is not None and "wanted a manifest for H20, found H200" in cell.refusal


def test_a_model_with_a_config_is_derived_for_each_serving(folder: Path) -> None:
    config = {
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "hidden_size": 2048, "num_hidden_layers": 2,
        "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "intermediate_size": 6144,
        "moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8, "decoder_sparse_step": 1,
        "mlp_only_layers": [], "vocab_size": 151936, "max_position_embeddings": 40960,
        "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    edited(folder, '{manifest: "small-{gpu}.yaml"}', "{config: .}")
    edited(folder, "gpus:", "serving: {one: {tp: 1}, two: {tp: 2, ep: 2}, eight: {tp: 8}}\ngpus:")
    cells = {cell.name: cell for cell in expand(schema.load(folder / "fleet.yaml"), folder)}
    assert len(cells) == 18
    assert (
        cells["small-two-H20-new"].manifest is not None
        and cells["small-two-H20-new"].text != cells["small-one-H20-new"].text
    )
    assert "multiple of 128" in str(cells["small-eight-H20-new"].refusal)


def test_a_serving_has_every_option_of_a_deployment() -> None:
    given_by_the_cell = {"engine", "engine_version", "gpu"}
    assert set(schema.Serving.model_fields) == {field.name for field in fields(Deployment)} - given_by_the_cell


# Shards


@pytest.mark.parametrize(
    ("text", "environment", "wanted"),
    [
        ("3/16", {}, Shard(3, 16)),
        ("auto/4", {"JOB_COMPLETION_INDEX": "0"}, Shard(1, 4)),
        ("auto", {"SLURM_ARRAY_TASK_ID": "12", "SLURM_ARRAY_TASK_MIN": "10", "SLURM_ARRAY_TASK_STEP": "2", "SLURM_ARRAY_TASK_COUNT": "5"}, Shard(2, 5)),
        ("auto", {"CI_NODE_INDEX": "3", "CI_NODE_TOTAL": "3"}, Shard(3, 3)),
    ],
)  # fmt: skip
def test_a_shard_is_named_or_taken_from_the_scheduler(text: str, environment: dict[str, str], wanted: Shard) -> None:
    assert shards.parse(text, environment) == wanted


@pytest.mark.parametrize("text", ["", "3", "0/4", "5/4", "1/0", "auto", "auto/4", "x/4", "1/2/3"])
def test_another_text_is_no_shard(text: str) -> None:
    with pytest.raises(ValueError, match="wanted"):
        shards.parse(text, {})


def test_each_work_is_first_for_one_shard_and_a_lost_shards_work_falls_to_all_others() -> None:
    work = [f"unit {number}" for number in range(2000)]
    first = Counter(index for name in work for index in range(1, 5) if Shard(index, 4).place(name) == 0)
    assert sum(first.values()) == 2000 and all(430 < count < 570 for count in first.values())
    lost = [name for name in work if Shard(2, 4).place(name) == 0]
    heirs = Counter(index for name in lost for index in (1, 3, 4) if Shard(index, 4).place(name) == 1)
    assert sum(heirs.values()) == len(lost) and all(count > 100 for count in heirs.values())
    assert [Shard(1, 4).place(name) for name in work[:20]] == [Shard(1, 4).place(name) for name in work[:20]]


# The whole way


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, shared_folder: Path, build_small: BuildSmall) -> dict[str, str]:
    """The sha256 of each cell's artifact when it is built by itself."""
    output = tmp_path_factory.mktemp("alone")
    digests = {}
    for engine, deep_gemm in (("new", None), ("old", LEGACY)):
        build_small(deep_gemm)  # it has the kernels for 132 SMs
        for gpu in GPUS:
            manifest = output / f"small-{gpu}.yaml"
            manifest.write_text(MANIFEST.format(gpu=gpu))
            inputs = load_manifest(manifest, deep_gemm=deep_gemm)
            with one_at_a_time(shared_folder, "alone"):
                built = building.build(inputs, output / "a.tar.zst", options=CompileOptions(check_code=0))
            digests[f"small-{gpu}-{engine}"] = built.packed.sha256
    return digests


def packed(run: Run, folder: Path) -> dict[str, str]:
    done = run("fleet", "pack", folder / "fleet.yaml", "-o", folder / "dist")
    assert done.returncode == 0, done.stderr
    return {path.name.removesuffix(".tar.zst"): sha256(path) for path in folder.rglob("*.tar.zst")}


@pytest.mark.slow
def test_a_fleets_artifacts_have_the_bytes_of_builds_alone(folder: Path, run: Run, alone: dict[str, str]) -> None:
    path = folder / "fleet.yaml"
    done = run("fleet", "pack", path)
    assert done.returncode == 6 and "fleet build makes them" in done.stderr, done.stderr
    done = run("fleet", "build", path)
    assert done.returncode == 0 and "planned   4 cells" in done.stdout, done.stderr
    now = statuses(run, path)
    assert {cell["state"] for cell in now["cells"]} == {"built"} and now["stored"] == now["distinct"] < now["kernels"]
    equal = {cell["name"]: cell["equal_to"] for cell in now["cells"] if cell["equal_to"]}
    assert equal == {f"small-H200-{engine}": f"small-H100-SXM-{engine}" for engine in ("new", "old")}
    artifacts = packed(run, folder)
    assert len(artifacts) == 4 and artifacts == {name: alone[name] for name in artifacts}


@pytest.mark.slow
def test_a_merged_cells_own_build_has_the_same_kernels_and_fingerprint(folder: Path, alone: dict[str, str]) -> None:
    plans = []
    for gpu in ("H100-SXM", "H200"):
        plans.append(building.plan(load_manifest(folder / f"small-{gpu}.yaml")))
    first, second = ([(k.entry, k.source, k.flags, k.selected_by) for k in plan.kernels] for plan in plans)
    assert first == second and plans[0].sm_counts == plans[1].sm_counts and plans[0].arch == plans[1].arch


@pytest.mark.slow
def test_a_build_that_was_done_has_nothing_left_and_its_page_says_so(
    folder: Path, run: Run, alone: dict[str, str]
) -> None:
    path = folder / "fleet.yaml"
    assert run("fleet", "build", path).returncode == 0
    open_store(str(folder / "store")).replace("records/first/of-another-release", b'{"schema_version": 9}')
    before = open_store(str(folder / "store")).names("records")
    done = run("fleet", "build", path)
    assert "planned   0 cells" in done.stdout and "compiled  0 kernels" in done.stdout
    assert open_store(str(folder / "store")).names("records") == before
    done = run("fleet", "status", path, "--html", folder / "page.html", "--price", "0.04")
    page = (folder / "page.html").read_text()
    assert "left      0 plans, 0 kernels" in done.stdout and "small-H20-old" in page and "<script" not in page


@pytest.mark.slow
def test_kernels_that_are_compiled_again_and_differ_name_the_builders(
    folder: Path, run: Run, alone: dict[str, str]
) -> None:
    edited(folder, "gpus: [H100, H200, H20]", "gpus: [H20]")
    edited(folder, f"  old: {{engine: vllm, deep_gemm: {LEGACY}}}\n", "")
    path = folder / "fleet.yaml"
    assert run("fleet", "build", path, CACHEBUILDER_BUILDER="node-1").returncode == 0
    done = run("fleet", "build", path, "--again", "1", CACHEBUILDER_BUILDER="node-2")
    assert done.returncode == 0, done.stderr
    store = open_store(str(folder / "store"))
    victim = sorted(store.names("kernels"))[0]
    content = (folder / "store" / victim).read_bytes()
    data = content.partition(b"\n")[2][:-1] + b"?"
    header = json.loads(content.partition(b"\n")[0]) | {"sha256": hashlib.sha256(data).hexdigest()}
    (folder / "store" / victim).write_bytes(json.dumps(header).encode() + b"\n" + data)
    done = run("fleet", "build", path, "--again", "1", CACHEBUILDER_BUILDER="node-2")
    assert done.returncode == 17, done.stdout + done.stderr
    assert victim in done.stderr and "node-1 at" in done.stderr and "node-2 now" in done.stderr


@pytest.mark.slow
def test_shards_share_the_work_and_what_a_killed_one_leaves(folder: Path, run: Run, alone: dict[str, str]) -> None:
    command = [
        sys.executable,
        "-m",
        "cachebuilder",
        "fleet",
        "build",
        str(folder / "fleet.yaml"),
        "--patience",
        "5",
        "--shard",
    ]
    running = [subprocess.Popen([*command, f"{index}/3"], stdout=subprocess.DEVNULL) for index in (1, 2, 3)]
    for _ in range(600):  # the second is killed as soon as anything is in the store
        if any((folder / "store" / part).exists() for part in ("plans", "kernels")):
            break
        time.sleep(0.1)
    running[1].kill()
    assert [process.wait() for process in running] == [0, -signal.SIGKILL, 0]
    artifacts = packed(run, folder)
    assert len(artifacts) == 4 and artifacts == {name: alone[name] for name in artifacts}


@pytest.mark.slow
def test_a_job_that_fails_ends_each_shard_and_not_only_its_own(folder: Path, run: Run) -> None:
    """nvcc does not know the standard that one cell's manifest names: its kernels fail, in whatever shard they are."""
    text = (folder / "small-H20.yaml").read_text()
    (folder / "small-H20.yaml").write_text(text + "environment: {DG_JIT_CPP_STANDARD: '3'}\n")
    edited(folder, f"  old: {{engine: vllm, deep_gemm: {LEGACY}}}\n", "")
    for index in (1, 2):
        done = run("fleet", "build", folder / "fleet.yaml", "--patience", "1", "--shard", f"{index}/2")
        assert done.returncode == 7 and "jobs failed" in done.stderr and "c++3" in done.stderr, done.stderr


@pytest.mark.slow
def test_the_slurm_script_of_the_examples_builds_its_shard(folder: Path, alone: dict[str, str]) -> None:
    edited(folder, "gpus: [H100, H200, H20]", "gpus: [H20]")
    edited(folder, f"  old: {{engine: vllm, deep_gemm: {LEGACY}}}\n", "")
    variables = {
        "SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_TASK_MIN": "1", "SLURM_ARRAY_TASK_COUNT": "1", "USER": "fleet",
        "SLURM_TMPDIR": str(folder), "FLEET": str(folder / "fleet.yaml"),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }  # fmt: skip
    script = ["bash", str(ROOT / "examples/fleet/slurm.sh")]
    done = subprocess.run(script, env=os.environ | variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "planned   1 cell" in done.stdout, done.stderr


@pytest.mark.slow
def test_one_index_for_a_model_gives_each_gpu_its_artifact(
    folder: Path, run: Run, there: Registry, keys: Path, alone: dict[str, str]
) -> None:
    path = folder / "fleet.yaml"
    assert run("fleet", "build", path).returncode == 0
    destination = f"oci://{there.host}/fleet"
    done = run("fleet", "pack", path, "-o", folder / "dist", "--key", keys / "ours.pem", "--push", destination)
    assert done.returncode == 0, done.stderr
    assert f"pushed    {destination}/small:first" in done.stdout and done.stdout.count(", signed") == 4
    done = run(
        "pull",
        f"{destination}/small:first",
        "--deep-gemm",
        LEGACY,
        "-o",
        folder / "pulled.tar.zst",
        "--trust",
        keys / "ours.pub",
    )
    assert done.returncode == 0, done.stderr
    assert sha256(folder / "pulled.tar.zst") in {alone["small-H100-SXM-old"], alone["small-H20-old"]}


# Environments


def test_an_engine_that_is_an_image_is_built_in_it(folder: Path, run: Run) -> None:
    path = edited(folder, "{engine: sglang}", "{engine: sglang, image: registry.example/sglang}")
    done = run("fleet", "status", path)
    assert (
        done.returncode == 3
        and "found the image registry.example/sglang" in done.stderr
        and "--engine new" in done.stderr
    )
    assert run("fleet", "status", path, "--engine", "new").returncode == 0


def test_an_environment_that_is_not_there_or_lacks_a_package_is_one_sentence(folder: Path, run: Run) -> None:
    path = edited(folder, "{engine: sglang}", "{engine: sglang, python: none/bin/python}")
    done = run("fleet", "status", path)
    assert done.returncode == 4 and "engines.new.python: wanted an interpreter, found no" in done.stderr, done.stderr
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "none"], check=True)
    done = run("fleet", "status", path)
    assert (
        done.returncode == 4 and "ModuleNotFoundError" in done.stderr and "cachebuilder[observe,ship]" in done.stderr
    ), done.stderr


@pytest.mark.slow
def test_ctrl_c_ends_the_workers_and_their_compilers(folder: Path, alone: dict[str, str]) -> None:
    command = [sys.executable, "-m", "cachebuilder", "fleet", "build", str(folder / "fleet.yaml")]
    environment = os.environ | {"CACHEBUILDER_CACHE_DIR": str(folder / "empty"), "CACHEBUILDER_BUILDER": folder.name}
    driver = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, start_new_session=True)
    for _ in range(1200):
        if any((folder / "store" / part).exists() for part in ("plans", "kernels")) or driver.poll() is not None:
            break
        time.sleep(0.1)
    os.killpg(driver.pid, signal.SIGINT)  # as a terminal does
    assert driver.wait() == 130
    marked = f"CACHEBUILDER_BUILDER={folder.name}".encode()
    for _ in range(100):
        left = [path for path in Path("/proc").glob("[0-9]*/environ") if marked in _read(path)]
        if not left:
            return
        time.sleep(0.1)
    raise AssertionError([path.with_name("cmdline").read_bytes() for path in left])


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:  # another user's, or ended
        return b""


def test_a_job_that_a_worker_cannot_finish_says_how_it_ended(tmp_path: Path) -> None:
    from cachebuilder.fleet.process import Worker
    from cachebuilder.fleet.protocol import ProbeJob, Tools

    dying = tmp_path / "python"
    dying.write_text("#!/bin/sh\necho out of luck >&2\nexit 9\n")
    dying.chmod(0o755)
    with pytest.raises(InstallationError, match="the worker ended with 9:\nout of luck"):
        Worker(str(dying)).do(ProbeJob(tools=Tools(), manifests=()))
    dying.write_text("#!/bin/sh\nkill -9 $$\n")
    with pytest.raises(InstallationError, match="signal 9 ended the worker; this happened 3 times") as caught:
        Worker(str(dying)).do(ProbeJob(tools=Tools(), manifests=()))
    assert "memory" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--address", "auto"], "--address goes with --on ray"),
        (["--on", "ray", "--shard", "1/2"], "found both"),
        (["--engine", "none"], "wanted one of new, old, found none"),
        (["--shard", "3/2"], "wanted a shard from 1 to 2"),
        (["--shard", "auto"], "found none of them"),
    ],
)
def test_a_wrong_command_line_says_what_was_wanted(arguments: list[str], words: str, folder: Path, run: Run) -> None:
    done = run("fleet", "build", folder / "fleet.yaml", *arguments)
    assert done.returncode == 2 and words in done.stderr, done.stderr
