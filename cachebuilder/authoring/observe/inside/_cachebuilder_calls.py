"""Writes down each call of a function of DeepGEMM, in every process of an observed program.

Each new kind of call goes to ``$CACHEBUILDER_OBSERVE/calls-<pid>.jsonl``, one JSON object a line. Nothing is imported
but the standard library.
"""

from __future__ import annotations

import atexit
import json
import os
import sys
import threading
import time
from types import FrameType, ModuleType
from typing import Any

FOLDER = os.environ.get("CACHEBUILDER_OBSERVE", "")
#: Types of quantised weights; Marlin packs 4-bit ones into 32 bits.
QUANTISED = ("torch.float8_e4m3fn", "torch.float4_e2m1fn_x2", "torch.uint8", "torch.int8", "torch.int32")
#: FlashInfer's function that calls its own copy of DeepGEMM.
FLASHINFER_GEMM = "fp8_blockscale_gemm_sm90"
#: What a copy of DeepGEMM binds its functions as: Python's, pybind11's, tvm-ffi's, and since vLLM 0.32.0 also torch's
#: operators as such (``third_party/deep_gemm/_C.py``, ``_bind_guarded_ops``).
FUNCTIONS = ("function", "builtin_function_or_method", "Function", "method", "OpOverloadPacket")
#: The question to DeepGEMM by which engines choose the alignment of a call's rows.
ALIGNMENT = "get_theoretical_mk_alignment_for_contiguous_layout"
#: DeepGEMM's modules of functions in plain torch.
HELPERS = (".utils.math", ".utils.dist", ".testing")
#: How many frames are looked at, and how many of the engine's are written down; the nearest first.
MOST_FRAMES, MOST_PLACES = 40, 6
#: Functions whose calls differ from others. Both engines prepare weights when they are loaded, and take up cached
#: context in chunks: vLLM 0.25.0 ``layers/attention/mla_attention.py``, SGLang 0.5.23
#: ``models/deepseek_common/attention_forward_methods/forward_mha.py``.
MARKS = (
    "process_weights_after_loading",
    "_compute_prefill_context",
    "_context_parallel_compute_prefill_context",
    "_chunked_prefix_attn_mha",
)


class Calls:
    """The kinds of calls that this process made: each is written when it is first seen, counts now and then."""

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._counts: dict[Any, int] = {}  # in the order of the lines that were written
        self._lock = threading.Lock()
        self._inside = threading.local()
        self._written = 0.0
        self._pid = 0
        self._asks_alignment = False

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
        tensors: list[Any] = []
        described = kind(args, tensors), kind(kwargs, tensors)
        if not tensors:  # a setting, or a question
            if name == ALIGNMENT and not self._asks_alignment:
                self._asks_alignment = True
                note({"asks_alignment": True})
            return
        sm_count = _ask(module, "get_num_sms")
        alignment = _ask(module, "get_mk_alignment_for_contiguous_layout")
        caller, weight_of = sys._getframe(2), owner(tensors)
        key = (module.__name__, name, described, sm_count, alignment, weight_of, lines(caller))
        with self._lock:
            if self._pid != os.getpid():  # a fork: its calls go into a file of its own
                self._pid, self._counts = os.getpid(), {}
                self._flush_at_exit()
            if key not in self._counts:
                call = {
                    "function": name,
                    "copy_folder": os.path.dirname(module.__file__ or ""),
                    "args": [describe(value) for value in args],
                    "kwargs": {option: describe(value) for option, value in kwargs.items()},
                    "sm_count": sm_count,
                    "alignment": alignment,
                    "callers": callers(caller, weight_of),
                }
                self._append(json.dumps(call, sort_keys=True))
            self._counts[key] = self._counts.get(key, 0) + 1
        if time.monotonic() - self._written > 5:
            self.flush()

    def _flush_at_exit(self) -> None:
        atexit.register(self.flush)
        if util := sys.modules.get("multiprocessing.util"):  # a forked process leaves without atexit's functions
            util.Finalize(None, self.flush, exitpriority=0)

    def flush(self) -> None:
        """Write how often each kind of call was made so far."""
        with self._lock:
            self._written = time.monotonic()
            if self._pid == os.getpid() and self._counts:
                self._append(json.dumps({"counts": list(self._counts.values())}))

    def _append(self, line: str) -> None:
        path = os.path.join(self._folder, f"calls-{self._pid}.jsonl")
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        try:
            os.write(handle, (line + "\n").encode())
        finally:
            os.close(handle)


def _ask(module: ModuleType, question: str) -> Any:
    function = getattr(module, question, None)
    function = getattr(function, "__wrapped__", function)
    return function() if function else None


