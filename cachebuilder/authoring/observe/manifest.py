"""The manifest of an observed engine: each op, and above it what asked for it, how often and with which M."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cachebuilder.authoring.flashinfer_text import flashinfer_lines
from cachebuilder.authoring.observe.calls import Facts, Observed, SeenOp
from cachebuilder.common.version import __version__
from cachebuilder.cuda.gpus import Gpu
from cachebuilder.flashinfer.schema import FlashInferNeeds
from cachebuilder.ops.catalog import OPS

_WIDTH = 120
#: A comment shows this many of the modules and of the places that called.
_MOST_MODULES, _MOST_PLACES = 4, 2


@dataclass(frozen=True)
class About:
    """What the manifest's head says.

    Attributes:
        name: the manifest's.
        command: the user's, in one line.
        requests: how many were sent.
        flashinfer: what the engine takes from FlashInfer, where the manifest is to have that.
    """

    gpu: Gpu
    name: str
    command: str
    requests: int
    flashinfer: FlashInferNeeds | None = None


def manifest_text(observed: Observed, about: About, environment: Mapping[str, str]) -> str:
    """The manifest as text, without sources; ``environment`` is DeepGEMM's variables that change kernels."""
    facts = observed.facts
    bounds = ", ".join(f"{key} {value}" for key, value in facts if isinstance(value, int)) or "none seen"
    lines = [
        *_comment(f"What {about.command} asked DeepGEMM for on a virtual {about.gpu.name}."),
        *_comment(f"Observed by cachebuilder {__version__}: {observed.calls} calls, {about.requests} requests."),
        *_comment(f"The engine's bounds: {bounds}."),
        f"name: {about.name}",
        f"target: {{gpu: {about.gpu.name}}}",
    ]
    if environment:
        lines += ["environment:", *(f"  {key}: {json.dumps(value)}" for key, value in environment.items())]
    lines.append("ops:")
    for op in observed.ops:
        for text in _about(op, facts):
            lines += ["  " + line for line in _comment(text, width=_WIDTH - 2)]
        lines.append(f"  - {_flow(_fields(op, facts, about.gpu))}")
    if about.flashinfer:
        lines += flashinfer_lines(about.flashinfer)
    return "\n".join(lines) + "\n"


def bound(op: SeenOp, facts: Facts) -> tuple[int, str] | None:
    """How far an op's variable is swept, and where that number is from; None for an op without a maximum.

    It is the engine's own bound, and never below the largest value that was seen.
    """
    if len(op.buffers) > 1:  # a buffer as large as the step needs it
        largest = max(op.buffers)
        if (facts.max_num_batched_tokens or 0) > largest:
            return facts.max_num_batched_tokens or 0, "max_num_batched_tokens"
        return largest, "the largest buffer seen"
    if op.maximum is None:
        return None
    if size := op.fields.get(OPS[op.name].maximum or ""):
        return size, "the engine's buffer"
    largest, why = op.maximum, "the largest seen"
    bounds = {
        "max_tokens": [("max_num_batched_tokens", facts.max_num_batched_tokens)],
        "max_batch": [("max_num_seqs", facts.max_num_seqs)],
    }.get(OPS[op.name].maximum or "", [])
    # A layer that sees more than the tokens of a step takes up cached context as well.
    is_layer = OPS[op.name].maximum == "max_tokens"
    if op.takes_context or (is_layer and largest > (facts.max_num_batched_tokens or largest)):
        bounds = [*bounds, ("the chunk of cached context", facts.context_chunk)]
    for name, value in bounds:
        if value is not None and value >= largest:
            largest, why = value, name
    return largest, why


def _fields(op: SeenOp, facts: Facts, gpu: Gpu) -> dict[str, Any]:
    fields = {"op": op.name, **op.fields}
    maximum = OPS[op.name].maximum
    if "rows" in op.fields:
        fields["max_tokens"] = op.fields["rows"]
    elif op.buffers and (limit := bound(op, facts)):
        fields["max_m"] = limit[0]
    elif maximum and (limit := bound(op, facts)):
        fields[maximum] = limit[0]
    # An engine that asks may take another one at another M; on SM90, DeepGEMM has one answer.
    if len(op.alignments) > 1 or (op.alignments and facts.asks_alignment and gpu.major > 9):
        fields["alignment"] = "per-call"
    sm_counts = sorted(count for count in op.sm_counts if count)
    if sm_counts and sm_counts != [gpu.sm_count]:
        fields["sm_counts"] = sm_counts
    return fields


def _about(op: SeenOp, facts: Facts) -> list[str]:
    modules = _first(sorted(op.modules), _MOST_MODULES)
    texts = [f"{modules or 'no module is known'}: {op.calls} calls"]
    if limit := bound(op, facts):
        variable, values = ("max_m", op.buffers) if op.buffers else (OPS[op.name].variable, op.values)
        texts[0] += f", {len(values)} values of {variable} up to {max(values)}; swept to {limit[0]}: {limit[1]}"
    # The first place is the engine's own function around DeepGEMM's, the same for every op.
    texts.append(_first(sorted(op.places), _MOST_PLACES))
    return [text for text in texts if text]


def _first(items: Sequence[str], most: int) -> str:
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(items[:most]) + more


def _flow(fields: dict[str, Any]) -> str:
    return "{" + ", ".join(f"{key}: {_text(value)}" for key, value in fields.items()) + "}"


def _text(value: Any) -> str:
    """``value`` in YAML; JSON is YAML, but names read better without quotes."""
    is_name = isinstance(value, str) and re.fullmatch(r"[A-Za-z][\w-]*", value)
    return value if is_name else json.dumps(value)


def _comment(text: str, width: int = _WIDTH) -> list[str]:
    printable = "".join(character if character.isprintable() else "?" for character in text)
    return textwrap.wrap(printable, width, initial_indent="# ", subsequent_indent="#   ", break_on_hyphens=False)
