"""What the observed processes wrote down, read back and joined: each op with everything that asked for it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from cachebuilder.common.records import Record
from cachebuilder.errors import RecordingError
from cachebuilder.flashinfer.entries import GEMM_FUNCTION
from cachebuilder.ops.catalog import OPS, OpBase
from cachebuilder.ops.seen import Inexpressible, SeenCall, Tensor

#: How the hook marks a call that takes up cached context.
_CONTEXT = {
    "in _compute_prefill_context",
    "in _context_parallel_compute_prefill_context",
    "in _chunked_prefix_attn_mha",
}
#: How the hook marks a call that prepares a weight, and one of the engine's own warm-up.
_LOADING, _WARMUP = "in process_weights_after_loading", "in warmup"


class Facts(Record):
    """What the engine's configuration says, as the engine resolved it; None where it was not seen.

    Attributes:
        max_num_batched_tokens: tokens of one step.
        max_num_seqs: sequences of one step.
        max_model_len: tokens of one sequence.
        context_chunk: cached tokens that MLA takes up at once.
        torch: the folder of the torch that DeepGEMM was imported with.
        asks_alignment: the engine asked DeepGEMM for the alignment of a call's rows.
    """

    max_num_batched_tokens: int | None = None
    max_num_seqs: int | None = None
    max_model_len: int | None = None
    context_chunk: int | None = None
    torch: str | None = None
    asks_alignment: bool = False


@dataclass
class SeenOp:
    """An op, and what asked for it.

    Attributes:
        fields: the op's fields in the manifest, without its maximum.
        maximum: the largest value of its variable that was seen; None for an op without one.
        values: how many different ones were seen.
        calls: how many calls there were.
        modules: the engine's names of the modules that called, with ``#`` for each number.
        places: the lines of the engine that called.
        sm_counts: DeepGEMM's SM counts at the calls.
        alignments: DeepGEMM's alignments of rows at the calls.
        takes_context: a call took up cached context.
        least: the smallest value of its variable outside the engine's own warm-up; None where there was none.
        buffers: the different ``max_m`` that were seen, the rows reserved for each expert; empty for most ops.
    """

    name: str
    fields: dict[str, Any]
    maximum: int | None = None
    values: set[int] = field(default_factory=set)
    calls: int = 0
    modules: set[str] = field(default_factory=set)
    places: set[str] = field(default_factory=set)
    sm_counts: set[int] = field(default_factory=set)
    alignments: set[int] = field(default_factory=set)
    takes_context: bool = False
    least: int | None = None
    buffers: set[int] = field(default_factory=set)


@dataclass(frozen=True)
class Uncalled:
    """Modules with quantised weights that called no GEMM of DeepGEMM in traffic.

    Attributes:
        modules: the engine's names, with ``#`` for each number.
        count: how many modules have them.
        shapes: of one module's weights.
        warmed: the engine's own warm-up called DeepGEMM for one of them.
    """

    modules: str
    count: int
    shapes: tuple[tuple[int, ...], ...]
    warmed: bool


@dataclass(frozen=True)
class Observed:
    """Everything that was written down.

    Attributes:
        ops: in the order in which they were first seen.
        unexpressed: calls that no op expresses: the function and why, and how often.
        uncalled: the model's quantised modules that called nothing.
        copies: the folders of the DeepGEMMs that were called.
        processes: how many processes called.
        flashinfer_modules: what FlashInfer would have compiled, by its names.
        flashinfer_gemms: N and K of each weight that FlashInfer's own DeepGEMM was called with → the largest M.
    """

    ops: tuple[SeenOp, ...]
    unexpressed: Mapping[str, int]
    uncalled: tuple[Uncalled, ...]
    copies: tuple[Path, ...]
    facts: Facts
    processes: int
    flashinfer_modules: tuple[str, ...] = ()
    flashinfer_gemms: Mapping[tuple[int, int], int] = field(default_factory=dict)

    @property
    def calls(self) -> int:
        """How many calls there were."""
        return sum(op.calls for op in self.ops) + sum(self.unexpressed.values())


class _Call(Record):
    """One kind of call, as ``inside/_cachebuilder_calls.py`` writes it."""

    function: str
    copy_folder: str
    args: list[Any]
    kwargs: dict[str, Any]
    sm_count: int | None
    alignment: int | None
    callers: list[str]


def read(folder: Path) -> Observed:
    """Read what is in ``folder``. Raises `RecordingError` where a line is not what a process writes."""
    ops: dict[str, SeenOp] = {}
    unexpressed: dict[str, int] = {}
    copies: dict[Path, None] = {}
    gemms: dict[tuple[int, int], int] = {}
    files = sorted(folder.glob("calls-*.jsonl"))
    functions: dict[str, list[type[OpBase]]] = {}
    for model in OPS.values():
        for name in model.names():
            functions.setdefault(name, []).append(model)
    called: dict[bool, set[str]] = {False: set(), True: set()}  # in the warm-up or not → the modules that called
    for file in files:
        for call, count in _read_file(file):
            if call.function == GEMM_FUNCTION:
                shape, m = _flashinfer_gemm(call)
                gemms[shape] = max(gemms.get(shape, 0), m)
                called[False].update(map(_module, filter(_is_module, call.callers)))
                continue
            copies[Path(call.copy_folder)] = None
            if _LOADING not in call.callers:
                called[_WARMUP in call.callers].update(map(_module, filter(_is_module, call.callers)))
            seen = SeenCall(
                call.function,
                tuple(map(_value, call.args)),
                {name: _value(value) for name, value in call.kwargs.items()},
                call.sm_count or 0,
                call.alignment,
            )
            if why := _add_to_one(ops, functions.get(call.function, []), seen, call, count):
                unexpressed[why] = unexpressed.get(why, 0) + count
    notes = _notes(folder)
    return Observed(
        ops=tuple(ops.values()),
        unexpressed=unexpressed,
        uncalled=_uncalled(notes.modules, called[False], called[True]),
        copies=tuple(copies),
        facts=notes.facts,
        processes=len(files),
        flashinfer_modules=tuple(sorted(notes.flashinfer)),
        flashinfer_gemms=gemms,
    )


def _read_file(file: Path) -> Iterator[tuple[_Call, int]]:
    """Each kind of call of one process, with its count: 1 where the process was killed before it wrote that."""
    calls: list[_Call] = []
    counts: list[int] = []
    for line in file.read_text().splitlines():
        try:
            parsed = json.loads(line)
            if "counts" in parsed:
                counts = parsed["counts"]
            else:
                calls.append(_Call.model_validate(parsed))
        except (ValueError, ValidationError) as error:
            raise RecordingError(f"{file}: wanted a call of DeepGEMM, found {line[:100]!r}: {error}") from None
    counts += [1] * (len(calls) - len(counts))
    return zip(calls, counts, strict=True)


def _value(value: Any) -> Any:
    """A described value: tensors and tuples of them as such."""
    if isinstance(value, list):
        return tuple(map(_value, value))
    if isinstance(value, dict) and "shape" in value:
        return Tensor(tuple(value["shape"]), tuple(value["stride"]), value["dtype"])
    return value


def _add_to_one(ops: dict[str, SeenOp], models: Sequence[type[OpBase]], seen: SeenCall, call: _Call, count: int) -> str:
    """Add a call to the first op that has it; returns why there is none, which the first one knows."""
    why = ""
    for model in models:
        try:
            _add(ops, model, seen, call, count)
        except Inexpressible as error:
            why = why or f"{call.function}: {error}"
        else:
            return ""
    return why or f"{call.function}: no op"


def _add(ops: dict[str, SeenOp], model: type[OpBase], seen: SeenCall, call: _Call, count: int) -> None:
    """Add a call to its op. Raises `Inexpressible`."""
    sighting = model.sighting(seen)
    fields, value = dict(sighting.fields), sighting.value
    if "rows" in model.model_fields and _LOADING in call.callers:
        fields["rows"], value = value, None  # a weight has this one number of rows
    name = model.model_fields["op"].annotation.__args__[0]  # type: ignore[union-attr]
    key = json.dumps([name, {**fields, "max_m": None}], sort_keys=True, default=str)
    op = ops.setdefault(key, SeenOp(name, fields))
    op.calls += count
    if "max_m" in fields:
        op.buffers.add(fields["max_m"])
        op.fields["max_m"] = max(op.buffers)
    if value is not None:
        op.maximum = max(op.maximum or 0, value)
        op.values.add(value)
        if _WARMUP not in call.callers:
            op.least = value if op.least is None else min(op.least, value)
    op.modules.update(_family(_module(place)) for place in call.callers if _is_module(place))
    op.places.update(place for place in call.callers if ".py:" in place)
    op.sm_counts.add(seen.sm_count)
    if "alignment" in model.model_fields and seen.alignment is not None:
        op.alignments.add(seen.alignment)
    op.takes_context |= not _CONTEXT.isdisjoint(call.callers)


def _flashinfer_gemm(call: _Call) -> tuple[tuple[int, int], int]:
    """N and K of a call of FlashInfer's GEMM, and M; its first two arguments are ``input`` and ``weight``."""
    activations, weight = (
        _value(call.kwargs.get(name, call.args[place] if place < len(call.args) else None))
        for place, name in enumerate(("input", "weight"))
    )
    if not isinstance(activations, Tensor) or not isinstance(weight, Tensor):
        raise RecordingError(f"{call.function}: wanted two tensors, input and weight; found {activations}, {weight}")
    n, k = weight.shape
    return (n, k), activations.shape[0]


