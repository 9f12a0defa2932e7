"""Baked caches travel in an artifact: restored byte for byte in the folder where they were baked, and nowhere else."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cachebuilder import building
from cachebuilder.artifact.pack import pack_with_baked
from cachebuilder.errors import ArtifactError, CompatibilityError, RestoreError, VerifyError
from cachebuilder.inspecting import diff
from cachebuilder.restoring import baked
from cachebuilder.restoring.folder import open_folder
from cachebuilder.restoring.machine import Machine
from cachebuilder.restoring.restore import restore
from cachebuilder.ship.sync import SyncedFolder
from tests.archives import Member, compress, edit_index, join, member, unpack
from tests.conftest import ROOT, Run
from tests.shipping import sync_file
from tests.users import STRANGER, as_user, ground, needs_root

__all__ = ["ground"]

DATA = ROOT / "tests" / "data"
STORED = DATA / "v1-deepjit.tar.zst"
NINJA_TIME = 1_700_000_000


def put(artifact: Path, to: Path, **options: Any) -> Path:
    """``artifact`` restored into ``to``, whatever DeepGEMM is installed here."""
    restore([artifact], to, machine=Machine(None), force=True, **options)
    return to


def fill(dir: Path) -> None:
    """Files as the engine's compilers leave them: long paths, equal contents, a program, an empty file."""
    deep = dir / baked.FOLDER / "vllm" / "torch_compile_cache" / ("a" * 64) / "inductor_cache" / ("b" * 53)
    for path, data in {
        dir / baked.FOLDER / "triton" / "KEY" / "kernel.cubin": b"cubin",
        dir / baked.FOLDER / "triton" / "KEY" / "__grp__kernel.json": b"{}",
        dir / baked.FOLDER / "triton" / "OTHER" / "kernel.cubin": b"cubin",
        dir / baked.FOLDER / "humming" / "launcher" / ".ninja_log": b"# ninja log v6\n",
        dir / baked.FOLDER / "humming" / "nvrtc_compile": b"#!/bin/sh\n",
        dir / baked.FOLDER / "inductor" / "empty": b"",
        deep / ("c" * 53) / ("d" * 53): bytes(range(256)) * 100,
    }.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        os.utime(path, (NINJA_TIME, NINJA_TIME + 0.7))
    (dir / baked.FOLDER / "humming" / "nvrtc_compile").chmod(0o755)
    (dir / baked.FOLDER / "inductor" / "held.lock").touch()
    record = baked.record(dir, "vllm serve model", "NVIDIA H200", dict(os.environ))
    (dir / baked.FOLDER / baked.RECORD).write_text(record.to_json())


def files(dir: Path) -> dict[str, tuple[bytes, bool, int]]:
    """What lies in a folder's baked caches: bytes, whether it can be run, and its whole second."""
    root = dir / baked.FOLDER
    return {
        path.relative_to(root).as_posix(): (path.read_bytes(), os.access(path, os.X_OK), int(path.stat().st_mtime))
        for path in root.rglob("*")
        if path.is_file() and path.name not in (baked.RECORD, "held.lock")
    }


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """The folder where the caches were baked."""
    return put(STORED, tmp_path / "here")


@pytest.fixture
def artifact(here: Path, tmp_path: Path) -> Path:
    """An artifact with baked caches; the folder where they were baked is gone."""
    fill(here)
    path = tmp_path / "baked.tar.zst"
    pack_with_baked(STORED, baked.collect(here), here / baked.FOLDER).write(path)
    here.rename(tmp_path / "before")
    return path


@pytest.mark.parametrize("stored", ["v1-deepjit", "v1-legacy"])
def test_baked_caches_are_restored_byte_for_byte(stored: str, tmp_path: Path, run: Run) -> None:
    base, dir, path = DATA / f"{stored}.tar.zst", tmp_path / "here", tmp_path / "with.tar.zst"
    fill(put(base, dir))
    before = files(dir)
    pack_with_baked(base, baked.collect(dir), dir / baked.FOLDER).write(path)
    shutil.rmtree(dir)
    put(path, dir)
    assert files(dir) == before
    assert files(dir)["humming/nvrtc_compile"][1:] == (True, NINJA_TIME), "ninja builds again what is newer"
    assert baked.read(dir) is not None and not open_folder(dir).damage()
    members = [{m.info.name: m.data for m in unpack(one) if m.info.name.startswith("cache/")} for one in (path, base)]
    assert members[0] == members[1], "DeepGEMM's kernels are as they were"
    again = restore([path], dir, machine=Machine(None), force=True)
    assert again.written == 0 and again.baked is not None
    text = run("inspect", path).stdout
    assert "vllm serve model" in text and "triton        3 files, 12 B" in text


