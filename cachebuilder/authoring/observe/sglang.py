"""What is changed in SGLang's serve command so that it runs with no weights, on one virtual GPU.

From SGLang 0.5.23: ``sglang/srt/server_args.py``, ``sglang/srt/environ.py``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from cachebuilder.authoring.observe.command import Arguments, Launch, Server, common_variables, sees_without_processor
from cachebuilder.cuda.gpus import Gpu
from cachebuilder.errors import RecordingError

#: Options by which the user decides about CUDA graphs.
_GRAPHS = ("--disable-cuda-graph", "--cuda-graph-config", "--cuda-graph-backend-decode")


def launch(command: Sequence[str], environment: Mapping[str, str], gpu: Gpu, with_flashinfer: bool) -> Launch:
    """How the command is run. Raises `RecordingError` for an option that makes no sense."""
    arguments = Arguments(command)
    model = arguments.value("--model-path", "--model") or ""
    arguments.need_no_weights(model)
    if sees_without_processor(model):
        _without_images(arguments)
    if all(arguments.value(name) is None for name in _GRAPHS):
        arguments.add("torch.compile changes no call of DeepGEMM", "--cuda-graph-backend-prefill", "disabled")
        arguments.add("graphs of two sizes show the calls; M is swept", "--cuda-graph-bs-decode", "1", "8")
    arguments.add("FlashInfer's linear attention steers by numbers on the device; it calls no DeepGEMM",
                  "--linear-attn-prefill-backend", "triton")  # fmt: skip
    port = arguments.port()
    ranks = arguments.number("--tp", "--tp-size", "--tensor-parallel-size")
    stages = arguments.number("--pp-size", "--pipeline-parallel-size")
    replicas = arguments.number("--dp", "--dp-size", "--data-parallel-size")
    if replicas > 1 and arguments.value("--enable-dp-attention") is None:
        arguments.set(f"one replica stands for {replicas}, which ask for the same", "--dp-size", "1")
    if ranks > 1:
        for option in ("--disable-custom-all-reduce", "--enforce-disable-flashinfer-allreduce-fusion"):
            arguments.add("needs the other ranks; calls no DeepGEMM", option)
    variables = common_variables(model, gpu, ranks) | {
        "SGLANG_JIT_DEEPGEMM_PRECOMPILE": ("0", "the warm-up calls each GEMM with every M, as the plan does"),
    }
    if stages > 1:
        arguments.set("one stage, with the layers of all: each calls DeepGEMM with the same M", "--pp-size", "1")
        why = "in all stages but the last, the indexer leaves one SM free for what the stage before sends"
        variables["CACHEBUILDER_OBSERVE_STAGES"] = (str(stages), why)
    server = Server("sglang", f"http://127.0.0.1:{port}", model, ranks, stages)
    return arguments.launch(server, variables, environment)


def _without_images(arguments: Arguments) -> None:
    """Serve the language model alone.

    SGLang takes ``--language-model-only`` for a few classes only. Where the config itself says so, it asks for no
    processor, whatever the class (``srt/configs/model_config.py``), and classes that read the field build no tower.
    """
    option = "--json-model-override-args"
    given = arguments.value(option) or "{}"
    try:
        fields = json.loads(given) | {"language_model_only": True}
    except (ValueError, TypeError):
        raise RecordingError(f"{option}: wanted a JSON object, found {given!r}") from None
    why = "no config of an image processor is here: the vision tower is not seen"
    arguments.set(why, option, json.dumps(fields))
