"""Names and meanings of a kernel's template arguments.

A kernel's source holds the arguments. The parameters' names are in DeepGEMM's headers, which no artifact carries.
``templates.json`` holds them for several copies of DeepGEMM: for each template, every way in which a copy declares it.
`tools/templates.py` writes that file, and a test compares it with the installed headers.
"""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path

from cachebuilder.common.records import Record
from cachebuilder.deepgemm.source import instantiated

_TABLE = Path(__file__).with_name("templates.json")

#: What a parameter means, by its name in the headers without the leading ``k`` and the trailing ``_``.
_WORDS = {
    "BLOCK_M": "rows of the output that one thread block computes",
    "BLOCK_N": "columns of the output that one thread block computes",
    "BLOCK_K": "depth (K) that one pipeline stage holds",
    "SHAPE_M": "M; 0: given at run time",
    "SHAPE_N": "N; 0: given at run time",
    "SHAPE_K": "K; 0: given at run time",
    "NumGroups": "groups: experts, or matrices of a batch",
    "NumStages": "pipeline stages in shared memory",
    "NumTMAStoreStages": "pipeline stages of the output's store",
    "NumMulticast": "thread blocks in a cluster that share loads",
    "NumTMAMulticast": "thread blocks in a cluster that share loads",
    "IsMulticastOnA": "true: the shared loads are A's, false: B's",
    "IsTMAMulticastOnA": "true: the shared loads are A's, false: B's",
    "NumSMs": "SMs that the kernel runs on",
    "NumTMAThreads": "threads that load by TMA",
    "NumMathThreads": "threads that compute",
    "NumNonEpilogueThreads": "threads that load and issue the products",
    "NumEpilogueThreads": "threads that write the output",
    "NumThreads": "threads of a block",
    "GemmType": "plain, grouped contiguous or grouped masked",
    "SwizzleAMode": "A's swizzle in shared memory, bytes; 0: none",
    "SwizzleBMode": "B's swizzle in shared memory, bytes; 0: none",
    "SwizzleDMode": "the output's swizzle, bytes; 0: none",
    "SwizzleCDMode": "the output's swizzle, bytes; 0: none",
    "MajorA": "the contiguous dimension of A",
    "MajorB": "the contiguous dimension of B",
    "MajorSFB": "the contiguous dimension of B's scales",
    "GranKA": "columns of K that one scale of A covers",
    "GranKB": "columns of K that one scale of B covers",
    "WithAccumulation": "true: adds to what the output holds",
    "cd_dtype_t": "the output's type",
    "logits_dtype_t": "the logits' type",
    "epilogue_op_t": "what is done to the output before it is stored",
    "SF_GRAN": "columns of K that one scale covers",
    "epilogue_type_t": "what is done to the output before it is stored",
    "SplitFactor": "blocks of depth (BLOCK_K) that one thread block adds up",
    "NumSplits": "parts that K is split into",
    "BLOCK_MN": "rows of the scales that one thread block transposes",
    "SF_K": "scales of one row",
    "BLOCK_SF_K": "scales of one row that one thread block transposes",
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

#: What a report shows of a kernel, and the parameters that may hold it: ``block`` takes all, the others the first.
HIGHLIGHTS = {
    "block": ("BLOCK_M", "BLOCK_N", "BLOCK_K"),
    "stages": ("NumStages", "NumKVStages"),
    "cluster": ("NumTMAMulticast", "NumMulticast"),
}


class Parameter(Record):
    """One template parameter and its argument.

    Attributes:
        name: as in the headers; None where the table does not know it.
        value: the argument.
        words: what the parameter means; None where `_WORDS` has no entry.
    """

    name: str | None
    value: str
    words: str | None

    @property
    def plain_name(self) -> str | None:
        """The name without the leading ``k`` and the trailing ``_``."""
        return _plain(self.name) if self.name else None


def parameters(source: str) -> tuple[Parameter, ...]:
    """The template arguments of the kernel that ``source`` instantiates; none where it instantiates none.

    Two copies may declare a template with arguments of the same number and kinds and with other names. The parameters
    that differ then have no name.
    """
    template, arguments = instantiated(source)
    declarations = [declared for declared in _table().get(template or "", ()) if _fits(declared, arguments)]
    named = []
    for index, value in enumerate(arguments):
        names = {_name(declared[index]) for declared in declarations}
        name = names.pop() if len(names) == 1 else None
        named.append(Parameter(name=name, value=value, words=_WORDS.get(_plain(name)) if name else None))
    return tuple(named)


def highlights(of: tuple[Parameter, ...]) -> dict[str, str]:
    """Block sizes (``128×96×128``), stages and cluster, as far as these parameters have them."""
    values = {parameter.plain_name: parameter.value for parameter in of if parameter.name}
    shown = {}
    for title, names in HIGHLIGHTS.items():
        present = [values[name] for name in names if name in values]
        if present:
            shown[title] = "×".join(present) if title == "block" else present[0]
    return shown


@functools.cache
def _table() -> dict[str, list[list[str]]]:
    return dict(json.loads(_TABLE.read_text()))


def _name(declared: str) -> str:
    return declared.rsplit(" ", 1)[1].rstrip("?")


def _plain(name: str) -> str:
    return re.sub(r"^k(?=[A-Z])", "", name).rstrip("_") if not name.endswith("_t") else name


def _fits(declared: list[str], arguments: tuple[str, ...]) -> bool:
    """Whether a template with these parameters takes these arguments: by their number and the kind of each."""
    required = sum(not parameter.endswith("?") for parameter in declared)
    return required <= len(arguments) <= len(declared) and all(
        _kind(argument) == {"bool": "bool", "uint32_t": "number", "int": "number"}.get(parameter.split(" ")[0], "name")
        for parameter, argument in zip(declared, arguments, strict=False)
    )


def _kind(argument: str) -> str:
    if argument in ("true", "false"):
        return "bool"
    return "number" if argument.isdigit() else "name"
