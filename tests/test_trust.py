"""What is restored is what was checked; and how the command line takes keys."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from cachebuilder.artifact import provenance, signature
from cachebuilder.artifact.trust import Trust
from cachebuilder.artifact.whole import read_bytes
from cachebuilder.errors import ArtifactError, SignatureError
from cachebuilder.restoring.machine import Machine
from cachebuilder.ship.sync import SyncedFolder
from tests.archives import snapshot
from tests.conftest import Run
from tests.shipping import for_another, sync_file
from tests.test_signature import GENERATIONS, artifact, flip, keys, sign, trusted, unpack

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


# An older artifact, or another one by the same key


def signed_at(path: Path, keys: Path, time: str | None) -> None:
    """Sign as `cachebuilder sign` did at this time; None: as it did before it wrote the time."""
    sign(path, keys)
    content = provenance.statement(path, path.read_bytes())
    content["predicate"]["runDetails"]["metadata"] = {} if time is None else {provenance.SIGNED_ON: time}
    envelope = provenance.seal(content, signature.load_key(keys / "ours.pem"))
    path.with_name(path.name + ".intoto.json").write_bytes(envelope)


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["restore", "sync", "run"])
def test_a_rollback_to_an_older_signed_artifact_is_refused(
    verb: str, artifact: Path, keys: Path, run: Run, tmp_path: Path
) -> None:
    more = () if verb == "sync" else ("--force",)
    more += ("--", "echo", "ran") if verb == "run" else ()

    def tried(not_before: str) -> subprocess.CompletedProcess[str]:
        trust = ("--trust", keys / "ours.pub", "--not-before", not_before)
        return run(verb, artifact, "--to", tmp_path / "dir", *trust, *more)

    signed_at(artifact, keys, "2026-10-01T12:00:00Z")
    for not_before in ("2026-11-01", "2026-10-01T12:00:01Z", "2026-10-01T11:00:00-02:00"):
        done = tried(not_before)
        assert done.returncode == 14 and "found:  signed at 2026-10-01T12:00:00Z" in done.stderr, done.stderr
        assert not (tmp_path / "dir" / "cache").exists() and not (tmp_path / "dir" / "current").exists()
    for not_before in ("2026-10-01", "2026-10-01T12:00:00Z", "2026-10-01T14:00:00+02:00"):
        done = tried(not_before)
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("time", [None, "yesterday", ""], ids=["none", "no-time", "empty"])
def test_an_artifact_without_a_signed_time_is_not_late_enough(
    time: str | None, artifact: Path, keys: Path, tmp_path: Path
) -> None:
    signed_at(artifact, keys, time)
    trust = Trust.load([keys / "ours.pub"], not_before=datetime(2026, 1, 1, tzinfo=UTC))
    with pytest.raises(SignatureError, match="found:  no signed provenance with a time"):
        unpack(artifact, tmp_path / "dir", trust)
    artifact.with_name(artifact.name + ".intoto.json").unlink()
    with pytest.raises(SignatureError, match="found:  no signed provenance with a time"):
        unpack(artifact, tmp_path / "dir", trust)


def test_another_artifact_by_the_same_key_is_refused_by_its_name(
    artifact: Path, keys: Path, run: Run, tmp_path: Path
) -> None:
    other = for_another(artifact, "other", "H200")
    sign(other, keys)
    shutil.copy(other, artifact)
    for suffix in (".sig", ".intoto.json"):
        shutil.copy(other.with_name(other.name + suffix), artifact.with_name(artifact.name + suffix))
    trust = ("--trust", keys / "ours.pub", "--name")
    done = run("restore", artifact, "--to", tmp_path / "dir", "--force", *trust, "small")
    assert done.returncode == 14 and "wanted: small\nfound:  other" in done.stderr, done.stderr
    assert not (tmp_path / "dir").exists()
    assert run("restore", artifact, "--to", tmp_path / "dir", "--force", *trust, "other").returncode == 0


def test_a_generation_that_was_taken_before_is_not_current_if_it_is_too_old(
    artifact: Path, keys: Path, machine: Machine, tmp_path: Path
) -> None:
    signed_at(artifact, keys, "2026-10-01T12:00:00Z")
    sync_file(SyncedFolder(tmp_path / "dir", machine, trusted(keys)), artifact)
    late = Trust.load([keys / "ours.pub"], not_before=datetime(2026, 11, 1, tzinfo=UTC))
    folder = SyncedFolder(tmp_path / "dir", machine, late)
    assert folder.current() is None
    with pytest.raises(SignatureError, match="too early"):
        sync_file(folder, artifact)


def test_what_nobody_signed_proves_no_name_and_no_time(artifact: Path, keys: Path, run: Run, tmp_path: Path) -> None:
    for option in (("--name", "small"), ("--not-before", "2026-01-01")):
        done = run("restore", artifact, "--to", tmp_path / "dir", *option)
        assert done.returncode == 2 and "go with --trust" in done.stderr
    done = run("restore", artifact, "--to", tmp_path / "dir", "--trust", keys / "ours.pub", "--not-before", "soon")
    assert done.returncode == 2 and "wanted a time such as" in done.stderr
    with pytest.raises(SignatureError, match="with its time zone"):
        Trust.load([], not_before=datetime(2026, 1, 1))


def test_sign_writes_the_time(artifact: Path, keys: Path) -> None:
    before = datetime.now(UTC) - timedelta(seconds=1)
    provenance.sign_file(artifact, signature.load_key(keys / "ours.pem"))
    statement = trusted(keys).check_file(artifact).statement
    assert statement is not None
    signed_on = provenance.signed_on(statement)
    assert signed_on is not None and before <= signed_on <= datetime.now(UTC)