def kind(value: Any, tensors: list[Any]) -> Any:
    """What calls of one kind have in common, to be compared: the same as `describe` writes; lists each tensor."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, tuple | list):
        return tuple([kind(one, tensors) for one in value])
    if isinstance(value, dict):
        return tuple([(name, kind(one, tensors)) for name, one in value.items()])
    if is_tensor(value):
        tensors.append(value)
        return tuple(value.shape), value.stride(), value.dtype
    return type(value), id(value)


def is_tensor(value: Any) -> bool:
    """Whether this is a tensor of torch, which this module does not import."""
    return hasattr(value, "shape") and callable(getattr(value, "stride", None))


def describe(value: Any) -> Any:
    """A value as JSON: a tensor by its shape, strides and type."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, tuple | list):
        return [describe(one) for one in value]
    if is_tensor(value):
        return {
            "shape": [int(n) for n in value.shape],
            "stride": [int(n) for n in value.stride()],
            "dtype": str(value.dtype).removeprefix("torch."),
        }
    return describe_object(value)


def describe_object(value: Any) -> dict[str, Any]:
    """What is no tensor: its simple attributes, as those of mega-MoE's buffer, or its text; and the ranks it is for."""
    plain = {
        name: one for name, one in getattr(value, "__dict__", {}).items() if isinstance(one, bool | int | float | str)
    }
    ranks = getattr(getattr(value, "group", None), "size", None)
    return (
        {"object": type(value).__name__}
        | ({"fields": plain} if plain else {"text": str(value)[:200]})
        | ({"ranks": ranks()} if callable(ranks) else {})
    )


def lines(frame: FrameType | None) -> int:
    """A number for the lines of all `MOST_FRAMES` callers: another one for another call site."""
    places = []
    for _ in range(MOST_FRAMES):
        if frame is None:
            break
        places.append((frame.f_code, frame.f_lineno))
        frame = frame.f_back
    return hash(tuple(places))


def callers(frame: FrameType | None, module_of_weight: str | None) -> list[str]:
    """Where a call comes from: the engine's name of the module, the `MARKS` on the way, and the nearest lines."""
    places: list[str] = []
    about = [f"module {module_of_weight}"] if module_of_weight else []
    for _ in range(MOST_FRAMES):
        if frame is None:
            break
        code = frame.f_code
        if len(places) < MOST_PLACES and "/torch/" not in code.co_filename:
            places.append(f"{short(code.co_filename)}:{frame.f_lineno} {code.co_name}")
        if code.co_name in MARKS:
            about.append(f"in {code.co_name}")
        if "warmup" in code.co_filename and "in warmup" not in about:
            about.append("in warmup")
        if not any(text.startswith("module ") for text in about) and (module := _module_of(frame)):
            about.append(f"module {module}")
        frame = frame.f_back
    return about + places


#: Where a module's quantised weight lies → the module's name.
WEIGHTS: dict[int, str] = {}


def owner(tensors: list[Any]) -> str | None:
    """The module that one of these tensors is a weight of."""
    if not WEIGHTS:
        return None
    return next((WEIGHTS[address] for one in tensors if (address := one.data_ptr()) in WEIGHTS), None)


def note_weights(model: Any) -> None:
    """Write down the modules of a loaded model that have weights in 8 or 4 bits, and these weights' shapes."""
    modules: dict[str, list[list[int]]] = {}
    for name, module in model.named_modules():
        for own_name, weight in module.named_parameters(recurse=False):
            is_weight = "weight" in own_name and "scale" not in own_name
            if is_weight and weight.dim() > 1 and str(weight.dtype) in QUANTISED:
                WEIGHTS[weight.data_ptr()] = name
                modules.setdefault(name, []).append(list(weight.shape))
    note({"modules": modules})


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
    """Wrap the public functions of a copy of DeepGEMM, and write down which torch it works with.

    Those of its layouts are in a module of their own as well, which SGLang imports them from.
    """
    note({"torch": os.path.dirname(getattr(sys.modules.get("torch"), "__file__", None) or "")})
    for part in filter(None, (module, sys.modules.get(f"{module.__name__}.utils.layout"))):
        for name, value in list(vars(part).items()):
            is_function = type(value).__name__ in FUNCTIONS
            is_setting = name.startswith(("_", "set_", "get_num_sms", "get_mk_alignment"))
            is_helper = str(getattr(value, "__module__", "")).endswith(HELPERS)
            if is_function and not is_setting and not is_helper:
                setattr(part, name, CALLS.wrap(module, name, value))


def wrap_flashinfer(module: ModuleType) -> None:
    """Wrap FlashInfer's GEMM, which has a DeepGEMM of its own (FlashInfer 0.6.13 ``gemm/gemm_base.py``)."""
    if function := getattr(module, FLASHINFER_GEMM, None):
        setattr(module, FLASHINFER_GEMM, CALLS.wrap(module, FLASHINFER_GEMM, function))


def note(facts: dict[str, Any]) -> None:
    """Add facts about the engine to this process's file of them."""
    with open(os.path.join(FOLDER, f"facts-{os.getpid()}.jsonl"), "a") as file:
        file.write(json.dumps(facts) + "\n")
