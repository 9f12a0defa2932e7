"""Every command in the documentation is one that works, and the site's generated pages build."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import sysconfig
from importlib import import_module
from pathlib import Path

import click
import pytest
from ruamel.yaml import YAML

from cachebuilder.cli.main import VERBS, cli
from tests.conftest import ROOT

DOCS = ROOT / "docs"
#: A fenced block of shell, and the reason where the page says that it cannot be run here.
BLOCK = re.compile(r"(?:<!-- not run: (?P<reason>[^>]+) -->\n)?^```sh\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
#: What a person reads first comes first: later pages use what the tutorial made.
FIRST = ["tutorial.md", "howto/many-gpus.md"]
PAGES = [DOCS / name for name in FIRST] + sorted({*DOCS.rglob("*.md")} - {DOCS / name for name in FIRST})
RUN = [path for path in PAGES if any(not block["reason"] for block in BLOCK.finditer(path.read_text()))]
TEXTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *PAGES]


def commands(text: str) -> list[list[str]]:
    """Every command line of cachebuilder in a page's fenced and indented blocks, without what a shell does with it."""
    blocks = re.findall(r"^```(?:sh|console|bash|dockerfile)[^\n]*\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    blocks += re.findall(r"(?:^ {4}[^\n]*\n)+", re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S), re.MULTILINE)
    found = []
    for block in blocks:
        for line in block.replace("\\\n", " ").splitlines():
            for part in re.split(r"&&|\|\||[;|]", line.partition(" # ")[0]):
                part = re.sub(r"\$\(\S*\)|[12]?>.*", "", part)
                if match := re.match(r"(?:\s|\$ |do |\.venv/bin/|RUN )*cachebuilder(\s+[a-z].*)", part):
                    found.append(shlex.split(match[1]))
    return found


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_command_of_a_page_is_one_that_cachebuilder_takes(path: Path) -> None:
    for verb, *arguments in commands(path.read_text()):
        if any(c in " ".join(arguments) for c in "…[]"):
            continue  # a synopsis
        command = cli.get_command(click.Context(cli), verb)
        assert command is not None, f"no verb {verb}"
        command.make_parser(click.Context(command)).parse_args(arguments)  # raises on an unknown option


@pytest.mark.slow
def test_the_commands_of_the_pages_work_one_after_the_other(tmp_path: Path) -> None:
    """In one folder, as a person goes through the site; with the same Python, whose folder of commands is on PATH."""
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "cachebuilder").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m cachebuilder "$@"\n')
    (tools / "cachebuilder").chmod(0o755)
    folder = tmp_path / "work"
    folder.mkdir()
    for name in ("manifests", "examples"):
        (folder / name).symlink_to(ROOT / name)
    path = os.pathsep.join([str(tools), sysconfig.get_path("scripts"), os.environ["PATH"]])
    environment = os.environ | {"PATH": path, "PYTHONPATH": str(ROOT), "HOME": str(tmp_path)}
    for page in RUN:
        for block in BLOCK.finditer(page.read_text()):
            if block["reason"]:
                continue
            done = subprocess.run(
                ["bash", "-euo", "pipefail", "-c", block["text"]],
                cwd=folder, env=environment, capture_output=True, text=True, check=False,
            )  # fmt: skip
            said = f"{page.relative_to(ROOT)}:\n{block['text']}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
            assert done.returncode == 0, said
            # The output that the page shows below a block is this output.
            shown = re.match(r"\n\n```text\n(.*?)^```$", page.read_text()[block.end() :], re.MULTILINE | re.DOTALL)
            for line in shown[1].splitlines() if shown else []:
                words = re.sub(r"\.[0-9a-f]{8}\b", "", line)
                assert words in re.sub(r"\.[0-9a-f]{8}\b", "", done.stdout), said


def test_the_tutorial_runs_its_commands() -> None:
    assert len(RUN) >= 5 and RUN[0].name == "tutorial.md"
    assert {"plan", "build", "restore", "verify", "env", "run"} <= {verb for verb, *_ in commands(RUN[0].read_text())}


@pytest.mark.parametrize("verb", VERBS)
def test_each_verb_has_help_and_is_in_the_reference(verb: str) -> None:
    command = cli.get_command(click.Context(cli), verb)
    assert command is not None
    told = command.get_help(click.Context(command, info_name=verb))
    assert command.help and "Usage:" in told
    pytest.importorskip("mkdocs")
    assert f"\n## {verb}\n" in import_module("tools.reference").command_line()


@pytest.mark.parametrize("name", ["cli", "manifest", "artifact", "exit-codes", "environment"])
def test_the_pages_of_the_reference_build(name: str) -> None:
    pytest.importorskip("mkdocs")
    page = import_module("tools.reference").PAGES[name]()
    assert page.startswith("# ") and " object at 0x" not in page


def test_every_page_is_in_the_sites_navigation() -> None:
    """mkdocs says so, too, but only where it is installed."""
    text = (ROOT / "mkdocs.yml").read_text()
    nav = YAML(typ="safe").load(text)["nav"]
    named = {page for item in nav for value in item.values() for page in ([value] if isinstance(value, str) else [
        path for part in value for path in part.values()
    ])}  # fmt: skip
    assert {str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md")} <= named
