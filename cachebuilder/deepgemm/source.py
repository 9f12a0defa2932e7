"""Read from a kernel's source for which op, which shape and how many SMs DeepGEMM generated it.

DeepGEMM writes a kernel as one instantiation of a template, so the template arguments say what the kernel is for. The
positions of the arguments are from ``include/deep_gemm/impls/`` in sgl-deep-gemm 0.1.7 and 0.2.3.post2 and in vLLM
0.33.0's copy. A test reads every kernel in a plan of all ops.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """What a GEMM kernel was generated for.

    Attributes:
        op: the manifest's op that asks for such a kernel; None if no op does.
        n, k: the sizes that are compiled in; None for a size that the kernel takes at run time.
        experts: the number of groups of a grouped op; None for other ops.
    """

    op: str | None
    gemm_type: str
    n: int | None
    k: int | None
    experts: int | None
    sm_count: int


@dataclass(frozen=True)
class _Template:
    """The positions of a template's arguments.

    Attributes:
        dtype: the element type in the op's name.
        shape: the position of SHAPE_M; SHAPE_N and SHAPE_K follow it.
        groups: the position of kNumGroups.
        sm_count: how many positions kNumSMs stands before ``GemmType``.
        plain: distance from ``GemmType`` → the text that the argument there has in the ops that a manifest can name.
    """

    dtype: str
    shape: int
    groups: int
    sm_count: int
    plain: dict[int, str]


#: The semicolon is FlashInfer's.
_INSTANTIATION = re.compile(r"&\s*(\w+)\s*<(.*)>\s*[);]", re.DOTALL)

_E4M3 = "cutlass::float_e4m3_t"
_TEMPLATES = {
    "sm90_fp8_gemm_1d2d_impl": _Template("fp8", 1, 4, 1, {}),
    "sm90_bf16_gemm_impl": _Template("bf16", 2, 5, 1, {1: "false"}),
    "sm100_fp8_fp4_gemm_1d1d_impl": _Template("fp8", 5, 11, 3, {1: "false", 2: _E4M3, 3: _E4M3}),
    "sm100_bf16_gemm_impl": _Template("bf16", 2, 8, 4, {1: "false"}),
    # After the epilogue come three flags of FP4, and whether B is K-major.
    "sm120_fp8_fp4_gemm_1d1d_impl": _Template(
        "fp8", 0, 5, 1, {1: "false", 4: "false", 5: "false", 6: "false", 7: "true"}
    ),
    "sm120_bf16_gemm_impl": _Template("bf16", 0, 3, 1, {1: "false", 4: "true"}),
}

_OPS = {
    "Normal": "{}_gemm_nt",
    "MGroupedContiguous": "m_grouped_{}_gemm_nt_contiguous",
    "MGroupedMasked": "m_grouped_{}_gemm_nt_masked",
}


def kernel_template(source: str) -> str | None:
    """The name of the template that ``source`` instantiates (``sm90_fp8_gemm_1d2d_impl``); None if there is none."""
    match = re.search(r"&\s*(\w+)\s*<", source)
    return match[1] if match else None


def instantiated(source: str) -> tuple[str | None, tuple[str, ...]]:
    """The name of the template that ``source`` instantiates, and all its arguments; (None, ()) if there is none."""
    match = _INSTANTIATION.search(source)
    return (match[1], tuple(_split(match[2]))) if match else (None, ())


#: The one directive in what DeepGEMM writes. In angle brackets, a relative name leads only to DeepGEMM's headers, the
#: toolkit's and the system's.
_HEADER = re.compile(r"[ \t]*#[ \t]*include[ \t]*<(?!.*\.\./)[A-Za-z0-9_][A-Za-z0-9_+./-]*>[ \t]*")
#: What is a directive or reads a file in another spelling: digraphs, trigraphs, joined lines, inline assembly.
_OTHER_SPELLING = re.compile(r"%:|\?\?|\\[ \t]*$|\b_*asm_*\b|\b_Pragma\b")


def foreign_text(source: str) -> str | None:
    """What a source has that DeepGEMM never writes and that could read a file; None if it has nothing of the kind.

    A compiler prints lines of the files that it reads, so a source that includes a private file would publish it.
    """
    for number, line in enumerate(source.split("\n"), 1):
        if not line.replace("\t", "").isprintable():
            return f"line {number}: wanted printable text, found {line[:80]!r}"
        if "#" in line and not _HEADER.fullmatch(line):
            return f"line {number}: wanted no directive but #include <…> with a relative name, found {line[:80]!r}"
        if _OTHER_SPELLING.search(line):
            return f"line {number}: wanted no assembly, digraph, trigraph or joined line, found {line[:80]!r}"
    return None


def includes(source: str) -> list[str]:
    """The headers that ``source`` includes, in order."""
    return re.findall(r"^\s*#\s*include\s*[<\"]([^>\"]+)", source, re.MULTILINE)


def is_deep_gemms(source: str) -> bool:
    """Whether DeepGEMM may have written ``source``: each of its sources includes one of its own headers."""
    return any(name.startswith("deep_gemm/") for name in includes(source))


def family(source: str) -> tuple[str | None, str | None]:
    """The template that ``source`` instantiates and its GemmType, if any: DeepGEMM names a kernel by these two."""
    gemm_type = re.search(r"\bGemmType::(\w+)", source)
    return kernel_template(source), gemm_type[1] if gemm_type else None


def read_shape(source: str) -> Shape | None:
    """What ``source`` was generated for; None if it is not a GEMM with a known template."""
    name, arguments = instantiated(source)
    template = _TEMPLATES.get(name or "")
    positions = [position for position, argument in enumerate(arguments) if argument.startswith("GemmType::")]
    if template is None or not positions:
        return None
    gemm_position = positions[0]
    try:
        n, k = int(arguments[template.shape + 1]), int(arguments[template.shape + 2])
        groups, sm_count = int(arguments[template.groups]), int(arguments[gemm_position - template.sm_count])
    except (ValueError, IndexError):  # a DeepGEMM with another order of the arguments
        return None
    gemm_type = arguments[gemm_position].removeprefix("GemmType::")
    op = None
    if gemm_type in _OPS and _is_plain(arguments, gemm_position, template):
        op = _OPS[gemm_type].format(template.dtype)
    experts = None if gemm_type == "Normal" else groups
    return Shape(op, gemm_type, n or None, k or None, experts, sm_count)


def _is_plain(arguments: Sequence[str], gemm_position: int, template: _Template) -> bool:
    """Whether the kernel is D = A · Bᵀ: both operands K-major and of the op's types, no accumulation, no epilogue."""
    for distance, text in template.plain.items():
        position = gemm_position + distance
        if position < len(arguments) and arguments[position] != text:
            return False
    for argument in arguments:
        if argument.startswith("cute::UMMA::Major::") and argument != "cute::UMMA::Major::K":
            return False
        if "::Epilogue" in argument and not argument.endswith("::EpilogueIdentity"):
            return False
    return True


def _split(text: str) -> list[str]:
    """Split template arguments at the commas that are not inside brackets."""
    arguments, depth, current = [], 0, ""
    for character in text:
        depth += {"<": 1, "(": 1, ">": -1, ")": -1}.get(character, 0)
        if character == "," and depth == 0:
            arguments.append(current.strip())
            current = ""
        else:
            current += character
    return [*arguments, current.strip()]
