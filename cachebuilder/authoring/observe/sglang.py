"""What is changed in SGLang's serve command so that it runs with no weights, on one virtual GPU.

From SGLang 0.5.23: ``sglang/srt/server_args.py``, ``sglang/srt/environ.py``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from cachebuilder.authoring.observe.command import Arguments, Launch, Server, common_variables
from cachebuilder.cuda.gpus import Gpu
from cachebuilder.errors import RecordingError

#: Options by which the user decides about CUDA graphs.
_GRAPHS = ("--disable-cuda-graph", "--cuda-graph-config", "--cuda-graph-backend-decode")


def launch(command: Sequence[str], environment: Mapping[str, str], gpu: Gpu, with_flashinfer: bool) -> Launch:
    """How the command is run. Raises `RecordingError` for an option that makes no sense."""
    arguments = Arguments(command)
    model = arguments.value("--model-path", "--model") or ""
    arguments.need_no_weights(model)
    if all(arguments.value(name) is None for name in _GRAPHS):
        arguments.add("torch.compile changes no call of DeepGEMM", "--cuda-graph-backend-prefill", "disabled")
        arguments.add("graphs of two sizes show the calls; M is swept", "--cuda-graph-bs-decode", "1", "8")
    arguments.add("FlashInfer's linear attention steers by numbers on the device; it calls no DeepGEMM",
                  "--linear-attn-prefill-backend", "triton")  # fmt: skip
    port = arguments.port()
    ranks = arguments.number("--tp", "--tp-size", "--tensor-parallel-size")
    if (stages := arguments.number("--pp-size", "--pipeline-parallel-size")) > 1:
        raise RecordingError(
            f"--pp-size: wanted 1, found {stages}: SGLang's pipeline stages cannot be observed yet",
            hint="cachebuilder manifest --model FOLDER --engine sglang works the shapes out by SGLang's rules",
        )
    replicas = arguments.number("--dp", "--dp-size", "--data-parallel-size")
    if replicas > 1 and arguments.value("--enable-dp-attention") is None:
        arguments.set(f"one replica stands for {replicas}, which ask for the same", "--dp-size", "1")
    if ranks > 1:
        for option in ("--disable-custom-all-reduce", "--enforce-disable-flashinfer-allreduce-fusion"):
            arguments.add("needs the other ranks; calls no DeepGEMM", option)
    variables = common_variables(model, gpu, ranks) | {
        "SGLANG_JIT_DEEPGEMM_PRECOMPILE": ("0", "the warm-up calls each GEMM with every M, as the plan does"),
    }
    return arguments.launch(Server("sglang", f"http://127.0.0.1:{port}", model, ranks), variables, environment)
