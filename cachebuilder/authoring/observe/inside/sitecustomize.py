"""Runs in every Python process of an observed program: writes down each call of a function of DeepGEMM.

Python imports a module of this name at its start (``site``). It wraps the public functions of each copy of DeepGEMM
when that copy is imported, and writes each new kind of call to ``$CACHEBUILDER_OBSERVE/calls-<pid>.jsonl``, one JSON
object a line. It imports nothing but the standard library, and nothing of cachebuilder.
"""

from __future__ import annotations

import atexit
import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import sys
import threading
import time
from types import FrameType, ModuleType
from typing import Any

FOLDER = os.environ.get("CACHEBUILDER_OBSERVE", "")
#: The names under which engines import a DeepGEMM: PyPI's, and vLLM's own copy (vllm/utils/deep_gemm.py, 0.25.0).
COPIES = ("deep_gemm", "vllm.third_party.deep_gemm")
#: How many frames are looked at, and how many of the engine's are written down; the nearest first.
MOST_FRAMES, MOST_PLACES = 40, 6
#: Functions of vLLM 0.25.0 whose calls differ from others: weights are prepared when they are loaded
#: (``layers/quantization/fp8.py``); cached context is taken up in chunks (``layers/attention/mla_attention.py``).
MARKS = ("process_weights_after_loading", "_compute_prefill_context", "_context_parallel_compute_prefill_context")


