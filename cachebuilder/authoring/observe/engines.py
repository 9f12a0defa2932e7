"""What is changed in an engine's serve command so that it runs with no weights, on one virtual GPU.

From vLLM 0.25.0: ``vllm/engine/arg_utils.py``, ``vllm/envs.py``, ``vllm/config/parallel.py``.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cachebuilder.cuda.gpus import Gpu
from cachebuilder.errors import RecordingError


@dataclass(frozen=True)
class Change:
    """Something that was changed: ``NAME=value`` in the environment, or options of the command; and why."""

    what: str
    why: str


@dataclass(frozen=True)
class Launch:
    """A command as it is run.

    Attributes:
        environment: variables to add.
        changes: what differs from the user's command and environment.
        address: where the engine serves HTTP; None for a program that is run to its end.
        model: what the command names as its model; empty where that is not known.
        ranks: how many GPUs the experts, or one stage of the model, are spread over.
        stages: of pipeline parallelism, whose layers one virtual GPU holds.
    """

    command: tuple[str, ...]
    environment: Mapping[str, str]
    changes: tuple[Change, ...]
    address: str | None
    model: str
    ranks: int = 1
    stages: int = 1


class _Arguments:
    """A command's options, which are read and added to."""

    def __init__(self, command: Sequence[str]) -> None:
        self.command = list(command)
        self.changes: list[Change] = []

    def value(self, *names: str) -> str | None:
        """The value of the first of these options that is given, as ``--name value`` or ``--name=value``."""
        for index, argument in enumerate(self.command):
            name, equals, value = argument.partition("=")
            if name.replace("_", "-") in names:
                return value if equals else (self.command[index + 1] if index + 1 < len(self.command) else "")
        return None

    def number(self, *names: str) -> int:
        """The same as a number; 1 where it is not given."""
        text = self.value(*names)
        if text is not None and not text.isdecimal():
            raise RecordingError(f"{names[0]}: wanted a number, found {text!r}")
        return int(text or 1)

    def set(self, why: str, option: str, value: str) -> None:
        """Give an option a value: the last one counts."""
        if self.value(option) != value:
            self.command += (option, value)
            self.changes.append(Change(f"{option} {value}", why))

    def add(self, why: str, *options: str) -> None:
        """Add options, unless the first is given already."""
        if self.value(options[0]) is None:
            self.command += options
            self.changes.append(Change(" ".join(options), why))


def launch(command: Sequence[str], environment: Mapping[str, str], gpu: Gpu, with_flashinfer: bool = False) -> Launch:
    """How ``command`` is run: a serve command of vLLM is changed; anything else is run to its end as it is.

    Args:
        with_flashinfer: let the engine take from FlashInfer what it would take while it serves.

    Raises:
        RecordingError: the command asks for something that cannot be observed yet.
    """
    names = [os.path.basename(argument) for argument in command]
    if names[:2] == ["vllm", "serve"] or "vllm.entrypoints.openai.api_server" in command:
        return _vllm(command, environment, gpu, with_flashinfer)
    if "sglang.launch_server" in command or names[:2] == ["sglang", "serve"]:
        raise RecordingError(
            "wanted a serve command of vLLM, found one of SGLang, which cannot be observed yet",
            hint="cachebuilder manifest --model FOLDER --engine sglang works the shapes out by SGLang's rules",
        )
    return Launch(tuple(command), {}, (), None, "")


