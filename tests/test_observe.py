"""An engine is observed: what its processes ask DeepGEMM for becomes a manifest, and nothing is lost on the way."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from cachebuilder import building
from cachebuilder.artifact.read import read_index
from cachebuilder.authoring.observe import calls, engines, traffic
from cachebuilder.authoring.observe.command import Server
from cachebuilder.authoring.observe.manifest import About, bound, manifest_text
from cachebuilder.cuda import gpus
from cachebuilder.deepgemm import installation
from cachebuilder.errors import RecordingError
from cachebuilder.manifest.inputs import load_manifest
from cachebuilder.ops.catalog import OPS, OpBase
from tests import entry_points
from tests.conftest import LEGACY, ROOT, TARGET, BuildSmall, Run

ENGINE = Path(__file__).with_name("small_engine.py")

needs_headers = pytest.mark.skipif(
    not Path(sysconfig.get_path("include"), "Python.h").exists(), reason="Triton's launcher wants Python.h"
)


@pytest.fixture(scope="session")
def observed(run: Run, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """The small engine, observed: the manifest, and what the verb said."""
    manifest = tmp_path_factory.mktemp("observed") / "m.yaml"
    done = run("observe", "-o", manifest, "--gpu", TARGET, "--", sys.executable, ENGINE)
    assert done.returncode == 0, done.stderr
    return manifest, done


Observed = tuple[Path, subprocess.CompletedProcess[str]]


@pytest.mark.slow
@needs_headers
def test_every_call_of_every_process_becomes_an_op(observed: Observed) -> None:
    ops = load_manifest(observed[0]).manifest.ops
    seen = {(op.op, op.shape(), tuple(op.sm_counts or ())) for op in ops}
    assert seen == {
        ("fp8_gemm_nt", "n=576 k=512", ()),
        ("fp8_gemm_nt", "n=1024 k=512", (100,)),
        ("m_grouped_fp8_gemm_nt_contiguous", "experts=2 n=256 max_rows=256 k=512", ()),
    }


@pytest.mark.slow
@needs_headers
def test_a_function_without_an_op_is_named(observed: Observed) -> None:
    assert "no op     cublaslt_gemm_nt: no op: 1 call" in observed[1].stdout


@pytest.mark.slow
@needs_headers
def test_the_plan_of_an_observed_manifest_holds_what_the_engine_asked_for(observed: Observed) -> None:
    said = observed[1].stdout
    assert "0 sources" in said
    plan = building.plan(load_manifest(observed[0]))
    assert f"ask for {len(plan.kernels)}\n" in said


@pytest.mark.slow
@needs_headers
def test_the_manifest_says_who_called_and_how_far_it_goes(observed: Observed) -> None:
    text = observed[0].read_text()
    assert "6 calls, 3 values of m up to 40; swept to 40: the largest seen" in text
    assert "small_engine.py" in text


@pytest.mark.slow
@needs_headers
def test_a_manifest_is_checked_against_the_engine(run: Run, observed: Observed, tmp_path: Path) -> None:
    command = ["--gpu", TARGET, "--", sys.executable, ENGINE]
    done = run("observe", "--check", observed[0], *command)
    assert done.returncode == 0 and "asks for all of them" in done.stdout, done.stderr
    (tmp_path / "less.yaml").write_text(
        f"name: less\ntarget: {{gpu: {TARGET}}}\nmax_tokens: 40\nops:\n  - {{op: fp8_gemm_nt, n: 576, k: 512}}\n"
    )
    done = run("observe", "--check", tmp_path / "less.yaml", *command, "1")
    assert done.returncode == 11
    assert "m_grouped_fp8_gemm_contiguous" in done.stdout
    assert "{op: m_grouped_fp8_gemm_nt_contiguous, experts: 2, n: 256, k: 512" in done.stdout


@pytest.mark.slow
@needs_headers
def test_a_build_observes_an_engine_and_has_all_that_it_asks_for(
    run: Run, observed: Observed, build_small: BuildSmall, tmp_path: Path
) -> None:
    build_small(None)  # it has these kernels
    output = tmp_path / "a.tar.zst"
    done = run("build", "--gpu", TARGET, "-o", output, "--check-code", "0", "--", sys.executable, ENGINE, "1")
    assert done.returncode == 0, done.stderr
    manifest = tmp_path / "a.tar.zst.manifest.yaml"
    assert str(manifest) in done.stdout
    inputs = load_manifest(manifest)
    assert {as_seen(op) for op in inputs.manifest.ops} == {
        as_seen(op) for op in load_manifest(observed[0]).manifest.ops if not op.sm_counts
    }, "the second worker has an op of its own, on fewer SMs"
    entries = {entry.name for entry in read_index(output).entries}
    assert entries == {kernel.entry for kernel in building.plan(inputs).kernels}


#: How far an op goes, which an observed one says in its own way; and what no call shows.
_NOT_SEEN = {"max_tokens", "max_rows", "max_batch", "max_k", "topk", "alignment", "sm_counts"}
#: Ops whose prepare calls these as well.
_SCHEDULES = {op for op in OPS if op.endswith("_mqa_logits_metadata")}


def as_seen(op: OpBase) -> str:
    """An op as its calls show it: with the experts of a token only where they select a kernel."""
    hidden = _NOT_SEEN - ({"topk"} if hasattr(op, "ranks") or op.op == "bf16_mega_gate" else set())
    return json.dumps(op.model_dump(exclude=hidden, exclude_none=True), sort_keys=True)


@pytest.mark.slow
@pytest.mark.parametrize(("arch", "generation"), [pair for pair in entry_points.PAIRS if pair[0] != "sm120"])
def test_every_op_is_read_back_from_its_own_calls(
    arch: str, generation: str, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`OpBase.sighting` is the inverse of ``prepare``."""
    monkeypatch.chdir(ROOT)  # where Python finds the program
    copy = installation.find(LEGACY if generation == "legacy" else None).path
    program = [sys.executable, "-m", "tests.every_op", copy, arch, generation]
    output = tmp_path / "m.yaml"
    done = run("observe", "-o", output, "--gpu", entry_points.GPUS[arch], "--", *program)
    assert done.returncode == 0, done.stderr
    unread = set(re.findall(r"no op     (\w+):", done.stdout))
    # These two are handed the parts of a buffer, not the buffer with its numbers of ranks and experts.
    assert unread <= {"mega_moe_pre_dispatch", "mega_moe_pre_dispatch_sm90"}
    cases = load_manifest(entry_points.write_manifest(tmp_path / "cases.yaml", arch, generation)).manifest.ops
    wanted = {as_seen(op) for op in cases if op.op not in unread}
    seen = {as_seen(op) for op in load_manifest(output).manifest.ops}
    assert wanted <= seen
    assert {json.loads(text)["op"] for text in seen - wanted} <= _SCHEDULES


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["m.yaml", "n.yaml"], "wanted one MANIFEST, found m.yaml n.yaml; an engine's command wants --gpu NAME"),
        (["--gpu", "no-such-card", "--", "true"], "no-such-card"),
        (["--gpu", TARGET, "--deep-gemm", ".", "--", "true"], "--deep-gemm goes with a manifest"),
        (["--gpu", TARGET, "--", "true"], "called no function of DeepGEMM"),
    ],
)
def test_a_build_that_cannot_observe_says_why_and_leaves_nothing(
    arguments: list[str], words: str, run: Run, tmp_path: Path
) -> None:
    done = run("build", "-o", tmp_path / "out" / "a.tar.zst", *arguments)
    assert done.returncode != 0 and words in " ".join(done.stderr.split())
    assert not (tmp_path / "out").exists()


