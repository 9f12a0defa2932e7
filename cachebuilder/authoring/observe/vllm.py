"""What is changed in vLLM's serve command so that it runs with no weights, on one virtual GPU.

From vLLM 0.25.0: ``vllm/engine/arg_utils.py``, ``vllm/envs.py``, ``vllm/config/parallel.py``; and 0.33.0:
``vllm/entrypoints/scale_out/factories.py``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from cachebuilder.authoring.observe.command import Arguments, Launch, Server, common_variables, sees_without_processor
from cachebuilder.cuda.gpus import Gpu
from cachebuilder.deepgemm.installation import package_folder
from cachebuilder.errors import RecordingError


def launch(command: Sequence[str], environment: Mapping[str, str], gpu: Gpu, with_flashinfer: bool) -> Launch:
    """How the command is run. Raises `RecordingError` for an option that makes no sense."""
    arguments = Arguments(command)
    model = arguments.value("--model") or _first_operand(command)
    arguments.need_no_weights(model)
    if sees_without_processor(model):
        arguments.add("no config of an image processor is here: the vision tower is not seen", "--language-model-only")
    arguments.add("CUDA graphs and torch.compile change no call of DeepGEMM", "--enforce-eager")
    arguments.add("FlashInfer would compile linear attention's prefill for minutes; it calls no DeepGEMM",
                  "--gdn-prefill-backend", "triton")  # fmt: skip
    _answer_token_numbers(arguments)
    port = arguments.port()
    stages = arguments.number("--pipeline-parallel-size", "-pp")
    engines = arguments.number("--data-parallel-size", "-dp")
    ranks = engines * arguments.number("--tensor-parallel-size", "-tp")
    variables = common_variables(model, gpu, ranks) | {
        "VLLM_WORKER_MULTIPROC_METHOD": ("fork", "the engine's process then imports nothing a second time"),
        "VLLM_NO_USAGE_STATS": ("1", "nothing is sent anywhere"),
        "VLLM_USE_V2_MODEL_RUNNER": ("0", "it counts sampled tokens on the device, where numbers mean nothing here"),
    }
    if not with_flashinfer:
        variables |= {
            "VLLM_BLOCKSCALE_FP8_GEMM_FLASHINFER": ("0", "FlashInfer's copy of DeepGEMM has its own cache; without it, "
            "every M goes to DeepGEMM"),
            "VLLM_USE_FLASHINFER_SAMPLER": ("0", "FlashInfer compiles its sampler; sampling calls no DeepGEMM"),
        }  # fmt: skip
    if stages > 1:
        arguments.set("one stage, with the layers of all: each calls DeepGEMM with the same M",
                      "--pipeline-parallel-size", "1")  # fmt: skip
    if engines > 1:
        arguments.set(f"one engine stands for {engines}: the others have as many tokens", "--data-parallel-rank", "0")
    if ranks > 1:
        arguments.add(f"one process stands for {ranks} ranks", "--distributed-executor-backend", "uni")
        arguments.add("needs the other ranks; calls no DeepGEMM", "--disable-custom-all-reduce")
        variables["VLLM_ALLREDUCE_USE_SYMM_MEM"] = ("0", "needs the other ranks; calls no DeepGEMM")
    server = Server("vllm", f"http://127.0.0.1:{port}", model, ranks, stages)
    return arguments.launch(server, variables, environment)


def launch_to_bake(command: Sequence[str], environment: Mapping[str, str]) -> Launch:
    """How the command is run so that its compilers fill their caches.

    Only what no key holds is changed: ``LoadConfig`` has no part in keys, and ``ModelConfig`` leaves out the tokenizer
    (``compute_hash`` in ``vllm/config/load.py`` and ``model.py``, 0.25.0).

    Raises:
        RecordingError: it wants several GPUs.
    """
    arguments = Arguments(command)
    model = arguments.value("--model") or _first_operand(command)
    for option in (
        ("--tensor-parallel-size", "-tp"),
        ("--pipeline-parallel-size", "-pp"),
        ("--data-parallel-size", "-dp"),
    ):
        if (count := arguments.number(*option)) > 1:
            raise RecordingError(
                f"wanted a command for one GPU, found {option[0]} {count}",
                hint="each rank has caches of its own, and one process cannot stand for all of them",
            )
    arguments.need_no_weights(model)
    _answer_token_numbers(arguments)
    server = Server("vllm", f"http://127.0.0.1:{arguments.port()}", model)
    variables = {"VLLM_NO_USAGE_STATS": ("1", "nothing is sent anywhere")}
    return arguments.launch(server, variables, environment)


def _answer_token_numbers(arguments: Arguments) -> None:
    """Have the server answer requests of token numbers, which vLLM before 0.32 does without being asked."""
    folder = package_folder("vllm")
    source = folder / "entrypoints" / "scale_out" / "factories.py" if folder else None
    if source and source.is_file() and "--enable-scale-out" in source.read_text(errors="replace"):
        arguments.add("requests are token numbers", "--enable-scale-out")


def _first_operand(command: Sequence[str]) -> str:
    """The model behind ``vllm serve``."""
    rest = list(command[command.index("serve") + 1 :]) if "serve" in command else []
    return rest[0] if rest and not rest[0].startswith("-") else ""
