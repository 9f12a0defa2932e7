"""Requests to an observed engine, through its own HTTP interface, until each of its call sites has been reached.

The numbers of tokens need not be many: M is swept by the plan. What matters is each kind of step: a prefill, one with
cached context, a decode, a batch of several sequences, a step with prefills and decodes together.
"""

from __future__ import annotations

import itertools
import json
import urllib.error
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from cachebuilder.authoring.observe.calls import Facts
from cachebuilder.authoring.observe.command import Engine, Server
from cachebuilder.errors import RecordingError

#: Seconds that one request may take: Triton compiles kernels at the first of each kind.
_TIMEOUT = 300.0
#: Where an engine takes and gives token numbers, so that it needs no tokenizer: vLLM's ``entrypoints/serve/disagg``,
#: 0.25.0; SGLang's ``srt/entrypoints/http_server.py``, 0.5.23.
_GENERATE: dict[Engine, str] = {"vllm": "/inference/v1/generate", "sglang": "/generate"}


@dataclass(frozen=True)
class Request:
    """A prompt of ``tokens`` tokens, answered with ``answer`` ones; ``sampled``: from the likeliest tokens only."""

    tokens: int
    answer: int
    sampled: bool = False


def requests(facts: Facts) -> list[list[Request]]:
    """Batches of requests, each sent at once when the one before has been answered."""
    longest = (facts.max_model_len or 2048) - 8
    step = facts.max_num_batched_tokens or 2048
    several = min(facts.max_num_seqs or 8, 8)
    batches = [
        [Request(1, 2)],
        # Around the sizes at which an engine may go from one kernel to another.
        *([Request(min(tokens, longest), 1)] for tokens in (15, 16, 31, 32, 63, 64)),
        [Request(min(9, longest), 2, sampled=True)],
        [Request(min(37, longest), 2)],
        # Longer than a step: its second chunk has the first one as cached context.
        [Request(min(step + step // 2, longest), 2)],
        [Request(min(100 + 7 * i, longest), 4) for i in range(several)],
        # Prefills while others decode.
        [Request(min(5, longest), 12)] * 2 + [Request(min(step, longest), 2)],
    ]
    return batches


def is_up(server: Server) -> bool:
    """Whether the engine answers."""
    try:
        with urllib.request.urlopen(f"{server.address}/health", timeout=2):
            return True
    except (OSError, ValueError):
        return False


def send(server: Server, batches: list[list[Request]], progress: Callable[[int, int], None]) -> None:
    """Send all requests.

    Args:
        progress: called with the number of requests answered and of all.

    Raises:
        RecordingError: a request is refused or not answered.
    """
    total = sum(map(len, batches))
    answered = 0
    numbers = itertools.count()
    for batch in batches:
        with ThreadPoolExecutor(len(batch)) as pool:
            for _ in pool.map(lambda request: _send(server, request, next(numbers)), batch):
                answered += 1
                progress(answered, total)


def _send(server: Server, request: Request, number: int) -> None:
    """Send one request. Its ``number`` decides its tokens: what is in the engine's cache would not be computed."""
    tokens = [1 + (7 * number + i) % 1000 for i in range(request.tokens)]
    sampling: dict[str, float] = {"ignore_eos": True}
    if request.sampled:
        sampling |= {"top_k": 20, "top_p": 0.95}
    if server.engine == "vllm":
        body = {"token_ids": tokens, "sampling_params": sampling | {"max_tokens": request.answer, "detokenize": False}}
    else:
        body = {"input_ids": tokens, "sampling_params": sampling | {"max_new_tokens": request.answer}}
    message = urllib.request.Request(
        server.address + _GENERATE[server.engine], json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(message, timeout=_TIMEOUT) as answer:
            answer.read()
    except urllib.error.HTTPError as error:
        text = error.read()[:300].decode(errors="replace")
        raise RecordingError(f"a request of {request.tokens} tokens: the engine answers {error.code}: {text}") from None
    except OSError as error:
        raise RecordingError(f"a request of {request.tokens} tokens: no answer: {error}") from None