def test_a_build_that_could_not_write_its_artifact_says_so_before_it_observes(run: Run, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    observed = tmp_path / "observed"
    done = run("build", "--gpu", TARGET, "-o", tmp_path / "file" / "a.tar.zst", "--", "touch", observed)
    assert done.returncode == 3 and "cannot be written" in done.stderr and not observed.exists()


@pytest.mark.slow
@needs_headers
def test_a_cuda_call_without_an_answer_ends_with_its_name(run: Run, tmp_path: Path) -> None:
    done = run(
        "observe", "-o", tmp_path / "m.yaml", "--gpu", TARGET, "--", sys.executable, ENGINE, "1", "cudaIpcGetMemHandle"
    )
    assert done.returncode == 6 and "the virtual GPU does not answer cudaIpcGetMemHandle" in done.stderr
    assert not (tmp_path / "m.yaml").exists()


def test_a_program_that_calls_no_deepgemm_leaves_no_manifest(run: Run, tmp_path: Path) -> None:
    done = run("observe", "-o", tmp_path / "m.yaml", "--gpu", TARGET, "--", "true")
    assert done.returncode != 0 and "called no function of DeepGEMM" in done.stderr
    assert not (tmp_path / "m.yaml").exists()


def test_a_program_that_fails_shows_its_last_lines(run: Run, tmp_path: Path) -> None:
    done = run("observe", "-o", tmp_path / "m.yaml", "--gpu", TARGET, "--", "sh", "-c", "echo no such model; exit 3")
    assert done.returncode == 16 and "ended with exit code 3\nno such model" in done.stderr
    [log] = re.findall(r"its whole output is in (\S+)", done.stderr)
    assert Path(log).read_text() == "no such model\n"


def test_the_lines_of_a_failed_program_are_shown_in_their_order(run: Run, tmp_path: Path) -> None:
    lines = ["raise OSError(name)", "OSError: no such model", *"abcde", "OSError: no such model"]
    program = f"print({chr(10).join(lines)!r}); exit(1)"
    done = run("observe", "-o", tmp_path / "m.yaml", "--gpu", TARGET, "--", sys.executable, "-c", program)
    assert "exit code 1\n" + "\n".join(lines) + "\n" in done.stderr


def test_no_process_is_left_over_not_even_of_another_group(run: Run, tmp_path: Path) -> None:
    """ninja starts each compiler in a process group of its own."""
    program = (
        "import os, subprocess, sys\n"
        f"started = subprocess.Popen(['sleep', '600'], process_group=0)\n"
        f"open({str(tmp_path / 'pid')!r}, 'w').write(str(started.pid))\n"
    )
    run("observe", "-o", tmp_path / "m.yaml", "--gpu", TARGET, "--", sys.executable, "-c", program)
    pid = int((tmp_path / "pid").read_text())
    stat = Path(f"/proc/{pid}/stat")
    assert not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z"


def test_vllms_command_gets_what_it_needs_and_nothing_that_it_has(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    command = ["vllm", "serve", str(tmp_path), "-tp", "8", "--port=8001", "--enforce-eager"]
    launch = engines.launch(command, {"VLLM_NO_USAGE_STATS": "1"}, gpus.find(TARGET))
    assert launch.server == Server("vllm", "http://127.0.0.1:8001", str(tmp_path), 8)
    added = launch.command[len(command) :]
    assert "--load-format" in added and "--port" not in added and "--enforce-eager" not in added
    assert "uni" in added and "VLLM_NO_USAGE_STATS" not in launch.environment
    assert {change.what.split("=")[0] for change in launch.changes} >= {
        "VLLM_ALLREDUCE_USE_SYMM_MEM",
        "--load-format dummy",
    }


@pytest.mark.parametrize(
    "words", [("--dp", "8", "--enable-dp-attention"), ("--dp-size=8",)], ids=["attention", "whole"]
)
def test_sglangs_command_gets_what_it_needs(tmp_path: Path, words: tuple[str, ...]) -> None:
    (tmp_path / "config.json").write_text("{}")
    command = ["python", "-m", "sglang.launch_server", "--model-path", str(tmp_path), "--tp=8", *words]
    launch = engines.launch(command, {}, gpus.find(TARGET))
    assert launch.server is not None
    assert (launch.server.engine, launch.server.model, launch.server.ranks) == ("sglang", str(tmp_path), 8)
    added = launch.command[len(command) :]
    assert {"--load-format", "--skip-tokenizer-init", "--port"} < set(added)
    assert launch.environment["CACHEBUILDER_OBSERVE_RANKS"] == "8"
    # Replicas ask for the same; the groups of data parallel attention bring their tokens to the same experts.
    assert ("--dp-size" in added) == (words == ("--dp-size=8",))


@pytest.mark.parametrize("command", [["vllm", "serve"], ["sglang", "serve", "--model-path"]], ids=["vllm", "sglang"])
def test_a_models_folder_that_no_engine_could_read_is_refused_before_it_starts(
    command: list[str], tmp_path: Path
) -> None:
    config = tmp_path / "config.json"

    def refusal() -> str:
        with pytest.raises(RecordingError) as refused:
            engines.launch([*command, str(tmp_path)], {}, gpus.find(TARGET))
        return str(refused.value)

    assert refusal() == f"{tmp_path}: wanted the model's config.json there, found none"
    config.write_text('{"architectures": [')
    assert refusal().startswith(f"{config}: wanted JSON, found ")
    config.write_text("[1]")
    assert refusal() == f"{config}: wanted a JSON object, found [1]"
    config.unlink()
    (tmp_path / "params.json").write_text("{}")  # Mistral's own format
    assert engines.launch([*command, str(tmp_path)], {}, gpus.find(TARGET)).server
    assert engines.launch([*command, "Qwen/Qwen3-8B-FP8"], {}, gpus.find(TARGET)).server  # a name on a hub
    with pytest.raises(
        RecordingError, match=r"\./absent: wanted the model's folder, with its config\.json; found nothing"
    ):
        engines.launch([*command, "./absent"], {}, gpus.find(TARGET))


def test_one_process_has_all_pipeline_stages_of_sglang() -> None:
    launch = engines.launch(["sglang", "serve", "--model-path", "m", "--pp-size", "2"], {}, gpus.find(TARGET))
    assert launch.server is not None and launch.server.stages == 2
    assert launch.command[-2:] == ("--pp-size", "1") and launch.environment["CACHEBUILDER_OBSERVE_STAGES"] == "2"


def test_sglang_serves_a_model_with_images_without_its_processor(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"vision_config": {}}')
    command = ["sglang", "serve", "--model-path", str(tmp_path)]
    option = "--json-model-override-args"
    launch = engines.launch([*command, f'{option}={{"vocab_size": 1000}}'], {}, gpus.find(TARGET))
    fields = launch.command[launch.command.index(option) + 1]  # behind the user's own: the last one counts
    assert json.loads(fields) == {"vocab_size": 1000, "language_model_only": True}
    with pytest.raises(RecordingError, match=f"{option}: wanted a JSON object, found '1'"):
        engines.launch([*command, option, "1"], {}, gpus.find(TARGET))
    (tmp_path / "preprocessor_config.json").write_text("{}")
    assert option not in engines.launch(command, {}, gpus.find(TARGET)).command


def test_one_process_stands_for_all_data_parallel_engines_and_pipeline_stages() -> None:
    command = ["vllm", "serve", "m", "-tp", "2", "--data-parallel-size", "4", "-pp", "2"]
    launch = engines.launch(command, {}, gpus.find(TARGET))
    assert launch.server is not None
    assert (launch.server.ranks, launch.server.stages) == (8, 2)
    text = " ".join(launch.command)
    assert "--data-parallel-rank 0" in text and text.index("--pipeline-parallel-size 1") > text.index("-pp 2")


def test_an_option_that_makes_no_sense_is_named() -> None:
    with pytest.raises(RecordingError, match="wanted a number, found 'many'"):
        engines.launch(["vllm", "serve", "m", "-tp", "many"], {}, gpus.find(TARGET))


def test_an_op_is_swept_to_the_engines_bound_and_never_below_what_was_seen() -> None:
    facts = calls.Facts(max_num_batched_tokens=8192, max_num_seqs=64, context_chunk=65536)
    op = calls.SeenOp("fp8_gemm_nt", {"n": 512, "k": 512}, maximum=100)
    assert bound(op, facts) == (8192, "max_num_batched_tokens")
    op.takes_context = True
    assert bound(op, facts) == (65536, "the chunk of cached context")
    op.maximum = 70000
    assert bound(op, facts) == (70000, "the largest seen")


def test_what_sees_more_than_a_step_takes_up_cached_context_as_well() -> None:
    """SGLang's MLA projects the context and the new tokens in one call."""
    facts = calls.Facts(max_num_batched_tokens=8192, context_chunk=131072)
    op = calls.SeenOp("fp8_gemm_nt", {"n": 4096, "k": 512}, maximum=12288)
    assert bound(op, facts) == (131072, "the chunk of cached context")
    rows = calls.SeenOp("m_grouped_fp8_gemm_nt_contiguous", {"experts": 32, "n": 4096, "k": 7168}, maximum=69504)
    assert bound(rows, facts) == (69504, "the largest seen"), "rows of experts are no tokens"


def test_a_buffer_that_follows_the_batch_is_one_op_up_to_the_engines_bound(tmp_path: Path) -> None:
    """SGLang reserves as many rows for each expert as the step has tokens, rounded up."""

    def masked(rows: int) -> str:
        scaled = [[tensor(32, rows, 512, dtype="float8_e4m3fn"), tensor(32, rows, 4, dtype="float32")]]
        scaled += [[tensor(32, 256, 512, dtype="float8_e4m3fn"), tensor(32, 2, 4, dtype="float32")]]
        operands = [*scaled, tensor(32, rows, 256), tensor(32, dtype="int32"), 64]
        return call("m_grouped_fp8_gemm_nt_masked", *operands)

    (tmp_path / "calls-1.jsonl").write_text(masked(256) + "\n" + masked(1024) + "\n")
    [op] = calls.read(tmp_path).ops
    assert op.buffers == {256, 1024}
    assert bound(op, calls.Facts(max_num_batched_tokens=8192)) == (8192, "max_num_batched_tokens")
    assert bound(op, calls.Facts(max_num_batched_tokens=512)) == (1024, "the largest buffer seen")


def test_traffic_has_a_prompt_longer_than_a_step_and_steps_with_several_sequences() -> None:
    batches = traffic.requests(calls.Facts(max_num_batched_tokens=2048, max_num_seqs=16, max_model_len=8192))
    assert max(request.tokens for batch in batches for request in batch) == 3072
    assert max(map(len, batches)) == 8


def test_quantised_modules_that_no_request_led_to_deepgemm_are_listed(tmp_path: Path) -> None:
    a, b, d = tensor(8, 64), tensor(16, 64), tensor(8, 16)
    lines = [
        call("bf16_gemm_nt", a, b, d, callers=["module model.layers.0.mlp.up", "engine.py:1 apply"]),
        call("bf16_gemm_nt", a, b, d, callers=["module model.layers.0.attention.kv", "in warmup"]),
    ]
    (tmp_path / "calls-1.jsonl").write_text("\n".join(lines) + "\n")
    names = [f"model.layers.{i}.{name}" for i in range(2) for name in ("mlp.up", "attention.kv")]
    modules = {"modules": {name: [[16, 64]] for name in names}}
    (tmp_path / "facts-1.jsonl").write_text(json.dumps(modules) + "\n")
    shapes = ((16, 64),)
    assert calls.read(tmp_path).uncalled == (
        calls.Uncalled("model.layers.#.attention.kv", 2, shapes, warmed=True),
        calls.Uncalled("model.layers.#.mlp.up", 1, shapes, warmed=False),
    )


def call(function: str, *args: object, **fields: object) -> str:
    """A line as the hook writes it."""
    return json.dumps(
        {"function": function, "copy_folder": "/x", "args": args, "kwargs": {}, "sm_count": 132, "alignment": 128}
        | {"callers": ["module model.layers.3.mlp", "engine.py:1 apply"]}
        | fields
    )


def tensor(*shape: int, dtype: str = "bfloat16") -> dict[str, object]:
    return {"shape": shape, "stride": [shape[-1], 1][-len(shape) :], "dtype": dtype}


def test_an_argument_by_position_is_read_as_the_function_reads_it(tmp_path: Path) -> None:
    """The fifth argument of a BF16 function is compiled_dims, of an FP8 one the recipe."""
    a, b, d = tensor(8, 64), tensor(16, 64), tensor(8, 16)
    (tmp_path / "calls-1.jsonl").write_text(call("bf16_gemm_nt", a, b, d, None, "nk") + "\n")
    [op] = calls.read(tmp_path).ops
    assert op.fields == {"n": 16, "k": 64, "compiled_dims": "nk"} and op.modules == {"model.layers.#.mlp"}


@pytest.mark.parametrize(
    ("scales", "fields"),
    [
        (("float32", "float32"), {}),
        (("int32", "int32"), {"scales": "packed"}),
        (("float32", "int32"), {}),  # vLLM packs a weight's scales when it loads them, and DeepGEMM packs a token's
    ],
)
def test_scales_that_are_packed_already_are_told_by_their_types(
    scales: tuple[str, str], fields: dict[str, str], tmp_path: Path
) -> None:
    a, b = tensor(8, 512, dtype="float8_e4m3fn"), tensor(128, 512, dtype="float8_e4m3fn")
    pairs = [[operand, tensor(4, 1, dtype=dtype)] for operand, dtype in zip((a, b), scales, strict=True)]
    (tmp_path / "calls-1.jsonl").write_text(call("fp8_gemm_nt", *pairs, tensor(8, 128)) + "\n")
    [op] = calls.read(tmp_path).ops
    assert op.fields == {"n": 128, "k": 512} | fields


def test_fp4_weights_are_an_op_of_their_own_by_whatever_name_the_function_is_called(tmp_path: Path) -> None:
    a, b = tensor(2, 64, 512, dtype="float8_e4m3fn"), tensor(2, 128, 256, dtype="int8")
    pairs = [[operand, tensor(2, 64, 1, dtype="int32")] for operand in (a, b)]
    line = call("fp8_m_grouped_gemm_nt_masked", *pairs, tensor(2, 64, 128), tensor(2, dtype="int32"), 8)
    (tmp_path / "calls-1.jsonl").write_text(line + "\n")
    [op] = calls.read(tmp_path).ops
    assert (op.name, op.fields["n"], op.fields["k"]) == ("m_grouped_fp8_fp4_gemm_nt_masked", 128, 512)


def test_an_alignment_that_the_engine_sets_by_call_is_swept(tmp_path: Path) -> None:
    rows, weight, out = tensor(256, 64), tensor(2, 16, 64), tensor(256, 16)
    lines = [
        call("m_grouped_bf16_gemm_nt_contiguous", rows, weight, out, tensor(256, dtype="int32"), alignment=alignment)
        for alignment in (64, 128)
    ]
    (tmp_path / "calls-1.jsonl").write_text("\n".join(lines) + "\n")
    text = manifest_text(calls.read(tmp_path), About(gpus.find(TARGET), "x", "engine", 0), {})
    assert "max_rows: 256, alignment: per-call}" in text
    # One alignment in this run, but the engine asked DeepGEMM for it: SM90 has one answer, SM100 several.
    (tmp_path / "calls-1.jsonl").write_text(lines[0] + "\n")
    (tmp_path / "facts-1.jsonl").write_text('{"asks_alignment": true}\n')
    texts = [
        manifest_text(calls.read(tmp_path), About(gpus.find(gpu), "x", "engine", 0), {}) for gpu in ("H200", "B200")
    ]
    assert ["per-call" in text for text in texts] == [False, True]


def test_a_line_that_no_process_writes_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "calls-1.jsonl").write_text('{"function": "fp8_gemm_nt"}\n')
    with pytest.raises(RecordingError, match="wanted a call of DeepGEMM"):
        calls.read(tmp_path)


def run_with_hooks(code: str, *folders: Path, **variables: str) -> str:
    """What Python prints of ``code``, with the hooks' modules and those in ``folders`` to import."""
    inside = Path(engines.__file__).parent / "inside"
    environment = os.environ | variables | {"PYTHONPATH": os.pathsep.join(map(str, (inside, *folders)))}
    if "CACHEBUILDER_OBSERVE" not in variables:
        environment.pop("CACHEBUILDER_OBSERVE", None)
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    ).stdout


