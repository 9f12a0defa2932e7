"""What a restore leaves in DIR, and that it leaves DIR alone where it fails."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from cachebuilder import building
from cachebuilder.artifact import signature
from cachebuilder.artifact.index import CACHE, SIGNATURE_SUFFIX
from cachebuilder.artifact.read import read_index
from cachebuilder.artifact.trust import Trust
from cachebuilder.errors import ArtifactError, CacheBuilderError, CompatibilityError, RestoreError, SignatureError
from cachebuilder.restoring.folder import open_folder
from cachebuilder.restoring.machine import Machine
from cachebuilder.restoring.restore import restore
from tests.archives import compress, edit_index, join, snapshot, unpack
from tests.conftest import Run


def packed_files(artifact: Path) -> dict[str, bytes]:
    return {m.info.name: m.data for m in unpack(artifact) if m.info.name.startswith(CACHE)}


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_dir_holds_each_entry_as_packed_the_frozen_nvcc_and_the_index(
    built: building.Built, machine: Machine, tmp_path: Path
) -> None:
    done = restore([str(built.packed.path)], str(tmp_path / "dir"), machine=machine)
    found = files(tmp_path / "dir")
    assert {name: data for name, data in found.items() if name.startswith("cache/")} == packed_files(built.packed.path)
    stem = f"cachebuilder/artifacts/{done.index.fingerprint_digest}."
    own = sorted(name for name in found if not name.startswith("cache/"))
    assert [name.removeprefix(stem)[16:] for name in own[:2]] == [".json", ".yaml"]
    assert own[2:] == ["cachebuilder/bin/nvcc", "cachebuilder/bin/version.txt"]
    assert found[own[1]] == built.inputs.manifest_bytes
    assert open_folder(tmp_path / "dir").indexes == [read_index(built.packed.path)]
    assert (done.written, done.skipped, done.relocated) == (len(built.plan.kernels), 0, False)


def test_a_second_restore_writes_nothing(built: building.Built, machine: Machine, tmp_path: Path) -> None:
    restore([built.packed.path], tmp_path / "dir", machine=machine)
    before = {path: path.stat() for path in sorted(tmp_path.rglob("*"))}
    done = restore([built.packed.path], tmp_path / "dir", machine=machine)
    assert (done.written, done.skipped) == (0, len(built.plan.kernels))
    after = {path: path.stat() for path in sorted(tmp_path.rglob("*"))}
    assert {p: (s.st_ino, s.st_mtime_ns) for p, s in after.items()} == {
        p: (s.st_ino, s.st_mtime_ns) for p, s in before.items()
    }


def test_a_restore_into_a_cache_in_use_adds_what_is_missing(
    built: building.Built, machine: Machine, tmp_path: Path
) -> None:
    restore([built.packed.path], tmp_path, machine=machine)
    whole = snapshot(tmp_path / "cache")
    shutil.rmtree(sorted((tmp_path / "cache").iterdir())[1])
    (tmp_path / "cache" / "somebody_elses.00000000000000000000000000000000").mkdir()
    done = restore([built.packed.path], tmp_path, machine=machine)
    assert (done.written, done.skipped) == (1, len(built.plan.kernels) - 1)
    found = snapshot(tmp_path / "cache")
    assert found.items() >= whole.items() and len(found) == len(whole) + 1


# Of several artifacts


def for_another_version(artifact: Path, to: Path) -> Path:
    """An artifact that fits no DeepGEMM here."""
    members = edit_index(unpack(artifact), lambda index: index["fingerprint"].update(deep_gemm="9.9.9"))
    to.write_bytes(compress(join(members)))
    return to


def truncated(good: Path) -> Path:
    """An artifact whose index can be read, and whose end is missing."""
    path = good.with_name("truncated.tar.zst")
    path.write_bytes(good.read_bytes()[:-10])
    return path


def absent(good: Path) -> Path:
    return good.with_name("absent.tar.zst")


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        pytest.param(truncated, "truncated.tar.zst: truncated", id="good-truncated"),
        pytest.param(absent, "absent.tar.zst: cannot be read", id="good-absent"),
    ],
)
def test_of_several_a_bad_one_is_an_error_before_the_first_that_fits_is_written(
    bad: Callable[[Path], Path], words: str, artifact: Path, machine: Machine, tmp_path: Path
) -> None:
    for artifacts in ([artifact, bad(artifact)], [bad(artifact), artifact]):
        with pytest.raises(ArtifactError, match=words):
            restore(artifacts, tmp_path / "dir", machine=machine)
        assert not (tmp_path / "dir").exists()


def test_of_several_an_unsigned_one_is_an_error_before_the_first_that_fits_is_written(
    artifact: Path, machine: Machine, tmp_path: Path
) -> None:
    key = tmp_path / "key.pem"
    trust = Trust.load([signature.generate_key(key)])
    signed = artifact.with_name("signed.tar.zst")
    shutil.copy(artifact, signed)
    signed.with_name(signed.name + SIGNATURE_SUFFIX).write_bytes(
        signature.sign(signed.read_bytes(), signature.load_key(key))
    )
    with pytest.raises(SignatureError, match=r"small\.tar\.zst: not signed"):
        restore([signed, artifact], tmp_path / "dir", machine=machine, trust=trust)
    assert not (tmp_path / "dir").exists()


def test_of_several_the_first_that_fits_is_taken_and_the_others_are_reported(
    run: Run, built: building.Built, artifact: Path, tmp_path: Path
) -> None:
    other = for_another_version(artifact, tmp_path / "other.tar.zst")
    again = artifact.with_name("again.tar.zst")
    shutil.copy(artifact, again)
    here = ("--deep-gemm", built.inputs.installation.imported_as)
    done = run("restore", other, artifact, again, "--to", tmp_path / "dir", *here)
    assert done.returncode == 0, done.stderr
    assert f"refused   {other} does not fit" in done.stderr and "wanted: 9.9.9" in done.stderr
    assert f"unused    {again}: it fits as well" in done.stderr
    assert f"{len(built.plan.kernels)} kernels written" in done.stderr
    [restored] = (tmp_path / "dir" / "cachebuilder" / "artifacts").glob("*.json")
    assert restored.read_bytes() == unpack(artifact)[0].data


def test_if_none_of_several_fits_each_ones_reasons_are_shown_and_force_takes_the_first(
    run: Run, built: building.Built, artifact: Path, tmp_path: Path
) -> None:
    other = for_another_version(artifact, tmp_path / "other.tar.zst")
    here = ("--deep-gemm", built.inputs.installation.imported_as)
    done = run("restore", other, other, "--to", tmp_path / "none", *here)
    assert done.returncode == 9 and done.stderr.count("wanted: 9.9.9") == 2
    assert not (tmp_path / "none").exists()
    forced = run("restore", other, "--to", tmp_path / "forced", "--force", *here)
    assert forced.returncode == 0 and "forced" in forced.stderr and "wanted: 9.9.9" in forced.stderr
    both = run("restore", other, artifact, "--to", tmp_path / "both", "--force", *here)
    assert both.returncode == 0 and "forced" not in both.stderr, "one that fits needs no force"


# A different entry, a folder that cannot be used


def spoil_byte(entry: Path) -> None:
    data = bytearray((entry / "kernel.cubin").read_bytes())
    data[-1] ^= 1
    (entry / "kernel.cubin").write_bytes(data)


def spoil_link(entry: Path) -> None:
    shutil.move(entry / "kernel.cubin", entry.parents[1] / "elsewhere")
    (entry / "kernel.cubin").symlink_to(entry.parents[1] / "elsewhere")


def spoil_folder_link(entry: Path) -> None:
    entry.rename(entry.parents[1] / "elsewhere")
    entry.symlink_to(entry.parents[1] / "elsewhere")


def spoil_to_file(entry: Path) -> None:
    shutil.rmtree(entry)
    entry.write_text("")


@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(spoil_byte, id="one-bit"),
        pytest.param(lambda entry: (entry / "kernel.cu").unlink(), id="one-file-less"),
        pytest.param(lambda entry: (entry / "more").write_text(""), id="one-file-more"),
        pytest.param(spoil_link, id="a-link-for-a-file"),
        pytest.param(spoil_folder_link, id="a-link-for-a-folder"),
        pytest.param(spoil_to_file, id="a-file-for-a-folder"),
    ],
)
def test_a_different_entry_is_an_error_that_names_it_and_changes_nothing(
    spoil: Callable[[Path], object], built: building.Built, machine: Machine, tmp_path: Path
) -> None:
    restore([built.packed.path], tmp_path / "dir", machine=machine)
    entries = sorted((tmp_path / "dir" / "cache").iterdir())
    spoil(entries[0])
    shutil.rmtree(entries[1])  # must not come back: all or nothing
    before = snapshot(tmp_path)
    with pytest.raises(RestoreError, match=entries[0].name):
        restore([built.packed.path], tmp_path / "dir", machine=machine)
    assert snapshot(tmp_path) == before


def test_another_compilers_artifact_does_not_go_into_the_same_folder(
    built: building.Built, machine: Machine, tmp_path: Path
) -> None:
    restore([built.packed.path], tmp_path / "dir", machine=machine)
    other = tmp_path / "other.tar.zst"
    text = built.inputs.toolchain.version_text.replace("cuda_13", "cuda_14")
    members = edit_index(unpack(built.packed.path), lambda index: index["fingerprint"].update(compiler=text))
    other.write_bytes(compress(join(members)))
    before = snapshot(tmp_path)
    with pytest.raises(RestoreError, match="another compiler"):
        restore([other], tmp_path / "dir", machine=machine)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("name", ["with space", "semi;colon", "a:b", "dollar$HOME", "quote'"])
def test_a_path_that_deepgemm_could_not_use_is_refused(
    name: str, built: building.Built, machine: Machine, tmp_path: Path
) -> None:
    with pytest.raises(RestoreError, match="wanted a path of letters"):
        restore([built.packed.path], tmp_path / name, machine=machine)
    assert not (tmp_path / name).exists()


def cache_is_a_link(dir: Path) -> None:
    (dir / "cache").rename(dir / "elsewhere")
    (dir / "cache").symlink_to(dir / "elsewhere")


def file_for(name: str) -> Callable[[Path], None]:
    def spoil(dir: Path) -> None:
        shutil.rmtree(dir / name)
        (dir / name).write_text("")

    return spoil


def folder_for_the_text(dir: Path) -> None:
    (dir / "cachebuilder" / "bin" / "version.txt").unlink()
    (dir / "cachebuilder" / "bin" / "version.txt").mkdir()


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        pytest.param(cache_is_a_link, "cache: wanted a folder, found a link", id="cache-is-a-link"),
        pytest.param(file_for("cache"), "cache: cannot be written: Not a directory", id="cache-is-a-file"),
        pytest.param(file_for("cachebuilder"), "cannot be written: ", id="our-folder-is-a-file"),
        pytest.param(file_for("cachebuilder/bin"), "bin: cannot be written: ", id="bin-is-a-file"),
        pytest.param(folder_for_the_text, "version.txt: wanted a regular file", id="the-text-is-a-folder"),
        pytest.param(
            lambda dir: (dir / "cachebuilder" / "bin" / "version.txt").write_bytes(b"\xff"),
            "answers for another compiler",
            id="the-text-is-not-text",
        ),
    ],
)
def test_a_folder_in_disorder_is_one_sentence_and_left_as_it_is(
    spoil: Callable[[Path], object], words: str, built: building.Built, machine: Machine, tmp_path: Path
) -> None:
    restore([built.packed.path], tmp_path / "dir", machine=machine)
    spoil(tmp_path / "dir")
    before = snapshot(tmp_path)
    with pytest.raises(RestoreError, match=words):
        restore([built.packed.path], tmp_path / "dir", machine=machine)
    assert snapshot(tmp_path) == before


def test_a_destination_that_cannot_be_written_is_one_sentence(
    built: building.Built, machine: Machine, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    for to in (tmp_path / "file", Path("/proc/none/dir")):
        with pytest.raises(RestoreError, match="cannot be written"):
            restore([built.packed.path], to, machine=machine)


def test_no_artifact_at_all_is_an_error(machine: Machine, tmp_path: Path) -> None:
    for force in (False, True):
        with pytest.raises(CacheBuilderError, match="wanted at least one artifact, found none"):
            restore([], tmp_path / "dir", machine=machine, force=force)


# On a bare machine


@pytest.mark.slow
def test_a_user_without_a_home_gets_a_sentence_and_needs_none_to_restore(
    run: Run, built: building.Built, tmp_path: Path
) -> None:
    """A container may run under a user id without a name: Python then does not know where home is."""
    code = (
        "import os, sys\nfor name in ('HOME', 'XDG_CACHE_HOME', 'CACHEBUILDER_CACHE_DIR'): os.environ.pop(name, None)\n"
        "import pwd\ndef nobody(number): raise KeyError(number)\npwd.getpwuid = nobody\n"
        "from cachebuilder.cli.main import main\nmain()"
    )

    def ask(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", code, *map(str, arguments), "--deep-gemm", str(here)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    here = built.inputs.installation.imported_as
    assert ask("restore", built.packed.path, "--to", tmp_path / "dir").returncode == 0
    looked = ask("doctor", tmp_path / "dir")
    assert looked.returncode == 0 and "neither HOME nor DG_JIT_CACHE_DIR is set" in looked.stdout
    for verb in (("verify", tmp_path / "dir"), ("plan", tmp_path / "none.yaml")):
        done = ask(*verb)
        assert "Traceback" not in done.stderr and done.returncode in (3, 4), done.stderr
    assert "CACHEBUILDER_CACHE_DIR" in ask("verify", tmp_path / "dir").stderr


def test_an_empty_text_is_no_folder(run: Run, built: building.Built) -> None:
    """An unset variable must not restore into the working folder."""
    done = run("restore", built.packed.path, "--to", "")
    assert done.returncode == 2 and "found an empty text" in done.stderr


def test_no_deepgemm_at_all_is_a_difference(built: building.Built, tmp_path: Path) -> None:
    with pytest.raises(CompatibilityError, match="found:  none") as error:
        restore([built.packed.path], tmp_path / "dir", machine=Machine(None))
    assert "--deep-gemm PATH" in str(error.value)
    done = restore([built.packed.path], tmp_path / "dir", machine=Machine(None), force=True)
    assert done.written == len(built.plan.kernels)


def test_a_restore_imports_no_torch_no_deepgemm_and_nothing_slow(built: building.Built, tmp_path: Path) -> None:
    slow = ("torch", "deep_gemm", "rich", "ruamel")
    here = built.inputs.installation.imported_as
    code = f"import sys\nfor name in {slow}: sys.modules[name] = None\nfrom cachebuilder.cli.main import main\nmain()"
    command = ["restore", built.packed.path, "--to", tmp_path / "dir", "--deep-gemm", here]
    done = subprocess.run([sys.executable, "-c", code, *map(str, command)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# Memory

#: Restores an artifact and prints the most memory that this took, in MB.
#: The peak of this program alone: ``ru_maxrss`` would also count the process that started it, before the program began.
PEAK_OF_A_RESTORE = """
import re, sys
from pathlib import Path
from cachebuilder.restoring.machine import Machine
from cachebuilder.restoring.restore import restore
restore([sys.argv[1]], sys.argv[2], machine=Machine(None), force=True)
print(int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) // 1024)
"""


def of_many_values(count: int, to: Path) -> Path:
    """An artifact whose index has this many values that say nothing."""
    more = {"nothing": {f"{number:x}": 1 for number in range(count)}}
    stored = Path(__file__).with_name("data") / "v1-deepjit.tar.zst"
    to.write_bytes(compress(join(edit_index(unpack(stored), lambda index: index["ops"].append(more)))))
    return to


@pytest.mark.slow
def test_a_small_artifact_with_millions_of_values_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="wanted at most 1048576 values, found about 1048"):
        read_index(of_many_values((1 << 20) + 10, tmp_path / "a.tar.zst"))


@pytest.mark.slow
def test_a_small_artifact_costs_a_restore_less_than_300_mb(tmp_path: Path) -> None:
    artifact = of_many_values((1 << 20) - 200, tmp_path / "a.tar.zst")
    assert artifact.stat().st_size < 1_100_000
    command = [sys.executable, "-c", PEAK_OF_A_RESTORE, artifact, tmp_path / "dir"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 0 and int(done.stdout) < 300, done.stdout + done.stderr
