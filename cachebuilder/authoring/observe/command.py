"""A serve command as it is observed: what is changed in it, in any engine's, and why."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cachebuilder.cuda.gpus import Gpu
from cachebuilder.errors import RecordingError

Engine = Literal["vllm", "sglang"]
#: Variables to set: the name, the value, and why.
Variables = Mapping[str, tuple[str, str]]


@dataclass(frozen=True)
class Change:
    """Something that was changed: ``NAME=value`` in the environment, or options of the command; and why."""

    what: str
    why: str


@dataclass(frozen=True)
class Server:
    """An engine that serves.

    Attributes:
        address: where it serves HTTP.
        model: what the command names as its model; empty where that is not known.
        ranks: how many GPUs the experts, or one stage of the model, are spread over.
        stages: of pipeline parallelism, whose layers one virtual GPU holds.
    """

    engine: Engine
    address: str
    model: str
    ranks: int = 1
    stages: int = 1


@dataclass(frozen=True)
class Launch:
    """A command as it is run.

    Attributes:
        environment: variables to add.
        changes: what differs from the user's command and environment.
        server: the engine that it starts; None for a program that is run to its end.
    """

    command: tuple[str, ...]
    environment: Mapping[str, str]
    changes: tuple[Change, ...]
    server: Server | None


class Arguments:
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

    def need_no_weights(self, model: str) -> None:
        """Add what lets a folder with no more than a config serve. Raises `RecordingError` if that cannot be read."""
        _check_folder(model)
        self.add("no weights are needed: shapes and formats are the model's own", "--load-format", "dummy")
        if os.path.isdir(model) and not any(Path(model).glob("tokenizer*")):
            self.add("the model's folder has no tokenizer; requests are token numbers", "--skip-tokenizer-init")

    def port(self) -> str:
        """The port that the command names; a free one is added where it names none."""
        if (given := self.value("--port")) is not None:
            return given
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        self.add("a free port, for this run's own requests", "--port", port)
        return port

    def launch(self, server: Server, variables: Variables, environment: Mapping[str, str]) -> Launch:
        """The changed command. A variable that has its value in ``environment`` already is no change."""
        new = {name: pair for name, pair in variables.items() if environment.get(name) != pair[0]}
        return Launch(
            command=tuple(self.command),
            environment={name: value for name, (value, _) in new.items()},
            changes=(*self.changes, *(Change(f"{name}={value}", why) for name, (value, why) in new.items())),
            server=server,
        )


def _check_folder(model: str) -> None:
    """Refuse a path where an engine would take it for a name on a hub, or end with a long trace.

    A file, or a folder with Mistral's ``params.json``, is the engine's to read.
    """
    folder, config = Path(model), Path(model, "config.json")
    if model.startswith((".", "/")) and not folder.exists():
        raise RecordingError(f"{model}: wanted the model's folder, with its config.json; found nothing there")
    if not model or not folder.is_dir() or (folder / "params.json").exists():
        return
    try:
        fields = json.loads(config.read_bytes())
    except FileNotFoundError:
        raise RecordingError(f"{model}: wanted the model's config.json there, found none") from None
    except OSError as error:
        raise RecordingError(f"{config}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise RecordingError(f"{config}: wanted JSON, found {error}") from None
    if not isinstance(fields, dict):
        raise RecordingError(f"{config}: wanted a JSON object, found {fields!r:.40}")


def common_variables(model: str, gpu: Gpu, ranks: int) -> dict[str, tuple[str, str]]:
    """The variables that each engine gets."""
    variables = {
        "FLASHINFER_CUDA_ARCH_LIST": (f"{gpu.major}.{gpu.minor}a", "FlashInfer would ask the GPU for it at import, and "
        "a process that uses a GPU cannot fork"),
        "CACHEBUILDER_OBSERVE_COMPILE_NOTHING": ("1", "Triton, TileLang, CuTe-DSL and FlashInfer would compile for "
        "minutes what never runs; none of it is DeepGEMM's, and FlashInfer's GEMMs are built"),
        "TILELANG_DISABLE_CACHE": ("1", "what was not compiled must not be kept"),
    }  # fmt: skip
    if os.path.isdir(model):
        variables["HF_HUB_OFFLINE"] = ("1", "the model's folder is here: no network")
    if ranks > 1:
        why = "process groups (torch's FakeProcessGroup) and NCCL do nothing"
        variables["CACHEBUILDER_OBSERVE_RANKS"] = (str(ranks), why)
    return variables


def sees_without_processor(model: str) -> bool:
    """Whether a folder's model takes images, and the config of what prepares them is missing."""
    folder = Path(model)
    try:
        sees = "vision_config" in json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        return False  # the engine says what is wrong
    return sees and not any(folder.glob("*processor_config.json"))