class Calls:
    """The kinds of calls that this process made: each is written when it is first seen, counts now and then."""

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._counts: dict[str, int] = {}
        self._numbers: dict[str, int] = {}
        self._lock = threading.Lock()
        self._inside = threading.local()
        self._written = 0.0
        self._pid = 0

    def wrap(self, module: ModuleType, name: str, function: Any) -> Any:
        """``function``, which also writes down that it was called."""

        def call(*args: Any, **kwargs: Any) -> Any:
            # A function of DeepGEMM may call another one: the engine's call is the one that counts.
            if getattr(self._inside, "depth", 0):
                return function(*args, **kwargs)
            self._inside.depth = 1
            try:
                self._note(module, name, args, kwargs)
                return function(*args, **kwargs)
            finally:
                self._inside.depth = 0

        call.__name__, call.__doc__, call.__wrapped__ = name, getattr(function, "__doc__", None), function  # type: ignore[attr-defined]
        return call

    def _note(self, module: ModuleType, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tensors = [0]
        described = [describe(value, tensors) for value in args]
        named = {key: describe(value, tensors) for key, value in kwargs.items()}
        if not tensors[0]:
            return  # a setting, or a question
        call = {
            "function": name,
            "copy_folder": os.path.dirname(module.__file__ or ""),
            "args": described,
            "kwargs": named,
            "sm_count": _ask(module, "get_num_sms"),
            "alignment": _ask(module, "get_mk_alignment_for_contiguous_layout"),
            "callers": callers(sys._getframe(2)),
        }
        text = json.dumps(call, sort_keys=True)
        with self._lock:
            if self._pid != os.getpid():  # a fork: its calls go into a file of its own
                self._pid, self._counts, self._numbers = os.getpid(), {}, {}
                atexit.register(self.flush)
            new = text not in self._counts
            self._counts[text] = self._counts.get(text, 0) + 1
            if new:
                self._numbers[text] = len(self._numbers)
                self._append([text])
        if time.monotonic() - self._written > 5:
            self.flush()

    def flush(self) -> None:
        """Write how often each kind of call was made so far."""
        with self._lock:
            self._written = time.monotonic()
            if self._pid == os.getpid() and self._counts:
                counts = [count for _, count in sorted((self._numbers[text], n) for text, n in self._counts.items())]
                self._append([json.dumps({"counts": counts})])

    def _append(self, lines: list[str]) -> None:
        path = os.path.join(self._folder, f"calls-{self._pid}.jsonl")
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        try:
            os.write(handle, "".join(line + "\n" for line in lines).encode())
        finally:
            os.close(handle)


def _ask(module: ModuleType, question: str) -> Any:
    function = getattr(module, question, None)
    function = getattr(function, "__wrapped__", function)
    return function() if function else None


def describe(value: Any, tensors: list[int]) -> Any:
    """A value as JSON: a tensor by its shape, strides and type; counts tensors in ``tensors``."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, tuple | list):
        return [describe(one, tensors) for one in value]
    shape, stride = getattr(value, "shape", None), getattr(value, "stride", None)
    if shape is not None and callable(stride):
        tensors[0] += 1
        return {
            "shape": [int(n) for n in shape],
            "stride": [int(n) for n in stride()],
            "dtype": str(value.dtype).removeprefix("torch."),
        }
    return {"object": type(value).__name__, "text": str(value)[:200]}


def callers(frame: FrameType | None) -> list[str]:
    """Where a call comes from: the engine's name of the module, the `MARKS` on the way, and the nearest lines."""
    places: list[str] = []
    about: list[str] = []
    for _ in range(MOST_FRAMES):
        if frame is None:
            break
        code = frame.f_code
        if len(places) < MOST_PLACES and "/torch/" not in code.co_filename:
            places.append(f"{short(code.co_filename)}:{frame.f_lineno} {code.co_name}")
        if code.co_name in MARKS:
            about.append(f"in {code.co_name}")
        if not any(text.startswith("module ") for text in about) and (module := _module_of(frame)):
            about.append(f"module {module}")
        frame = frame.f_back
    return about + places


def _module_of(frame: FrameType) -> str | None:
    """The engine's name of the module whose method, or whose layer, a frame is in."""
    for variable in ("self", "layer"):
        for name in ("prefix", "layer_name"):
            found = getattr(frame.f_locals.get(variable), name, None)
            if isinstance(found, str) and "." in found:
                return found
    return None


def short(path: str) -> str:
    """A file's path without the folder that packages are installed in."""
    for mark in ("/site-packages/", "/dist-packages/"):
        if mark in path:
            return path.rpartition(mark)[2]
    return path


CALLS = Calls(FOLDER)


def wrap_functions(module: ModuleType) -> None:
    """Wrap the public functions of a copy of DeepGEMM, and write down which torch it works with."""
    note({"torch": os.path.dirname(getattr(sys.modules.get("torch"), "__file__", None) or "")})
    for name, value in list(vars(module).items()):
        is_function = type(value).__name__ in ("function", "builtin_function_or_method", "Function", "method")
        is_setting = name.startswith(("_", "set_", "get_num_sms", "get_mk_alignment"))
        if is_function and not is_setting:
            setattr(module, name, CALLS.wrap(module, name, value))


def one_rank_of_many(module: ModuleType) -> None:
    """Make this process rank 0 of ``$CACHEBUILDER_OBSERVE_RANKS``: each process group is one that does nothing.

    torch's own FakeProcessGroup stands for the other ranks (``torch/testing/_internal/distributed/fake_pg.py``).
    """
    ranks = int(os.environ["CACHEBUILDER_OBSERVE_RANKS"])
    init, new_group = module.init_process_group, module.new_group

    def init_process_group(*args: Any, **kwargs: Any) -> None:
        from torch.testing._internal.distributed.fake_pg import FakeStore

        init(backend="fake", rank=0, world_size=ranks, store=FakeStore())

    def new_fake_group(ranks: Any = None, *args: Any, **kwargs: Any) -> Any:
        return new_group(ranks, backend="fake")

    module.init_process_group, module.new_group = init_process_group, new_fake_group  # type: ignore[attr-defined]


def all_ranks_on_this_machine(module: ModuleType) -> None:
    """Answer for all ranks: vLLM asks each where it runs (``vllm/distributed/parallel_state.py``, 0.25.0)."""
    ranks = int(os.environ["CACHEBUILDER_OBSERVE_RANKS"])
    module.in_the_same_node_as = lambda group, source_rank=0: [True] * ranks  # type: ignore[attr-defined]


def no_message_queue(module: ModuleType) -> None:
    """Make no queue in shared memory: it would wait for a reader in each rank (vLLM 0.25.0 ``shm_broadcast.py``)."""
    module.MessageQueue.create_from_process_group = staticmethod(lambda *args, **kwargs: None)


def note_settings(module: ModuleType) -> None:
    """Write down vLLM's configuration as it resolved it, each time it makes one."""
    resolve = module.VllmConfig.__post_init__

    def resolve_and_note(self: Any) -> None:
        resolve(self)
        scheduler, model = self.scheduler_config, self.model_config
        note(
            {
                "max_num_batched_tokens": scheduler.max_num_batched_tokens,
                "max_num_seqs": scheduler.max_num_seqs,
                "max_model_len": model.max_model_len if model else None,
            }
        )

    module.VllmConfig.__post_init__ = resolve_and_note


def note_context_chunk(module: ModuleType) -> None:
    """Write down how many cached tokens vLLM's MLA takes up at once, when it computes that."""
    builder = getattr(module, "MLACommonMetadataBuilder", None)
    compute = getattr(builder, "determine_chunked_prefill_workspace_size", None)
    if builder is None or compute is None:
        return

    def compute_and_note(*args: Any, **kwargs: Any) -> Any:
        tokens = compute(*args, **kwargs)
        note({"context_chunk": int(tokens)})
        return tokens

    builder.determine_chunked_prefill_workspace_size = staticmethod(compute_and_note)


def note(facts: dict[str, Any]) -> None:
    """Add facts about the engine to this process's file of them."""
    with open(os.path.join(FOLDER, f"facts-{os.getpid()}.jsonl"), "a") as file:
        file.write(json.dumps(facts) + "\n")


#: A module → what is done to it after its import.
AFTER_IMPORT = dict.fromkeys(COPIES, wrap_functions) | {
    "vllm.config.vllm": note_settings,
    "vllm.model_executor.layers.attention.mla_attention": note_context_chunk,
}
if os.environ.get("CACHEBUILDER_OBSERVE_RANKS"):
    AFTER_IMPORT |= {
        "torch.distributed.distributed_c10d": one_rank_of_many,
        "vllm.distributed.parallel_state": all_ranks_on_this_machine,
        "vllm.distributed.device_communicators.shm_broadcast": no_message_queue,
    }


class AfterImport(importlib.abc.MetaPathFinder):
    """Does to each module of `AFTER_IMPORT` what is to be done, as soon as the module has been imported."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        """The spec that the other finders have, with a loader that does it afterwards."""
        if name not in AFTER_IMPORT:
            return None
        for finder in sys.meta_path:
            spec = finder.find_spec(name, path, target) if finder is not self else None
            if spec is not None and spec.loader is not None:
                load = spec.loader.exec_module

                def exec_module(module: ModuleType, load: Any = load) -> None:
                    load(module)
                    AFTER_IMPORT[name](module)

                spec.loader.exec_module = exec_module  # type: ignore[method-assign]
                return spec
        return None


def run_the_next_sitecustomize() -> None:
    """Run the module of this name that this one hides, as Python would have done without this one."""
    own = os.path.dirname(os.path.abspath(__file__))
    others = [folder for folder in sys.path if os.path.abspath(folder) != own]
    spec = importlib.machinery.PathFinder.find_spec(__name__, others)
    if spec is not None and spec.loader is not None:
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


if FOLDER:
    sys.meta_path.insert(0, AfterImport())
run_the_next_sitecustomize()
