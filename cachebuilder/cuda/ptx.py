"""Split a PTX module into one canonical module for each of its kernels.

nvcc compiles the kernels of one translation unit to one PTX text: a header, declarations, and one ``.entry`` for each
kernel. Each entry, together with the declarations it uses, is a module of its own, and ptxas makes the same code of it
as of the kernel compiled alone. Names that the front end numbers through the whole text (labels, strings, local memory)
or derives from the working folder (hashes in internal names) are replaced. The module, and so the cubin, then does not
depend on which kernels shared the unit.

One thing is not visible in a unit's text: the order in which a kernel compiled alone would declare its strings.
`KernelPtx.strings` lets the caller see where that matters.

The grammar follows PTX ISA 9.0, chapters 4 and 5.
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

#: nvcc writes two hashes into internal names: of the absolute path of ``kernel.cu``, and of its contents.
_MODULE_HASHES = re.compile(r"[0-9a-f]{8}_9_kernel_cu_[0-9a-f]{8}")
#: Names that NVVM numbers through the whole module: strings, unnamed globals, local memory, prototypes.
_NUMBERED = re.compile(r"(\$str(?:\$\d+)?|__unnamed_\d+|__local_depot\d+|prototype_\d+)(?![\w$])")
#: A label begins with the number of its function in the module.
_LABEL = re.compile(r"\$L__BB\d+_")


class PtxError(CompileError):
    """The text is not PTX of the form that this module can split."""


@dataclass(frozen=True)
class KernelPtx:
    """The module of one kernel.

    Attributes:
        name: the kernel's mangled name.
        text: the canonical module.
        strings: contents of the numbered variables that the kernel uses, in the order of their declaration.
    """

    name: str
    text: str
    strings: tuple[str, ...]

    @property
    def literals(self) -> tuple[str, ...]:
        """The integer and boolean template arguments in the name, in order; ``n5`` is −5."""
        return tuple(_LITERAL.findall(self.name))


def split(text: str) -> list[KernelPtx]:
    """Split ``text`` into one canonical module for each kernel, in the order of the text.

    Raises:
        PtxError: the text holds a statement of an unknown form.
    """
    header, statements = _statements(_COMMENT.sub("", text))
    entries: list[tuple[str, str]] = []
    declarations: dict[str, str] = {}
    for statement in statements:
        if match := _ENTRY.match(statement):
            entries.append((match[1], statement))
        elif match := _FUNCTION.match(statement) or _VARIABLE.search(statement):
            name = match[1]
            if name in declarations:  # a function that is first declared, then defined: both belong to the module
                declarations[name] += f"\n{statement}"
            else:
                declarations[name] = statement
        else:
            raise PtxError(f"wanted a declaration or a kernel, found {statement[:80]!r}")
    return [_module(name, header, entry, declarations) for name, entry in entries]


def _statements(text: str) -> tuple[str, list[str]]:
    """Split ``text`` into its header and its statements at module level."""
    header: list[str] = []
    statements: list[str] = []
    current: list[str] = []
    depth = 0
    for line in text.splitlines():
        if not current:
            if not line.strip():
                continue
            if _HEADER.match(line):
                header.append(line.rstrip())
                continue
        line = line.rstrip()
        current.append(line)
        depth += line.count("{") - line.count("}")
        if depth == 0 and line.endswith(("}", ";")):
            statements.append("\n".join(current))
            current = []
    if current or depth:
        raise PtxError(f"wanted the end of {current[0][:80] if current else 'a block'!r}, found the end of the text")
    return "\n".join(header), statements


def _module(name: str, header: str, entry: str, declarations: dict[str, str]) -> KernelPtx:
    """The module of ``entry``: the entry, the declarations it uses, and all that every unit declares.

    They stay in the order of the text. ptxas places variables in the order of their declaration, used or not, and the
    code may hold such a place: so a variable that every unit declares stays even if this kernel does not use it. A
    numbered one belongs to the kernels that use it.
    """
    used = {declared for declared in declarations if not _NUMBERED.fullmatch(declared)}
    pending = [entry, *(declarations[declared] for declared in used)]
    while pending:
        for identifier in _IDENTIFIER.findall(pending.pop()):
            if identifier in declarations and identifier not in used:
                used.add(identifier)
                pending.append(declarations[identifier])
    used_in_order = [declared for declared in declarations if declared in used]
    statements = [*(declarations[declared] for declared in used_in_order), entry]
    body = "\n\n".join(_LABEL.sub(f"$L__BB{index}_", statement) for index, statement in enumerate(statements))
    canonical: dict[str, str] = {}
    body = _NUMBERED.sub(lambda match: canonical.setdefault(match[1], f"$canonical_{len(canonical)}"), body)
    body = _MODULE_HASHES.sub("00000000_9_kernel_cu_00000000", body)
    numbered = [declared for declared in used_in_order if _NUMBERED.fullmatch(declared)]
    strings = tuple(declarations[declared].partition(declared)[2] for declared in numbered)
    return KernelPtx(name, f"{header}\n\n{body}\n", strings)
