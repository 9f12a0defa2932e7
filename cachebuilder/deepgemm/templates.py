"""What a kernel's template arguments are called, and what they mean in words.

A source holds the arguments and not the parameters' names; those stand in DeepGEMM's headers, which no artifact
carries. ``templates.json`` holds them for the copies that were looked at, by template, each way in which one of these
declares it; `tools/templates.py` writes it and a test compares it with the installed headers.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cachebuilder.deepgemm.source import instantiated

_TABLE = Path(__file__).with_name("templates.json")

#: Parameters in words, by their name in the headers without ``k`` before it or ``_`` behind it.
_WORDS = {
    "BLOCK_M": "rows of the output that one thread block computes",
    "BLOCK_N": "columns of the output that one thread block computes",
    "BLOCK_K": "depth that one pipeline stage holds",
    "SHAPE_M": "M, 0: given at run time",
    "SHAPE_N": "N, 0: given at run time",
    "SHAPE_K": "K, 0: given at run time",
    "NumGroups": "groups: experts, or matrices of a batch",
    "NumStages": "pipeline stages in shared memory",
    "NumTMAStoreStages": "stages of the output's way out",
    "NumMulticast": "thread blocks in a cluster that share loads",
    "NumTMAMulticast": "thread blocks in a cluster that share loads",
    "IsMulticastOnA": "the shared loads are A's (else B's)",
    "IsTMAMulticastOnA": "the shared loads are A's (else B's)",
    "NumSMs": "SMs that the kernel is spread over",
    "NumTMAThreads": "threads that load by TMA",
    "NumMathThreads": "threads that compute",
    "NumNonEpilogueThreads": "threads that load and issue the products",
    "NumEpilogueThreads": "threads that write the output",
    "NumThreads": "threads of a block",
    "GemmType": "plain, or grouped by experts: in one tensor or masked",
    "SwizzleAMode": "bytes of A's swizzle in shared memory, 0: none",
    "SwizzleBMode": "bytes of B's swizzle in shared memory, 0: none",
    "SwizzleDMode": "bytes of the output's swizzle, 0: none",
    "SwizzleCDMode": "bytes of the output's swizzle, 0: none",
    "MajorA": "which dimension of A lies contiguous",
    "MajorB": "which dimension of B lies contiguous",
    "MajorSFB": "which dimension of B's scales lies contiguous",
    "GranKA": "depth that one scale of A covers",
    "GranKB": "depth that one scale of B covers",
    "WithAccumulation": "adds to what the output holds",
    "cd_dtype_t": "the output's type",
    "logits_dtype_t": "the logits' type",
    "epilogue_op_t": "what is done to the output before it is stored",
    "SF_GRAN": "depth that one scale covers",
    "epilogue_type_t": "what is done to the output before it is stored",
    "SplitFactor": "thread blocks that share one output's depth",
    "NumSplits": "parts that K is split into",
    "BLOCK_MN": "rows of the scales that one thread block turns",
    "SF_K": "scales of one row",
    "BLOCK_SF_K": "scales of one row that one thread block turns",
    "NumHeads": "attention heads",
    "HeadDim": "elements of one head",
    "BLOCK_Q": "query rows of one thread block",
    "BLOCK_KV": "keys of one pipeline stage",
    "SPLIT_KV": "keys of one work item",
    "PAGE_KV": "keys of one page of the cache",
    "NumQStages": "pipeline stages of queries",
    "NumKVStages": "pipeline stages of keys",
    "NextN": "query tokens of one request",
    "NumExperts": "experts",
    "NumTopk": "experts of one token",
    "Hidden": "the model's hidden size",
    "IntermediateHidden": "an expert's hidden size",
}

#: What a report shows of a kernel, and the parameters that hold it in one kernel or another, the first that is there.
HIGHLIGHTS = {
    "block": ("BLOCK_M", "BLOCK_N", "BLOCK_K"),
    "stages": ("NumStages", "NumKVStages"),
    "cluster": ("NumTMAMulticast", "NumMulticast"),
}


@dataclass(frozen=True)
class Parameter:
    """One argument; ``name`` as in the headers, None where they are of a copy that the table does not know."""

    name: str | None
    value: str

    @property
    def plain_name(self) -> str | None:
        """The name without ``k`` before it or ``_`` behind it."""
        return _plain(self.name) if self.name else None

    @property
    def words(self) -> str | None:
        """What it means; None where nobody wrote that down."""
        return _WORDS.get(self.plain_name or "")


def parameters(source: str) -> tuple[Parameter, ...]:
    """The template arguments of the kernel that ``source`` instantiates; none where it instantiates none.

    Where two copies declare a template with arguments of the same number and kinds but in other words, those that
    differ have no name.
    """
    template, arguments = instantiated(source)
    fitting = [declared for declared in _table().get(template or "", ()) if _fits(declared, arguments)]
    names = [[_name(parameter) for parameter in declared] for declared in fitting]
    return tuple(
        Parameter(possible.pop() if len(possible := {known[index] for known in names}) == 1 else None, value)
        for index, value in enumerate(arguments)
    )


def highlights(found: tuple[Parameter, ...]) -> dict[str, str]:
    """Block sizes (``128×96×128``), stages and cluster of these arguments, as far as they have them."""
    values = {parameter.plain_name: parameter.value for parameter in found if parameter.name}
    shown = {}
    for title, wanted in HIGHLIGHTS.items():
        present = [values[name] for name in wanted if name in values]
        if present:
            shown[title] = "×".join(present) if title == "block" else present[0]
    return shown


def declared_templates(include: Path) -> dict[str, list[str]]:
    """Every kernel template in the headers below ``include``: its parameters, each as its type, its name, and a ``?``
    where it has a default.
    """
    found = {}
    for header in sorted(include.rglob("*.cuh")):
        text = re.sub(r"//[^\n]*|/\*.*?\*/", "", header.read_text(errors="replace"), flags=re.DOTALL)
        for start in re.finditer(r"\btemplate\s*<", text):
            end = _closing(text, start.end())
            signature = text[end + 1 : _first(text, "{;", end)]
            if not re.search(r"\bCUTLASS_GLOBAL\b|\b__global__\b", signature):
                continue
            name = re.search(r"\b(?!__)(\w+)\s*\(", _without_attributes(signature))
            if name:
                found[name[1]] = [_declaration(part) for part in _parts(text[start.end() : end])]
    return found


@functools.cache
def _table() -> dict[str, list[list[str]]]:
    return dict(json.loads(_TABLE.read_text()))


def _name(declared: str) -> str:
    return declared.rsplit(" ", 1)[1].rstrip("?")


def _plain(name: str) -> str:
    return re.sub(r"^k(?=[A-Z])", "", name).rstrip("_") if not name.endswith("_t") else name


def _fits(declared: list[str], arguments: tuple[str, ...]) -> bool:
    """Whether these arguments can be given to a template so declared: the number, and the kind of each."""
    required = sum(not parameter.endswith("?") for parameter in declared)
    return required <= len(arguments) <= len(declared) and all(
        _kind(argument) == {"bool": "bool", "uint32_t": "number", "int": "number"}.get(parameter.split(" ")[0], "name")
        for parameter, argument in zip(declared, arguments, strict=False)
    )


def _kind(argument: str) -> str:
    if argument in ("true", "false"):
        return "bool"
    return "number" if argument.isdigit() else "name"


def _declaration(text: str) -> str:
    declared, _, default = (" ".join(text.split())).partition("=")
    return declared.strip() + ("?" if default else "")


def _parts(text: str) -> Iterator[str]:
    """Split at the commas that stand in no brackets."""
    start = 0
    for index, depth in _depths(text, 0):
        if text[index] == "," and depth == 0:
            yield text[start:index]
            start = index + 1
    yield text[start:]


def _closing(text: str, start: int) -> int:
    """Where the bracket that was opened just before ``start`` is closed."""
    return next((index for index, depth in _depths(text, start) if depth < 0), len(text))


def _depths(text: str, start: int) -> Iterator[tuple[int, int]]:
    """Each place from ``start`` on, and the brackets that are open behind it; ``<`` in parentheses may be "less"."""
    angles = rounds = 0
    for index in range(start, len(text)):
        rounds += {"(": 1, ")": -1}.get(text[index], 0)
        if rounds == 0:
            angles += {"<": 1, ">": -1}.get(text[index], 0)
        yield index, angles + rounds


def _first(text: str, characters: str, start: int) -> int:
    return min((place for character in characters if (place := text.find(character, start)) >= 0), default=len(text))


def _without_attributes(signature: str) -> str:
    """Without ``__launch_bounds__(…)``, whose arguments may hold brackets of their own."""
    while match := re.search(r"\b__\w+__\s*\(", signature):
        signature = signature[: match.start()] + signature[_closing(signature, match.end()) + 1 :]
    return signature
