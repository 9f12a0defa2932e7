"""Import torch fast: its libraries load in a thread, and what no sweep needs is left out."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

#: Nothing else imports this module of torch, which is a quarter of the CPU time of ``import torch`` (2.14). It tells
#: torch the shapes of results without data, for tensors on the "meta" device and for ``torch.compile``. DeepGEMM uses
#: neither.
_LEFT_OUT = "torch._meta_registrations"

_loading: list[threading.Thread] = []


def begin() -> None:
    """Start to load torch's libraries, while this thread imports other modules."""
    gc.disable()  # imports make many objects, and hardly any garbage
    _loading.append(threading.Thread(target=_load_libraries, daemon=True))
    _loading[0].start()


def _load_libraries() -> None:
    """Load the libraries that ``import torch`` loads first. Errors are left to ``import torch``.

    ctypes lets other threads run meanwhile, while ``import`` does not.
    """
    spec = find_spec("torch")
    with contextlib.suppress(OSError):
        for folder in (spec.submodule_search_locations if spec else None) or ():
            ctypes.CDLL(str(Path(folder, "lib", "libtorch_global_deps.so")), mode=ctypes.RTLD_GLOBAL)
            ctypes.CDLL(str(Path(folder, "lib", "libtorch_cuda.so")))


@contextmanager
def without_triton() -> Iterator[None]:
    """Within the context, ``import triton`` fails.

    vLLM's DeepGEMM imports it for kernels of its own for A100, which no op calls, and does without it. It takes
    longer than all else that DeepGEMM imports.
    """
    if "triton" in sys.modules:
        yield
        return
    sys.modules["triton"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules["triton"]


def finish(*, whole: bool) -> ModuleType:
    """Import torch; unless ``whole``, without what no sweep needs. Raises what ``import torch`` raises."""
    if not whole and "torch" not in sys.modules:
        sys.modules[_LEFT_OUT] = ModuleType(_LEFT_OUT)
    import torch

    for thread in _loading:  # a process with one thread can be forked
        thread.join()
    return torch
