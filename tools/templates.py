"""Writes cachebuilder/deepgemm/templates.json: the parameters of every kernel template in several copies of DeepGEMM.

    python tools/templates.py DEEP_GEMM_FOLDER… [FLASHINFER_FOLDER…]

The file keeps what it has; the named copies add to it.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from cachebuilder.deepgemm import templates


def main() -> None:
    """Read the copies that the command line names, write the table, and print what is new."""
    path = Path(templates.__file__).with_suffix(".json")
    table: dict[str, list[list[str]]] = json.loads(path.read_text()) if path.exists() else {}
    for folder in sys.argv[1:]:
        added = 0
        for name, declared in declared_templates(headers_of(Path(folder))).items():
            if declared not in table.setdefault(name, []):
                table[name].append(declared)
                added += 1
        print(f"{folder}: {added} new declarations")
    lines = [
        f' "{name}": [\n' + ",\n".join(f"  {json.dumps(one)}" for one in sorted(ways)) + "\n ]"
        for name, ways in sorted(table.items())
    ]
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def headers_of(package: Path) -> Path:
    """The folder of DeepGEMM's headers in a package of DeepGEMM, or in FlashInfer, which has TensorRT-LLM's copy."""
    of_flashinfer = package / "data" / "csrc" / "nv_internal" / "tensorrt_llm" / "deep_gemm"
    return of_flashinfer if of_flashinfer.is_dir() else package / "include" / "deep_gemm"


def declared_templates(include: Path) -> dict[str, list[str]]:
    """Every kernel template in the headers below ``include``, with its parameters.

    Each parameter is its type, its name, and a ``?`` where it has a default.
    """
    declared = {}
    for header in sorted(include.rglob("*.cuh")):
        text = re.sub(r"//[^\n]*|/\*.*?\*/", "", header.read_text(errors="replace"), flags=re.DOTALL)
        for start in re.finditer(r"\btemplate\s*<", text):
            end = _closing(text, start.end())
            signature = text[end + 1 : _first(text, "{;", end)]
            if not re.search(r"\bCUTLASS_GLOBAL\b|\b__global__\b", signature):
                continue
            name = re.search(r"\b(?!__)(\w+)\s*\(", _without_attributes(signature))
            if name:
                declared[name[1]] = [_declaration(part) for part in _parts(text[start.end() : end])]
    return declared


def _declaration(text: str) -> str:
    declared, _, default = (" ".join(text.split())).partition("=")
    return declared.strip() + ("?" if default else "")


def _parts(text: str) -> Iterator[str]:
    """Split at the commas outside of brackets."""
    start = 0
    for index, depth in _depths(text, 0):
        if text[index] == "," and depth == 0:
            yield text[start:index]
            start = index + 1
    yield text[start:]


def _closing(text: str, start: int) -> int:
    """The position of the bracket that closes the one just before ``start``."""
    return next((index for index, depth in _depths(text, start) if depth < 0), len(text))


def _depths(text: str, start: int) -> Iterator[tuple[int, int]]:
    """Each position from ``start`` on, and the brackets that are open after it.

    ``<`` and ``>`` in parentheses do not count: they may mean "less" and "greater".
    """
    angles = rounds = 0
    for index in range(start, len(text)):
        rounds += {"(": 1, ")": -1}.get(text[index], 0)
        if rounds == 0:
            angles += {"<": 1, ">": -1}.get(text[index], 0)
        yield index, angles + rounds


def _first(text: str, characters: str, start: int) -> int:
    """The position of the first of these characters from ``start`` on; the end where there is none."""
    positions = [text.find(character, start) for character in characters]
    return min((position for position in positions if position >= 0), default=len(text))


def _without_attributes(signature: str) -> str:
    """``signature`` without ``__launch_bounds__(…)``, whose arguments may contain brackets."""
    while match := re.search(r"\b__\w+__\s*\(", signature):
        signature = signature[: match.start()] + signature[_closing(signature, match.end()) + 1 :]
    return signature


if __name__ == "__main__":
    main()
