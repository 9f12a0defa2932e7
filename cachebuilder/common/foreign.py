"""What other programs print, for a person: without the stack traces of C++ that DeepGEMM and torch add to it."""

from __future__ import annotations

import re

#: The line above a trace: DeepJIT's (deep_jit/utils/exception.hpp), and torch's two (c10/util/Backtrace.cpp,
#: torch/csrc/profiler/combined_traceback.cpp).
_HEAD = re.compile(r"C\+\+ trace \(most recent call first\):|C\+\+ CapturedTraceback:")
#: The same at the end of a line of text: torch's ``Exception raised from f at file:1 (most recent call first):``.
_TORCH_HEAD = re.compile(r"\s*Exception raised from .* \(most recent call first\):$")
#: One call of a trace: ``  #0 /lib/x.so+0x1 f at f.cpp:1`` or ``frame #0: f + 0x1 (0x7f in /lib/x.so)``.
_CALL = re.compile(r"\s*(frame )?#\d+:? ")


def without_traces(text: str) -> str:
    """``text`` without the C++ traces in it, and without empty lines at its end."""
    lines = (_TORCH_HEAD.sub("", line) for line in text.splitlines() if not _CALL.match(line))
    return "\n".join(line for line in lines if not _HEAD.match(line.strip())).rstrip()