def _vllm(command: Sequence[str], environment: Mapping[str, str], gpu: Gpu, with_flashinfer: bool) -> Launch:
    arguments = _Arguments(command)
    model = arguments.value("--model") or _first_operand(command)
    arguments.add("no weights are needed: shapes and formats are the model's own", "--load-format", "dummy")
    arguments.add("CUDA graphs and torch.compile change no call of DeepGEMM", "--enforce-eager")
    arguments.add("FlashInfer would compile linear attention's prefill for minutes; it calls no DeepGEMM",
                  "--gdn-prefill-backend", "triton")  # fmt: skip
    if os.path.isdir(model) and not any(Path(model).glob("tokenizer*")):
        arguments.add("the model's folder has no tokenizer; requests are token numbers", "--skip-tokenizer-init")
    if _sees_without_processor(model):
        arguments.add("no config of an image processor is here: the vision tower is not seen", "--language-model-only")
    port = arguments.value("--port")
    if port is None:
        port = str(_free_port())
        arguments.add("a free port, for this run's own requests", "--port", port)
    added: dict[str, tuple[str, str]] = {
        "VLLM_WORKER_MULTIPROC_METHOD": ("fork", "the engine's process then imports nothing a second time"),
        "FLASHINFER_CUDA_ARCH_LIST": (f"{gpu.major}.{gpu.minor}a", "FlashInfer would ask the GPU for it at import, and "
        "a process that uses a GPU cannot fork"),
        "CACHEBUILDER_OBSERVE_COMPILE_NOTHING": ("1", "Triton, TileLang, CuTe-DSL, FlashInfer: minutes for what never "
        "run; none of them is DeepGEMM's, and FlashInfer's GEMMs are built"),
        "TILELANG_DISABLE_CACHE": ("1", "what was not compiled must not be kept"),
        "VLLM_NO_USAGE_STATS": ("1", "nothing is sent anywhere"),
    }  # fmt: skip
    if not with_flashinfer:
        added |= {
            "VLLM_BLOCKSCALE_FP8_GEMM_FLASHINFER": ("0", "FlashInfer's copy of DeepGEMM has its own cache; without it, "
            "every M goes to DeepGEMM"),
            "VLLM_USE_FLASHINFER_SAMPLER": ("0", "FlashInfer compiles its sampler; sampling calls no DeepGEMM"),
        }  # fmt: skip
    if os.path.isdir(model):
        added["HF_HUB_OFFLINE"] = ("1", "the model's folder is here: no network")
    stages = arguments.number("--pipeline-parallel-size", "-pp")
    engines = arguments.number("--data-parallel-size", "-dp")
    if stages > 1:
        arguments.set("one stage, with the layers of all: each calls DeepGEMM with the same M",
                      "--pipeline-parallel-size", "1")  # fmt: skip
    if engines > 1:
        arguments.set(f"one engine stands for {engines}: the others have as many tokens", "--data-parallel-rank", "0")
    ranks = engines * arguments.number("--tensor-parallel-size", "-tp")
    if ranks > 1:
        arguments.add(f"one process stands for {ranks} ranks", "--distributed-executor-backend", "uni")
        arguments.add("needs the other ranks; calls no DeepGEMM", "--disable-custom-all-reduce")
        added |= {
            "CACHEBUILDER_OBSERVE_RANKS": (str(ranks), "process groups (torch's FakeProcessGroup) and NCCL do nothing"),
            "VLLM_ALLREDUCE_USE_SYMM_MEM": ("0", "needs the other ranks; calls no DeepGEMM"),
        }
    taken = {name: pair for name, pair in added.items() if environment.get(name) != pair[0]}
    changes = [*arguments.changes, *(Change(f"{name}={value}", why) for name, (value, why) in taken.items())]
    return Launch(
        command=tuple(arguments.command),
        environment={name: value for name, (value, _) in taken.items()},
        changes=tuple(changes),
        address=f"http://127.0.0.1:{port}",
        model=model,
        ranks=ranks,
        stages=stages,
    )


def _sees_without_processor(model: str) -> bool:
    """Whether a folder's model takes images, and the config of what prepares them is missing."""
    folder = Path(model)
    try:
        sees = "vision_config" in json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        return False  # the engine says what is wrong
    return sees and not any(folder.glob("*processor_config.json"))


def _first_operand(command: Sequence[str]) -> str:
    """The model behind ``vllm serve``."""
    rest = list(command[command.index("serve") + 1 :]) if "serve" in command else []
    return rest[0] if rest and not rest[0].startswith("-") else ""


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
