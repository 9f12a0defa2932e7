"""The page "when it goes wrong": every text on it is one that a program prints."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.conftest import ROOT

PAGE = (ROOT / "docs" / "howto" / "when-it-goes-wrong.md").read_text()
#: Each text in the first column of a table, with what stands behind it in brackets.
ROWS = [match for cell in re.findall(r"^\| (.*?) \| ", PAGE, re.M) for match in re.findall(r"`([^`]+)`([^`]*)", cell)]
OURS = [text for text, source in ROWS if "(exit " in source or text.startswith("frozen nvcc")]
DEEPJIT = [text for text, source in ROWS if re.match(r" \((DeepJIT|DeepJIT 0.2.3.post2)\)", source)]


def fragments(text: str) -> list[str]:
    """What a text has between its varying parts."""
    return [part.strip() for part in text.removeprefix("frozen nvcc: ").split("…") if len(part.strip()) > 3]


@pytest.fixture(scope="module")
def code() -> str:
    """All source, with adjacent literals joined."""
    files = [*(ROOT / "cachebuilder").rglob("*.py"), ROOT / "cachebuilder" / "restoring" / "frozen_nvcc.sh"]
    return re.sub(r'"\s*\n\s*f?"', "", "\n".join(path.read_text() for path in files))


@pytest.mark.parametrize("text", OURS)
def test_every_text_of_cachebuilder_on_the_page_is_in_its_code(text: str, code: str) -> None:
    """The code puts ``wanted A, found B`` together from parts."""
    parts = [part for fragment in fragments(text) for part in re.split(r"[:/]* ?\bwanted |, found|nvcc:", fragment)]
    assert parts and all(part.strip() in code for part in parts), parts


@pytest.mark.parametrize("text", DEEPJIT)
def test_every_text_of_deepjit_on_the_page_is_in_its_library(text: str) -> None:
    spec = find_spec("deep_gemm")
    assert spec is not None and spec.origin is not None
    library = (Path(spec.origin).parent / "_C.so").read_bytes()
    if text.startswith("filesystem error"):  # libstdc++'s
        return
    assert all(part.encode() in library for part in fragments(text)), text


def test_the_page_has_texts_of_each_kind() -> None:
    assert len(OURS) >= 15 and len(DEEPJIT) >= 6
