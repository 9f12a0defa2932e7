"""What is restored is what was checked; and how the command line takes keys."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cachebuilder.artifact import provenance
from cachebuilder.artifact.whole import read_bytes
from cachebuilder.errors import ArtifactError, SignatureError
from tests.archives import snapshot
from tests.conftest import Run
from tests.test_signature import GENERATIONS, artifact, flip, keys, trusted, unpack

__all__ = ["GENERATIONS", "artifact", "keys"]


# Swapped meanwhile


@pytest.mark.parametrize("in_place", [True, False], ids=["written-in-place", "renamed-over"])
def test_what_is_restored_are_the_bytes_that_were_checked(
    in_place: bool, artifact: Path, keys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = artifact.read_bytes()
    check = provenance.open_envelope

    def swap(*arguments: object) -> object:
        """The last step of the check; then the attacker strikes."""
        statement = check(*arguments)  # type: ignore[arg-type]
        if in_place:
            artifact.write_bytes(bytes(len(whole)))
        else:
            (tmp_path / "evil").write_bytes(b"evil")
            os.replace(tmp_path / "evil", artifact)
        return statement

    monkeypatch.setattr(provenance, "open_envelope", swap)
    done = unpack(artifact, tmp_path / "swapped", trusted(keys))
    assert done.written and artifact.read_bytes() != whole
    honest = tmp_path / "honest.tar.zst"
    honest.write_bytes(whole)
    unpack(honest, tmp_path / "honest")
    assert snapshot(tmp_path / "swapped" / "cache") == snapshot(tmp_path / "honest" / "cache")


def test_the_artifact_is_read_once(artifact: Path, keys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    real = os.open

    def count(path: str | Path, *arguments: object, **more: object) -> int:
        opened.append(str(path))
        return real(path, *arguments, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "open", count)
    unpack(artifact, tmp_path / "dir", trusted(keys))
    assert opened.count(str(artifact)) == 1


def test_a_writer_in_the_middle_of_the_reading_does_not_win(
    artifact: Path, keys: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of it old and half of it new is no signed artifact; a longer one is said to be in the making."""
    whole, real, trust = artifact.read_bytes(), os.read, trusted(keys)

    def half(handle: int, size: int) -> bytes:
        data = real(handle, min(size, len(whole) // 2))
        with artifact.open("r+b") as file:
            file.seek(len(whole) - 1)
            file.write(flip(whole[-1:], 0))
        return data

    with monkeypatch.context() as patch:
        patch.setattr(os, "read", half)
        with pytest.raises(SignatureError, match="the signature is not valid"):
            trust.check_file(artifact)

    def longer(handle: int, size: int) -> bytes:
        with artifact.open("ab") as file:
            file.write(b"more")
        return real(handle, size)

    with monkeypatch.context() as patch:
        patch.setattr(os, "read", longer)
        with pytest.raises(ArtifactError, match="still being written"):
            read_bytes(artifact)


# Without a key


def test_without_a_key_restore_says_so_and_imports_no_cryptography(artifact: Path, tmp_path: Path) -> None:
    code = "import sys\nsys.modules['cryptography'] = None\nfrom cachebuilder.cli.main import main\nmain()"
    command = [sys.executable, "-c", code, "restore", artifact, "--to", tmp_path / "dir", "--force"]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "unchecked origin, no --trust KEY.pub was given" in done.stderr


def test_a_fleet_trusts_by_a_variable_and_an_option_overrules_it(
    artifact: Path, keys: Path, run: Run, tmp_path: Path
) -> None:
    command = ("restore", artifact, "--to", tmp_path / "dir", "--force")
    ours, other = str(keys / "ours.pub"), str(keys / "other.pub")
    done = run(*command, CACHEBUILDER_TRUST=other)
    assert done.returncode == 14 and not (tmp_path / "dir").exists(), done.stderr
    done = run(*command, CACHEBUILDER_TRUST=f"{other}:{ours}")
    assert done.returncode == 0 and f"by {ours} (sha256:" in done.stderr and "unchecked" not in done.stderr
    assert run(*command, "--trust", ours, CACHEBUILDER_TRUST=other).returncode == 0


@pytest.mark.parametrize("verb", ["restore", "run", "verify-signature"])
@pytest.mark.parametrize("empty", ["", ":", "KEY:"])
def test_an_empty_cachebuilder_trust_does_not_turn_the_check_off(
    verb: str, empty: str, artifact: Path, keys: Path, run: Run, tmp_path: Path
) -> None:
    arguments: dict[str, list[str | Path]] = {
        "restore": [artifact, "--to", tmp_path / "dir", "--force"],
        "run": [artifact, "--to", tmp_path / "dir", "--force", "--", "echo", "ran"],
        "verify-signature": [artifact],
    }
    done = run(verb, *arguments[verb], CACHEBUILDER_TRUST=empty.replace("KEY", str(keys / "ours.pub")))
    assert done.returncode == 2 and "wanted" in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert not (tmp_path / "dir").exists() and "ran" not in done.stdout


def test_an_empty_trust_option_is_a_wrong_command_line(artifact: Path, run: Run, tmp_path: Path) -> None:
    done = run("restore", artifact, "--to", tmp_path / "dir", "--force", "--trust", "")
    assert done.returncode == 2 and "wanted a key's file, found an empty text" in done.stderr
    assert not (tmp_path / "dir").exists()


def test_run_checks_an_artifact_and_says_that_a_folder_has_no_signature(
    artifact: Path, keys: Path, run: Run, tmp_path: Path
) -> None:
    to, ours = tmp_path / "dir", ("--trust", keys / "ours.pub")
    done = run("run", artifact, "--to", to, "--force", "--trust", keys / "other.pub", "--", "echo", "ran")
    assert done.returncode == 14 and "ran" not in done.stdout and not to.exists()
    done = run("run", artifact, "--to", to, "--force", *ours, "--", "echo", "ran")
    assert done.returncode == 0 and "ran" in done.stdout, done.stderr
    assert run("run", to, *ours, "--", "echo", "ran").returncode == 2
    done = run("run", to, "--", "echo", "ran", CACHEBUILDER_TRUST=str(keys / "ours.pub"))
    assert done.returncode == 0 and "a folder has no signature" in done.stderr
