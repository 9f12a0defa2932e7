"""Which engine a command starts, and how it is run."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from cachebuilder.authoring.observe import sglang, vllm
from cachebuilder.authoring.observe.command import Launch
from cachebuilder.cuda.gpus import Gpu
from cachebuilder.errors import RecordingError


def launch(command: Sequence[str], environment: Mapping[str, str], gpu: Gpu, with_flashinfer: bool = False) -> Launch:
    """How ``command`` is run: an engine's serve command is changed; anything else is run to its end as it is.

    Args:
        with_flashinfer: let the engine take from FlashInfer what it would take while it serves.

    Raises:
        RecordingError: the command asks for something that cannot be observed.
    """
    names = [os.path.basename(argument) for argument in command]
    if names[:2] == ["vllm", "serve"] or "vllm.entrypoints.openai.api_server" in command:
        return vllm.launch(command, environment, gpu, with_flashinfer)
    if names[:2] == ["sglang", "serve"] or "sglang.launch_server" in command:
        return sglang.launch(command, environment, gpu, with_flashinfer)
    return Launch(tuple(command), {}, (), None)


def launch_to_bake(command: Sequence[str], environment: Mapping[str, str]) -> Launch:
    """How ``command`` is run so that its compilers fill their caches: changed only where no key looks.

    Raises:
        RecordingError: the engine wants several GPUs, or is one whose keys are not known.
    """
    names = [os.path.basename(argument) for argument in command]
    if names[:2] == ["vllm", "serve"] or "vllm.entrypoints.openai.api_server" in command:
        return vllm.launch_to_bake(command, environment)
    if names[:2] == ["sglang", "serve"] or "sglang.launch_server" in command:
        raise RecordingError(
            "wanted vllm serve, or a program that ends, found SGLang: its compilers' keys are not known"
        )
    return Launch(tuple(command), {}, (), None)