def test_the_hook_runs_the_sitecustomize_that_it_hides(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("print('the own one')\n")
    folder = Path(engines.__file__).parent / "inside"
    environment = os.environ | {"PYTHONPATH": f"{folder}{os.pathsep}{tmp_path}"}
    done = subprocess.run([sys.executable, "-c", "0"], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "the own one\n"


def test_the_hook_does_nothing_in_a_process_that_is_not_observed() -> None:
    code = "import sys, sitecustomize; print([type(f).__name__ for f in sys.meta_path])"
    assert "AfterImport" not in run_with_hooks(code)


def test_vllm_gets_the_strides_of_a_cache_larger_than_this_host(tmp_path: Path) -> None:
    (tmp_path / "runner.py").write_text(
        "import torch\n\n\nclass GPUModelRunner:\n    def _reshape_kv_cache_tensors(self, target_shape):\n"
        "        stride = torch.empty(target_shape).stride()\n        return stride, torch.empty(1, device='cpu').device.type\n"
    )
    code = (
        "import runner, _cachebuilder_vllm as hooks\nhooks.strides_without_memory(runner)\n"
        "print(runner.GPUModelRunner()._reshape_kv_cache_tensors((1 << 44, 8)))\n"
    )
    assert run_with_hooks(code, tmp_path) == "((8, 1), 'cpu')\n"


def test_a_function_that_is_an_operator_of_torch_is_seen(tmp_path: Path) -> None:
    code = (
        "import sys, types, torch, _cachebuilder_calls as hooks\n"
        "copy = types.ModuleType('deep_gemm')\ncopy.__file__ = '/x/deep_gemm/__init__.py'\n"
        "copy.get_paged_mqa_logits_metadata = torch.ops.aten.clone\nhooks.wrap_functions(copy)\n"
        "copy.get_paged_mqa_logits_metadata(torch.zeros(3, 1, dtype=torch.int32))\n"
    )
    run_with_hooks(code, CACHEBUILDER_OBSERVE=str(tmp_path))
    first = json.loads(next(tmp_path.glob("calls-*.jsonl")).read_text().splitlines()[0])
    assert first["function"] == "get_paged_mqa_logits_metadata"
    assert first["args"] == [{"dtype": "int32", "shape": [3, 1], "stride": [1, 1]}]


def test_vllm_s_requests_accept_the_drafts_that_they_have_and_no_more(tmp_path: Path) -> None:
    (tmp_path / "sampler.py").write_text(
        "import types\nimport torch\n\nPLACEHOLDER_TOKEN_ID = -1\n\n\nclass RejectionSampler:\n"
        "    def forward(self, metadata, logits):\n"
        "        return types.SimpleNamespace(sampled_token_ids=torch.full((2, 3), 7, dtype=torch.int32))\n"
    )
    code = (
        "import types, sampler, _cachebuilder_vllm as hooks\nhooks.accept_every_draft(sampler)\n"
        "drafts = types.SimpleNamespace(num_draft_tokens=[2, 0])\n"
        "print(sampler.RejectionSampler().forward(drafts, None).sampled_token_ids.tolist())\n"
    )
    assert run_with_hooks(code, tmp_path) == "[[0, 0, 0], [0, -1, -1]]\n"


def test_vllm_moves_states_of_one_accepted_token_at_least(tmp_path: Path) -> None:
    (tmp_path / "mamba_utils.py").write_text(
        "def preprocess_mamba(scheduler_output, input_batch):\n    print(input_batch.num_accepted_tokens_cpu_tensor.tolist())\n"
    )
    code = (
        "import types, torch, mamba_utils, _cachebuilder_vllm as hooks\nhooks.one_accepted_token_at_least(mamba_utils)\n"
        "batch = types.SimpleNamespace(num_accepted_tokens_cpu_tensor=torch.tensor([0, 3, 1]))\n"
        "mamba_utils.preprocess_mamba(None, batch)\n"
    )
    assert run_with_hooks(code, tmp_path) == "[1, 3, 1]\n"
