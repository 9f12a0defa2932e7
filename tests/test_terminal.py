"""Tables of 80 columns, colour on a terminal only, and JSON that follows its schema."""

import json
import re
from pathlib import Path

import pytest

from cachebuilder.building import Built
from cachebuilder.cli import table
from tests.conftest import ROOT, Run
from tests.restored import unpack
from tests.terminals import on_a_terminal
from tests.test_misses import log_of
from tests.test_schemas import validator


def too_wide(text: str) -> list[str]:
    """Lines over 80 columns, except those with a path, which cannot be wrapped."""
    return [line for line in text.splitlines() if len(line) > 80 and "/" not in line]


@pytest.fixture(scope="session")
def folder(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A restored folder in which one kernel is missing and one is damaged."""
    to = unpack(built.packed.path, tmp_path_factory.mktemp("terminal") / "to")
    gemms = sorted((path for path in (to / "cache").iterdir() if "gemm" in path.name), key=lambda path: len(path.name))
    changed, gone = gemms[0], gemms[-1]  # the longest name is the missing one's
    for path in (changed / "kernel.cubin", gone):
        path.parent.chmod(0o755)
    (changed / "kernel.cubin").chmod(0o644)
    (changed / "kernel.cubin").write_bytes(b"\x7fELF")
    gone.rename(to / "gone")
    return to


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["plan", "inspect", "diff", "doctor", "verify", "build", "misses"])
def test_no_table_is_wider_than_80_columns(verb: str, built: Built, small: Path, folder: Path, run: Run) -> None:
    here = ["--deep-gemm", str(built.inputs.installation.imported_as)]
    arguments = {
        "plan": [small, *here],
        "inspect": [built.packed.path],
        "diff": [built.packed.path, folder],
        "doctor": [folder, *here],
        "verify": [folder, *here],
        "build": [small, "-o", folder / "again.tar.zst", *here],
        "misses": [folder / "none.jsonl"],
    }[verb]
    (folder / "none.jsonl").write_text("")
    done = run(verb, *arguments)
    assert done.returncode in (0, 1, 8, 11) and "Traceback" not in done.stderr
    assert done.stdout and not too_wide(done.stdout)
    assert "\x1b" not in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(("no_color", "coloured"), [(None, True), ("", True), ("1", False)])
def test_colour_is_for_terminals_without_no_color(built: Built, no_color: str | None, coloured: bool) -> None:
    environment = {} if no_color is None else {"NO_COLOR": no_color}
    text = on_a_terminal(1, "inspect", built.packed.path, **environment)
    assert "sm90_fp8_gemm_1d2d" in text and ("\x1b[" in text) is coloured


@pytest.mark.parametrize("name", ["", "missing", "  headers"])
def test_a_word_that_does_not_fit_stands_below_its_name(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    key = "kernel.sm90_m_grouped_fp8_gemm_contiguous_1d2d." + "0" * 32
    table.line(name, key)
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].strip() == key and all(len(line) <= 82 for line in lines)
    assert len(lines[-1]) <= 80 or name.startswith(" ")


@pytest.mark.parametrize(
    "verb", [pytest.param("verify", marks=pytest.mark.slow), "diff", "doctor", "misses", "explain", "gpus"]
)
def test_json_follows_its_schema_and_has_the_documented_fields(
    verb: str, built: Built, folder: Path, tmp_path: Path, run: Run
) -> None:
    log = log_of(tmp_path, ("x", 1, built.plan.kernels[0].source), ("y", None, None))
    here = ["--deep-gemm", built.inputs.installation.imported_as]
    arguments: dict[str, list[str | Path]] = {
        "verify": [folder, *here],
        "diff": [built.packed.path, folder],
        "doctor": [folder, *here],
        "misses": [log],
        "explain": [built.plan.kernels[0].entry, "--in", built.packed.path],
        "gpus": [],
    }
    done = run(verb, *arguments[verb], "--json")
    assert done.stdout, done.stderr
    document = json.loads(done.stdout)
    validator(verb).validate(document)
    [row] = re.findall(rf"^\| `{verb} --json` \|(.*)\|$", (ROOT / "docs" / "report.md").read_text(), re.MULTILINE)
    documented = re.findall(r"`(\w+)`", row.partition(";")[0])
    assert documented == list(document[0] if verb == "gpus" else document)
