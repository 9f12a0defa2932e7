"""What is installed for a build: exact versions, and files whose hashes are in the repository."""

from __future__ import annotations

import re

import pytest

from tests.conftest import ROOT

LOCKS = sorted((ROOT / "locks").glob("*.txt"))


def requirements(text: str) -> dict[str, tuple[str, list[str]]]:
    """Each requirement's name → its version and its hashes."""
    joined = text.replace("\\\n", " ")
    found = {}
    for line in filter(None, map(str.strip, joined.splitlines())):
        match = re.fullmatch(r"([A-Za-z0-9._-]+)==(\S+)((?:\s+--hash=sha256:[0-9a-f]{64})*)", line)
        assert match, line
        found[re.sub(r"[-_.]+", "-", match[1]).lower()] = match[2], match[3].split()
    return found


@pytest.mark.parametrize("path", LOCKS, ids=lambda path: path.stem)
def test_every_locked_package_has_a_version_and_hashes_and_no_host(path: str) -> None:
    text = (ROOT / "locks" / path).read_text()
    assert "://" not in text and "index-url" not in text
    assert all(hashes for _, hashes in requirements(text).values())


def test_the_locks_are_of_the_versions_that_are_tested_together() -> None:
    wanted = requirements("\n".join(x for x in (ROOT / "constraints.txt").read_text().splitlines() if x[:1] != "#"))
    locked = {
        **requirements((ROOT / "locks" / "nvcc.txt").read_text()),
        **requirements((ROOT / "locks" / "all.txt").read_text()),
    }
    assert {name: version for name, (version, _) in locked.items()} == {
        n: version for n, (version, _) in wanted.items()
    }
    assert {"pip", "setuptools", "hatchling", "editables"} <= locked.keys()


def test_nothing_is_installed_without_a_hash() -> None:
    makefile, ci = (ROOT / "Makefile").read_text(), (ROOT / ".ci" / "run").read_text()
    assert "pip install" not in ci
    installs = [line for line in makefile.replace("\\\n", " ").splitlines() if "pip install" in line]
    assert len(installs) == 2
    for line in installs:
        assert "--require-hashes --only-binary :all:" in line or "--no-index --no-deps --no-build-isolation" in line, (
            line
        )