def test_an_engine_may_add_files_and_a_damaged_one_is_found(artifact: Path, here: Path) -> None:
    put(artifact, here)
    (here / baked.FOLDER / "inductor" / "x.best_config").write_text("{}")
    assert not open_folder(here).damage()
    put(artifact, here)  # once more, as `run ARTIFACT` does at each start
    cubin = here / baked.FOLDER / "triton" / "KEY" / "kernel.cubin"
    cubin.write_bytes(b"cubi?")
    (damage,) = open_folder(here).damage()
    assert (damage.entry, damage.file) == ("baked/triton/KEY", "kernel.cubin")
    with pytest.raises(RestoreError, match=r"wanted no baked caches or equal ones, found a different kernel\.cubin"):
        put(artifact, here)


def test_run_starts_nothing_from_a_damaged_cache(artifact: Path, here: Path, run: Run) -> None:
    put(artifact, here)
    (here / baked.FOLDER / "triton" / "KEY" / "kernel.cubin").unlink()
    done = run("run", here, "--force", "--", "true")
    assert done.returncode == VerifyError.exit_code
    assert "baked/triton/KEY/kernel.cubin: wanted a file, found none" in done.stderr


def test_baked_caches_go_where_they_were_baked_only(artifact: Path, tmp_path: Path, run: Run) -> None:
    elsewhere = tmp_path / "elsewhere"
    with pytest.raises(CompatibilityError, match="baked: folder") as caught:
        restore([artifact], elsewhere, machine=Machine(None))
    assert f"restore --to {tmp_path / 'here'}" in str(caught.value.hint)
    assert not elsewhere.exists()
    put(artifact, elsewhere, with_baked=False)
    assert not (elsewhere / baked.FOLDER).exists() and not open_folder(elsewhere).damage()
    assert len(list((elsewhere / "cache").iterdir())) == 2
    assert "TRITON_CACHE_DIR" not in run("env", elsewhere).stdout


@pytest.mark.parametrize("ahead", [False, True], ids=["eager", "compiled ahead of time"])
def test_another_patch_release_of_python_counts_where_a_key_holds_it(ahead: bool, here: Path) -> None:
    graphs = here / baked.FOLDER / "vllm" / "torch_compile_cache" / "torch_aot_compile"
    if ahead:
        (graphs / ("a" * 64)).mkdir(parents=True)
    fill(here)
    record = baked.collect(here).record
    release, minor = sys.version.split()[0], f"{sys.version_info[0]}.{sys.version_info[1]}"
    assert record.python == (release if ahead else minor)
    assert not any(name == "Python" for name, _, _ in baked.differences(record, here))
    for other, found in {f"{minor}.99": release, "3.99": minor}.items():
        another = record.model_copy(update={"python": other})
        assert ("Python", other, found) in baked.differences(another, here)


def test_no_baked_serves_without_them(artifact: Path, here: Path, run: Run) -> None:
    put(artifact, here)
    command = ("run", here, "--force", "--no-baked", "--", sys.executable, "-c", "import os; print(dict(os.environ))")
    assert "TRITON_CACHE_DIR" in run(*command[:3], *command[4:]).stdout
    assert "TRITON_CACHE_DIR" not in run(*command).stdout
    assert "TRITON_CACHE_DIR" in run("env", here).stdout
    assert "TRITON_CACHE_DIR" not in run("env", here, "--no-baked").stdout


def test_a_folder_holds_one_bake(artifact: Path, here: Path) -> None:
    """Others are left as they are, and nothing of the artifact is written."""
    put(STORED, here)
    fill(here)
    shutil.rmtree(here / "cache")
    (here / baked.FOLDER / baked.RECORD).write_text(baked.record(here, "another command", "NVIDIA H200", {}).to_json())
    with pytest.raises(RestoreError, match="found caches that were baked by another command"):
        put(artifact, here)
    assert not (here / "cache").exists()
    # Baked there by a user: the artifact that was restored before does not call it damaged.
    put(artifact, here, with_baked=False)
    (here / baked.FOLDER / "triton" / "KEY" / "kernel.cubin").unlink()
    assert not open_folder(here).damage()


@pytest.mark.slow
def test_a_sync_leaves_them_out_and_stays_usable(
    built: building.Built, machine: Machine, here: Path, tmp_path: Path
) -> None:
    """Each generation is a folder of its own, so no generation is the folder where they were baked."""
    fill(here)
    path = tmp_path / "baked.tar.zst"
    pack_with_baked(built.packed.path, baked.collect(here), here / baked.FOLDER).write(path)
    folder = SyncedFolder(tmp_path / "synced", machine)
    assert sync_file(folder, path).changed
    assert not sync_file(folder, path).changed, "the generation is usable"
    assert not (folder.path / "current" / baked.FOLDER).exists()


