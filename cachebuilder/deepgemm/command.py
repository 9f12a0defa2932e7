"""nvcc's command line as DeepGEMM writes it: which of its words are flags, and which name headers' folders."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self


@dataclass(frozen=True)
class Command:
    """The words that say how a source is compiled; the names of the source and of the output are left out.

    Attributes:
        flags: in order, without include paths.
        includes: the include paths, in order.
    """

    flags: tuple[str, ...]
    includes: tuple[str, ...]

    @classmethod
    def parse(cls, words: str) -> Self:
        """The words that follow the compiler's name, joined by spaces as DeepGEMM joins them."""
        rest = iter(words.split(" "))
        flags: list[str] = []
        includes: list[str] = []
        for word in rest:
            if word in ("-o", "--output-file"):
                next(rest, None)
            elif word in ("-I", "--include-path"):
                includes.append(next(rest, ""))
            elif word.startswith(("-I", "--include-path=")):
                includes.append(word.removeprefix("-I").removeprefix("--include-path="))
            elif word not in ("-cubin", "--cubin", "") and not word.endswith(".cu"):
                flags.append(word)
        return cls(tuple(flags), tuple(includes))
