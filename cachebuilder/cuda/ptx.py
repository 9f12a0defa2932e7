"""PTX text: take one module apart into one canonical module for each of its kernels.

Kernels that were compiled in one translation unit come out as one PTX text: a header, declarations, and one ``.entry``
for each kernel. Each entry with the declarations it uses is a module of its own, and ptxas makes the same code of it as
of the kernel compiled alone. What the front end numbers through the whole module (labels, strings, local memory) or
derives from the working folder (hashes in internal names) is renamed: the text, and with it the cubin, then does not
depend on which kernels shared the unit. One thing cannot be told from a unit's text: in which order a kernel's own
strings would stand alone; `KernelPtx.strings` lets the caller see where that matters.

PTX ISA 9.0, chapters 4 and 5, is the grammar's source.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from cachebuilder.errors import CompileError

_COMMENT = re.compile(r"[ \t]*//[^\n]*")
_HEADER = re.compile(r"\.(version|target|address_size)\b")
_ENTRY = re.compile(r"(?:\.(?:visible|weak)\s+)?\.entry\s+([\w$]+)")
_FUNCTION = re.compile(r"(?:\.(?:visible|weak|extern)\s+)*\.func\s*(?:\([^)]*\)\s*)?([\w$]+)")
_VARIABLE = re.compile(r"([\w$]+)\s*(?:\[\d*\]\s*)*(?:=.*)?;$", re.DOTALL)
_IDENTIFIER = re.compile(r"[A-Za-z_$][\w$]*")

#: An integer or boolean template argument of a mangled name (Itanium C++ ABI, 5.1.6.1 <expr-primary>).
_LITERAL = re.compile(r"L[abchijlmnostwxy](n?\d+)E")

#: nvcc writes a hash of the source's absolute path and one of its contents into internal names of ``kernel.cu``.
_MODULE_HASHES = re.compile(r"[0-9a-f]{8}_9_kernel_cu_[0-9a-f]{8}")
#: Names that NVVM numbers through the module: strings, unnamed globals, local memory, prototypes; labels by function.
_NUMBERED = re.compile(r"(\$str(?:\$\d+)?|__unnamed_\d+|__local_depot\d+|prototype_\d+)(?![\w$])")
_LABEL = re.compile(r"\$L__BB\d+_")


class PtxError(CompileError):
    """The text is not the PTX that this module knows how to take apart."""


@dataclass(frozen=True)
class KernelPtx:
    """One kernel's own module.

    Attributes:
        name: the kernel's mangled name.
        text: the module, canonical.
        strings: contents of the numbered variables it uses, in the order of their declaration.
    """

    name: str
    text: str
    strings: tuple[str, ...]

    @property
    def literals(self) -> tuple[str, ...]:
        """The integer and boolean template arguments in the name, in order; ``n5`` is −5."""
        return tuple(_LITERAL.findall(self.name))


def split(text: str) -> list[KernelPtx]:
    """One canonical module for each kernel in ``text``, in the text's order.

    Raises:
        PtxError: a statement of an unknown form.
    """
    header, items = _statements(_COMMENT.sub("", text))
    entries: list[tuple[str, str]] = []
    declared: dict[str, str] = {}
    for item in items:
        if match := _ENTRY.match(item):
            entries.append((match[1], item))
        elif match := _FUNCTION.match(item) or _VARIABLE.search(item):
            # A function may be declared before it is defined: the two belong together.
            declared[match[1]] = f"{declared[match[1]]}\n{item}" if match[1] in declared else item
        else:
            raise PtxError(f"wanted a declaration or a kernel, found {item[:80]!r}")
    return [_module(name, header, item, declared) for name, item in entries]


def _statements(text: str) -> tuple[str, list[str]]:
    """The header lines, and each statement at module level."""
    header: list[str] = []
    items: list[str] = []
    current: list[str] = []
    depth = 0
    for line in text.splitlines():
        if not current:
            if not line.strip():
                continue
            if _HEADER.match(line):
                header.append(line.rstrip())
                continue
        current.append(line.rstrip())
        if "{" in line or "}" in line:
            depth += line.count("{") - line.count("}")
            if depth == 0 and line.rstrip().endswith("}"):
                items.append("\n".join(current))
                current = []
                continue
        if depth == 0 and line.rstrip().endswith(";"):
            items.append("\n".join(current))
            current = []
    if current or depth:
        raise PtxError(f"wanted the end of {current[0][:80] if current else 'a block'!r}, found the end of the text")
    return "\n".join(header), items


def _module(name: str, header: str, entry: str, declared: dict[str, str]) -> KernelPtx:
    """A module of ``entry``, what it uses, and what the headers declare, all in the text's own order.

    ptxas gives each variable a place in the order of declaration, used or not, and the code may name that place: what
    is declared in every unit stays. Numbered ones belong to the kernels that use them.
    """
    used = dict.fromkeys(name for name in declared if not _NUMBERED.fullmatch(name))
    pending = [entry, *(declared[name] for name in used)]
    while pending:
        for found in dict.fromkeys(_IDENTIFIER.findall(pending.pop())):
            if found in declared and found not in used:
                used[found] = None
                pending.append(declared[found])
    order = [found for found in declared if found in used]
    items = [
        _LABEL.sub(f"$L__BB{index}_", item) for index, item in enumerate([*(declared[found] for found in order), entry])
    ]
    names: dict[str, str] = {}
    text = "\n\n".join(items)
    body = _NUMBERED.sub(lambda match: names.setdefault(match[1], f"$canonical_{len(names)}"), text)
    body = _MODULE_HASHES.sub("00000000_9_kernel_cu_00000000", body)
    strings = tuple(declared[found].partition(found)[2] for found in order if _NUMBERED.fullmatch(found))
    return KernelPtx(name, f"{header}\n\n{body}\n", strings)