@dataclass(frozen=True)
class _Notes:
    """What the processes wrote down about the engine: the largest of each fact, and sets of names.

    Attributes:
        modules: the models' quantised modules → their weights' shapes.
        flashinfer: the modules that FlashInfer would have compiled.
    """

    facts: Facts
    modules: Mapping[str, list[list[int]]]
    flashinfer: frozenset[str]


def _notes(folder: Path) -> _Notes:
    facts: dict[str, Any] = {}
    modules: dict[str, list[list[int]]] = {}
    flashinfer: set[str] = set()
    for file in sorted(folder.glob("facts-*.jsonl")):
        for line in file.read_text().splitlines():
            for name, value in json.loads(line).items():
                if name in Facts.model_fields and value is not None:
                    facts[name] = max(facts.get(name, value), value)
                elif name == "modules":
                    modules |= value
                elif name == "flashinfer":
                    flashinfer.update(value)
    return _Notes(Facts(**facts), modules, frozenset(flashinfer))


def _is_module(caller: str) -> bool:
    return caller.startswith("module ")


def _module(caller: str) -> str:
    return caller.removeprefix("module ")


def _family(module: str) -> str:
    """A module's name without its numbers: the same for each layer."""
    return re.sub(r"\d+", "#", module)


def _uncalled(
    modules: Mapping[str, list[list[int]]], in_traffic: set[str], in_warmup: set[str]
) -> tuple[Uncalled, ...]:
    """The modules that did not call in traffic, those of one name and shape together."""
    groups: dict[tuple[str, tuple[tuple[int, ...], ...]], list[str]] = {}
    for name in modules.keys() - in_traffic:
        groups.setdefault((_family(name), tuple(map(tuple, modules[name]))), []).append(name)
    return tuple(
        Uncalled(family, len(names), shapes, not in_warmup.isdisjoint(names))
        for (family, shapes), names in sorted(groups.items())
    )
