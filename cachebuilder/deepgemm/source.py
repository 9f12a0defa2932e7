"""Read a kernel's source backwards: which op, which shape and how many SMs it was generated for.

DeepGEMM writes a kernel as one instantiation of a template, so the arguments say what it is for. Where each argument
stands is from ``include/deep_gemm/impls/`` in sgl-deep-gemm 0.1.7 and 0.2.3.post2 and in vLLM 0.33.0's copy; a test
reads every kernel that a plan of all ops asks for.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """What a GEMM kernel's source says.

    Attributes:
        op: the manifest's op that asks for it; None where no op does.
        n, k: where compiled in; None where the kernel takes them at run time.
        experts: groups, of a grouped op.
    """

    op: str | None
    gemm_type: str
    n: int | None
    k: int | None
    experts: int | None
    sm_count: int


@dataclass(frozen=True)
class _Template:
    """Where a template's arguments stand; those after ``GemmType`` and the SM count are counted from it.

    Attributes:
        shape: SHAPE_M; SHAPE_N and SHAPE_K follow.
        groups: kNumGroups.
        sm_count: how far kNumSMs stands before the GemmType.
        plain: arguments, by their distance from the GemmType, that must read so for the ops that a manifest can name.
    """

    dtype: str
    shape: int
    groups: int
    sm_count: int
    plain: dict[int, str]


_INSTANTIATION = re.compile(r"&\s*(\w+)\s*<(.*)>\s*\)", re.DOTALL)

_E4M3 = "cutlass::float_e4m3_t"
_TEMPLATES = {
    "sm90_fp8_gemm_1d2d_impl": _Template("fp8", 1, 4, 1, {}),
    "sm90_bf16_gemm_impl": _Template("bf16", 2, 5, 1, {1: "false"}),
    "sm100_fp8_fp4_gemm_1d1d_impl": _Template("fp8", 5, 11, 3, {1: "false", 2: _E4M3, 3: _E4M3}),
    "sm100_bf16_gemm_impl": _Template("bf16", 2, 8, 4, {1: "false"}),
    # After the epilogue: three flags of FP4, and whether B is K-major.
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
    """The template's name, as ``sm90_fp8_gemm_1d2d_impl``; None where the source instantiates none."""
    match = re.search(r"&\s*(\w+)\s*<", source)
    return match[1] if match else None


def instantiated(source: str) -> tuple[str | None, tuple[str, ...]]:
    """The template that ``source`` instantiates and all its arguments; None and none where it instantiates none."""
    match = _INSTANTIATION.search(source)
    return (match[1], tuple(_split(match[2]))) if match else (None, ())


def includes(source: str) -> list[str]:
    """The headers that ``source`` includes, in their order."""
    return re.findall(r"^\s*#\s*include\s*[<\"]([^>\"]+)", source, re.MULTILINE)


def family(source: str) -> tuple[str | None, str | None]:
    """The template that ``source`` instantiates and its GemmType, where it has one: what DeepGEMM names a kernel by."""
    gemm_type = re.search(r"\bGemmType::(\w+)", source)
    return kernel_template(source), gemm_type[1] if gemm_type else None


def read_shape(source: str) -> Shape | None:
    """What ``source`` was generated for; None where it is not a GEMM whose template is known."""
    name, found = instantiated(source)
    template, arguments = _TEMPLATES.get(name or ""), list(found)
    if template is None:
        return None
    at = next((i for i, argument in enumerate(arguments) if argument.startswith("GemmType::")), None)
    try:
        if at is None:
            return None
        n, k = (int(arguments[template.shape + i]) or None for i in (1, 2))
        groups, sm_count = int(arguments[template.groups]), int(arguments[at - template.sm_count])
    except (ValueError, IndexError):  # a DeepGEMM that orders its arguments otherwise
        return None
    gemm_type = arguments[at].removeprefix("GemmType::")
    op = _OPS.get(gemm_type)
    if op and not _is_plain(arguments, at, template):
        op = None
    experts = None if gemm_type == "Normal" else groups
    return Shape(op.format(template.dtype) if op else None, gemm_type, n, k, experts, sm_count)


def _is_plain(arguments: list[str], at: int, template: _Template) -> bool:
    """Whether it is A · Bᵀ, both K-major, in the op's types, nothing added to D and nothing done to it."""
    return (
        all(arguments[at + i : at + i + 1] in ([], [text]) for i, text in template.plain.items())
        and not any(a.startswith("cute::UMMA::Major::") and a != "cute::UMMA::Major::K" for a in arguments)
        and not any("::Epilogue" in a and not a.endswith("::EpilogueIdentity") for a in arguments)
    )


def _split(text: str) -> list[str]:
    """Template arguments at the top level."""
    arguments, depth, current = [], 0, ""
    for character in text:
        depth += {"<": 1, "(": 1, ">": -1, ")": -1}.get(character, 0)
        if character == "," and depth == 0:
            arguments.append(current.strip())
            current = ""
        else:
            current += character
    return [*arguments, current.strip()]