def edited(change: Callable[[dict[str, Any]], object]) -> Callable[[list[Member]], list[Member]]:
    return lambda members: edit_index(members, lambda index: change(index["baked"]["files"][0]))


def renamed(members: list[Member]) -> list[Member]:
    return [*members[:-1], member("baked-files/" + "0" * 64, members[-1].data)]


HOSTILE: dict[str, tuple[Callable[[list[Member]], list[Member]], str]] = {
    "a path that leaves": (edited(lambda file: file.update(path="triton/../../x")), "wanted paths below a cache"),
    "an absolute path": (edited(lambda file: file.update(path="/etc/cron.d/x")), "wanted paths below a cache"),
    "no folder": (edited(lambda file: file.update(path="baked.json")), "wanted paths below a cache"),
    "an odd name": (edited(lambda file: file.update(path="triton/a\nb")), "wanted paths below a cache"),
    "too deep": (edited(lambda file: file.update(path="a/" * 30 + "b")), "wanted paths below a cache"),
    "a path twice": (edited(lambda file: file.update(path="inductor/Empty")), "found inductor/empty beside"),
    "a file and a folder": (edited(lambda file: file.update(path="triton/KEY")), "as a file and as a folder"),
    "two sizes": (edited(lambda file: file.update(sha256="e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855")), "wanted one size"),
    "too large": (edited(lambda file: file.update(size=1 << 30)), "wanted at most"),
    "another digest": (edited(lambda file: file.update(sha256="0" * 64)), "wanted baked-files/"),
    "schema 1": (lambda members: edit_index(members, lambda index: index.update(schema_version=1)), "wanted 3"),
    "a missing file": (lambda members: members[:-1], "found the end: truncated"),
    "another name": (renamed, "wanted baked-files/"),
    "other bytes": (lambda members: [*members[:-1], member(members[-1].info.name, b"x" * len(members[-1].data))], "wanted sha256"),
    "one more": (lambda members: [*members, member("baked-files/" + "0" * 64, b"")], "wanted nothing behind"),
}  # fmt: skip


@pytest.mark.parametrize("attack", HOSTILE)
def test_a_hostile_artifact_is_refused_and_nothing_is_written(attack: str, artifact: Path, here: Path) -> None:
    change, message = HOSTILE[attack]
    artifact.write_bytes(compress(join(change(unpack(artifact)))))
    for with_baked in (True, False):
        with pytest.raises(ArtifactError, match=message):
            put(artifact, here, with_baked=with_baked)
        assert not here.exists()


def test_what_changes_while_it_is_packed_is_an_error(here: Path) -> None:
    fill(here)
    part = baked.collect(here)
    (here / baked.FOLDER / "triton" / "KEY" / "__grp__kernel.json").write_bytes(b"[]")
    with pytest.raises(ArtifactError, match="changed while it was packed"):
        pack_with_baked(STORED, part, here / baked.FOLDER)


def test_a_link_among_the_caches_is_not_packed(here: Path) -> None:
    fill(here)
    (here / baked.FOLDER / "triton" / "link").symlink_to("/etc/passwd")
    with pytest.raises(ArtifactError, match="wanted regular files, found a link"):
        baked.collect(here)


def test_diff_names_what_was_baked(artifact: Path) -> None:
    compared = diff.compare(diff.read(STORED), diff.read(artifact))
    assert not compared.same and not compared.only_a and "baked/triton/KEY" in compared.only_b


@needs_root
def test_a_user_who_cannot_write_there_is_told(ground: Path) -> None:
    """Inductor writes what it reads: vLLM 0.25.0 ends in a read-only cache."""
    dir = put(STORED, ground / "dir")
    fill(dir)

    def refused() -> None:
        with pytest.raises(RestoreError, match=f"wanted a folder that the engine can write into.* user {STRANGER}"):
            baked.require_fit(dir, os.environ)

    as_user(STRANGER, refused)


def test_the_artifact_that_was_restored_is_wanted(here: Path, tmp_path: Path, run: Run) -> None:
    other = DATA / "v1-legacy.tar.zst"
    options = ("--gpu", "H200", "-o", tmp_path / "o.tar.zst", "--artifact", other)
    done = run("bake", here, *options, "--", "true")
    assert done.returncode == ArtifactError.exit_code, done.stderr
    assert "wanted an artifact that was restored in" in done.stderr
    done = run("bake", here, *options[:4], "--", "true")
    assert done.returncode == 2 and "--artifact and -o together" in done.stderr


def test_the_index_says_what_the_schema_says(artifact: Path, run: Run) -> None:
    import jsonschema

    index = json.loads(run("inspect", artifact, "--json").stdout)
    jsonschema.validate(index, json.loads((ROOT / "schemas" / "artifact.json").read_text()))
    assert index["schema_version"] == 3
