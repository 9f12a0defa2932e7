"""Every command and every program in the documentation works, and the site's generated pages build."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import sys
import sysconfig
from importlib import import_module
from pathlib import Path

import click
import pytest
from ruamel.yaml import YAML

import cachebuilder
from cachebuilder.cli.main import VERBS, cli
from tests.command_line import ScriptRunner
from tests.conftest import ROOT, BuildSmall

DOCS = ROOT / "docs"
#: A fenced block of shell or Python, and the reason if the page says that it cannot be run here.
BLOCK = re.compile(
    r"(?:<!-- not run: (?P<reason>[^>]+) -->\n)?^```(?P<language>sh|python)\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
#: How a block's language is run; the block's text follows.
RUNNERS = {"sh": ["bash", "-euo", "pipefail", "-c"], "python": [sys.executable, "-c"]}
#: The pages that a person reads first: later pages use what these made.
FIRST = ["tutorial.md", "howto/many-gpus.md"]
PAGES = [DOCS / name for name in FIRST] + sorted({*DOCS.rglob("*.md")} - {DOCS / name for name in FIRST})
RUN = [path for path in PAGES if any(not block["reason"] for block in BLOCK.finditer(path.read_text()))]
#: Cache folders that a page makes: they begin with what the pages before it built, since test_build.py builds into
#: empty ones. howto/cache.md cleans its own and builds again.
OWN_CACHES = {"cache.md": ["small-cache"], "ci.md": ["ci-cache"]}
TEXTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *PAGES]


def commands(text: str) -> list[list[str]]:
    """Every command line of cachebuilder in a page's fenced and indented blocks, without pipes and redirections."""
    blocks = re.findall(r"^```(?:sh|console|bash|dockerfile)[^\n]*\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    blocks += re.findall(r"(?:^ {4}[^\n]*\n)+", re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S), re.MULTILINE)
    lines = []
    for block in blocks:
        for line in block.replace("\\\n", " ").splitlines():
            for part in re.split(r"&&|\|\||[;|]", line.partition(" # ")[0]):
                part = re.sub(r"\$\(\S*\)|[12]?>.*", "", part)
                if match := re.match(r"(?:\s|\$ |do |\.venv/bin/|RUN )*cachebuilder(\s+[a-z].*)", part):
                    lines.append(shlex.split(match[1]))
    return lines


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_command_of_a_page_is_one_that_cachebuilder_takes(path: Path) -> None:
    for verb, *arguments in commands(path.read_text()):
        if any(c in " ".join(arguments) for c in "…[]"):
            continue  # a synopsis
        command = cli.get_command(click.Context(cli), verb)
        while isinstance(command, click.Group):  # cache dir
            verb, *arguments = arguments
            command = command.get_command(click.Context(command), verb)
        assert command is not None, f"no verb {verb}"
        command.make_parser(click.Context(command)).parse_args(arguments)  # raises on an unknown option


@pytest.mark.parametrize(
    "path", [path for path in PAGES if "```python" in path.read_text()], ids=lambda path: path.name
)
def test_every_program_of_a_page_uses_public_names_only(path: Path) -> None:
    for block in BLOCK.finditer(path.read_text()):
        if block["language"] == "python":
            compile(block["text"], str(path), "exec")
            assert set(re.findall(r"\bcachebuilder\.(\w+)", block["text"])) <= set(cachebuilder.__all__)
            assert not re.search(r"from cachebuilder|import cachebuilder\.", block["text"])


def copy_cache(source: Path, target: Path) -> None:
    """Copy the plans and the compiled kernels of a cache folder. Other tests may write to it meanwhile."""

    def copy(file: str, to: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            shutil.copy2(file, to)

    for name in ("plans", "cubins", "front-end", "virtual-gpu"):
        shutil.copytree(source / name, target / name, copy_function=copy)


@pytest.mark.slow
def test_the_commands_and_programs_of_the_pages_work_one_after_the_other(
    build_small: BuildSmall, tmp_path: Path, cache_folder: Path
) -> None:
    """In one folder, as a person goes through the site, with this Python and its folder of commands on PATH."""
    build_small(None)  # the tutorial has its kernels
    tools = tmp_path / "tools"
    tools.mkdir()
    scripts = ScriptRunner(tools)
    folder = tmp_path / "work"
    folder.mkdir()
    for name in ("manifests", "examples"):
        (folder / name).symlink_to(ROOT / name)
    path = os.pathsep.join([str(tools), sysconfig.get_path("scripts"), os.environ["PATH"]])
    environment = os.environ | {"PATH": path, "HOME": str(tmp_path)}
    for page in RUN:
        for name in OWN_CACHES.get(page.name, []):
            copy_cache(cache_folder, folder / name)
        for block in BLOCK.finditer(page.read_text()):
            if block["reason"]:
                continue
            ran = scripts.run([*RUNNERS[block["language"]], block["text"]], folder, environment)
            report = f"{page.relative_to(ROOT)}:\n{block['text']}\n{ran.stdout[-2000:]}{ran.stderr[-2000:]}"
            assert ran.returncode == 0, report
            # If the page shows an output below the block, it is this output. Digests differ by machine.
            shown = re.match(r"\n\n```text\n(.*?)^```$", page.read_text()[block.end() :], re.MULTILINE | re.DOTALL)
            for line in shown[1].splitlines() if shown else []:
                words = re.sub(r"\.[0-9a-f]{8}\b", "", line)
                assert words in re.sub(r"\.[0-9a-f]{8}\b", "", ran.stdout), report


def test_the_tutorial_runs_its_commands() -> None:
    assert len(RUN) >= 5 and RUN[0].name == "tutorial.md"
    assert {"plan", "build", "restore", "verify", "env", "run"} <= {verb for verb, *_ in commands(RUN[0].read_text())}


@pytest.mark.parametrize("verb", VERBS)
def test_each_verb_has_help_and_is_in_the_reference(verb: str) -> None:
    command = cli.get_command(click.Context(cli), verb)
    assert command is not None
    assert command.help and "Usage:" in command.get_help(click.Context(command, info_name=verb))
    pytest.importorskip("mkdocs")
    assert f"\n## {verb}\n" in import_module("tools.reference").command_line()


@pytest.mark.parametrize("name", ["cli", "manifest", "artifact", "exit-codes", "environment"])
def test_the_pages_of_the_reference_build(name: str) -> None:
    pytest.importorskip("mkdocs")
    page = import_module("tools.reference").PAGES[name]()
    assert page.startswith("# ") and " object at 0x" not in page


def test_the_page_on_the_python_api_names_every_public_name() -> None:
    page = (DOCS / "api.md").read_text()
    assert [name for name in cachebuilder.__all__ if not re.search(rf"\b{name}\b", page)] == []


def test_every_page_is_in_the_sites_navigation() -> None:
    """mkdocs checks this as well, but only if it is installed."""
    text = (ROOT / "mkdocs.yml").read_text()
    nav = YAML(typ="safe").load(text)["nav"]
    named = {page for item in nav for value in item.values() for page in ([value] if isinstance(value, str) else [
        path for part in value for path in part.values()
    ])}  # fmt: skip
    assert {str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md")} <= named
