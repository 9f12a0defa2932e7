from __future__ import annotations

import dataclasses
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from cachebuilder import building
from cachebuilder.artifact.index import CACHE
from cachebuilder.artifact.read import read_index
from cachebuilder.cuda.nvml import VisibleGpu
from cachebuilder.deepgemm import installation as installations
from cachebuilder.deepgemm.installation import Installation
from cachebuilder.errors import CompatibilityError, RestoreError
from cachebuilder.planning import make as planning
from cachebuilder.restoring.compatibility import with_environment
from cachebuilder.restoring.entries import restore
from cachebuilder.restoring.folder import open_folder
from tests.archives import compress, edit_index, join, member, snapshot, unpack
from tests.archives import replace as replace_member
from tests.conftest import Run

H200 = VisibleGpu("NVIDIA H200", (9, 0), 132)


@pytest.fixture(autouse=True)
def no_variables_of_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(("DG_", "DJ_")):
            monkeypatch.delenv(name)


@pytest.fixture
def installation(built: building.Built) -> Installation:
    return built.inputs.installation


def packed_files(artifact: Path) -> dict[str, bytes]:
    return {m.info.name: m.data for m in unpack(artifact) if m.info.name.startswith(CACHE)}


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def copy_of(installation: Installation, to: Path) -> Installation:
    """Another copy on disk, its extension a link: it is large, and nothing here changes it."""
    for file in installation.path.rglob("*"):
        target = to / file.relative_to(installation.path)
        if file.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            if file.suffix == ".so":
                target.hardlink_to(file) if file.stat().st_dev == to.parent.stat().st_dev else shutil.copy(file, target)
            else:
                shutil.copy(file, target)
    for beside in installation.path.parent.glob("*tvm_ffi*"):  # the legacy copy's own dependency
        if not (to.parent / beside.name).exists():
            (to.parent / beside.name).symlink_to(beside)
    return installations.find(to)


# What is in DIR afterwards


def test_dir_holds_each_entry_as_packed_the_frozen_nvcc_and_the_index(
    built: building.Built, installation: Installation, tmp_path: Path
) -> None:
    done = restore([built.packed.path], tmp_path / "dir", installation)
    found = files(tmp_path / "dir")
    assert {name: data for name, data in found.items() if name.startswith("cache/")} == packed_files(built.packed.path)
    stem = f"cachebuilder/artifacts/{done.index.fingerprint_digest}."
    own = sorted(name for name in found if not name.startswith("cache/"))
    assert [name.removeprefix(stem)[16:] for name in own[:2]] == [".json", ".yaml"]
    assert own[2:] == ["cachebuilder/bin/nvcc", "cachebuilder/bin/version.txt"]
    assert found[own[1]] == built.inputs.manifest_bytes
    assert open_folder(tmp_path / "dir").indexes == [read_index(built.packed.path)]
    assert (done.written, done.skipped, done.relocated) == (len(built.plan.kernels), 0, False)


def test_a_second_restore_writes_nothing(built: building.Built, installation: Installation, tmp_path: Path) -> None:
    restore([built.packed.path], tmp_path / "dir", installation)
    before = {path: path.stat() for path in sorted(tmp_path.rglob("*"))}
    done = restore([built.packed.path], tmp_path / "dir", installation)
    assert (done.written, done.skipped) == (0, len(built.plan.kernels))
    after = {path: path.stat() for path in sorted(tmp_path.rglob("*"))}
    assert {p: (s.st_ino, s.st_mtime_ns) for p, s in after.items()} == {
        p: (s.st_ino, s.st_mtime_ns) for p, s in before.items()
    }


def test_a_restore_into_a_cache_in_use_adds_what_is_missing(
    built: building.Built, installation: Installation, tmp_path: Path
) -> None:
    restore([built.packed.path], tmp_path, installation)
    whole = snapshot(tmp_path / "cache")
    shutil.rmtree(sorted((tmp_path / "cache").iterdir())[1])
    (tmp_path / "cache" / "somebody_elses.00000000000000000000000000000000").mkdir()
    done = restore([built.packed.path], tmp_path, installation)
    assert (done.written, done.skipped) == (1, len(built.plan.kernels) - 1)
    found = snapshot(tmp_path / "cache")
    assert found.items() >= whole.items() and len(found) == len(whole) + 1


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
    spoil: Callable[[Path], object], built: building.Built, installation: Installation, tmp_path: Path
) -> None:
    restore([built.packed.path], tmp_path / "dir", installation)
    entries = sorted((tmp_path / "dir" / "cache").iterdir())
    spoil(entries[0])
    shutil.rmtree(entries[1])  # must not come back: all or nothing
    before = snapshot(tmp_path)
    with pytest.raises(RestoreError, match=entries[0].name):
        restore([built.packed.path], tmp_path / "dir", installation)
    assert snapshot(tmp_path) == before


def test_another_compilers_artifact_does_not_go_into_the_same_folder(
    built: building.Built, installation: Installation, tmp_path: Path
) -> None:
    restore([built.packed.path], tmp_path / "dir", installation)
    other = tmp_path / "other.tar.zst"
    text = built.inputs.toolchain.version_text.replace("cuda_13", "cuda_14")
    members = edit_index(unpack(built.packed.path), lambda index: index["fingerprint"].update(compiler=text))
    other.write_bytes(compress(join(members)))
    before = snapshot(tmp_path)
    with pytest.raises(RestoreError, match="another compiler"):
        restore([other], tmp_path / "dir", installation)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("name", ["with space", "semi;colon", "a:b", "dollar$HOME", "quote'"])
def test_a_path_that_deepgemm_could_not_use_is_refused(
    name: str, built: building.Built, installation: Installation, tmp_path: Path
) -> None:
    with pytest.raises(RestoreError, match="wanted a path of letters"):
        restore([built.packed.path], tmp_path / name, installation)
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
        pytest.param(cache_is_a_link, "wanted a folder or nothing, found a link", id="cache-is-a-link"),
        pytest.param(file_for("cache"), "cache: cannot be written: Not a directory", id="cache-is-a-file"),
        pytest.param(file_for("cachebuilder"), "cannot be written: ", id="our-folder-is-a-file"),
        pytest.param(file_for("cachebuilder/bin"), "bin: cannot be written: ", id="bin-is-a-file"),
        pytest.param(folder_for_the_text, "version.txt: cannot be written: Is a dir", id="the-text-is-a-folder"),
        pytest.param(
            lambda dir: (dir / "cachebuilder" / "bin" / "version.txt").write_bytes(b"\xff"),
            "speaks for another compiler",
            id="the-text-is-no-text",
        ),
    ],
)
def test_a_folder_in_disorder_is_one_sentence_and_left_as_it_is(
    spoil: Callable[[Path], object], words: str, built: building.Built, installation: Installation, tmp_path: Path
) -> None:
    restore([built.packed.path], tmp_path / "dir", installation)
    spoil(tmp_path / "dir")
    before = snapshot(tmp_path)
    with pytest.raises(RestoreError, match=words):
        restore([built.packed.path], tmp_path / "dir", installation)
    assert snapshot(tmp_path) == before


def test_a_user_without_a_home_gets_a_sentence_and_needs_none_to_restore(
    run: Run, built: building.Built, tmp_path: Path
) -> None:
    """As a container runs under a number that nobody has: Python has no answer to where home is."""
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


@pytest.mark.parametrize("deep_gemm", ["legacy"], indirect=True, scope="session")
def test_a_source_that_is_no_utf_8_moves_as_it_is(
    built: building.Built, installation: Installation, tmp_path: Path
) -> None:
    members = unpack(built.packed.path)
    changed = tmp_path / "odd.tar.zst"
    changed.write_bytes(compress(join(replace_member(members, 2, members[2].data + b"// \xb5\n", honest=True))))
    moved = copy_of(installation, tmp_path / "moved" / "deep_gemm")
    with pytest.raises(CompatibilityError, match="the names do not follow"):  # it is another source
        restore([changed], tmp_path / "dir", moved)


def test_a_destination_that_cannot_be_written_is_said(
    built: building.Built, installation: Installation, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    for to in (tmp_path / "file", Path("/proc/none/dir")):
        with pytest.raises(RestoreError, match="cannot be written"):
            restore([built.packed.path], to, installation)


# Does it fit


def field_of(error: pytest.ExceptionInfo[CompatibilityError]) -> list[str]:
    return [line.split()[0] for line in str(error.value).splitlines() if line.startswith("  ") and line[2] != " "]


def change_header(path: Path) -> None:
    header = sorted((path / "include" / "deep_gemm").rglob("*.cuh"))[0]
    header.write_bytes(header.read_bytes() + b"\n")


def change_version(path: Path) -> None:
    (path / "VERSION").write_text("9.9.9")


def change_cutlass(path: Path) -> None:
    header = path / "include" / "cutlass" / "version.h"
    header.write_text(header.read_text().replace("#define CUTLASS_MAJOR ", "#define CUTLASS_MAJOR 9"))


@pytest.mark.parametrize(
    ("change", "field"),
    [
        pytest.param(change_header, "headers", id="a-changed-header"),
        pytest.param(change_version, "deep_gemm", id="another-version"),
        pytest.param(change_cutlass, "cutlass", id="another-cutlass"),
    ],
)
def test_another_deepgemm_is_refused_before_anything_is_written(
    change: Callable[[Path], None], field: str, built: building.Built, installation: Installation, tmp_path: Path
) -> None:
    copy_of(installation, tmp_path / "copy" / "deep_gemm")
    change(tmp_path / "copy" / "deep_gemm")
    other = installations.find(tmp_path / "copy" / "deep_gemm")
    found = with_environment(read_index(built.packed.path), other, None, {}, relocates=True)
    assert [difference.field for difference in found] == [field]
    if field == "cutlass" and installation.generation == "legacy":
        assert not found[0].causes_miss  # no legacy key holds it
        return
    with pytest.raises(CompatibilityError) as error:
        restore([built.packed.path], tmp_path / "dir", other)
    assert field_of(error) == [field]
    assert f"wanted: {found[0].wanted}\n    found:  {found[0].found}" in str(error.value)
    assert "build with the DeepGEMM that serves" in " ".join(str(error.value).split())
    assert not (tmp_path / "dir").exists()


@pytest.mark.parametrize(
    ("gpu", "fields"),
    [
        pytest.param(None, [], id="none-visible"),
        pytest.param(H200, [], id="the-card-itself"),
        pytest.param(VisibleGpu("NVIDIA H20", (9, 0), 78), ["sm_counts"], id="another-sm-count"),
        pytest.param(VisibleGpu("NVIDIA B200", (10, 0), 148), ["arch"], id="another-arch"),
        pytest.param(VisibleGpu("NVIDIA H200", (9, 0), None), [], id="nvml-does-not-say"),
    ],
)
def test_the_gpu_is_compared_where_one_is_visible(
    gpu: VisibleGpu | None, fields: list[str], built: building.Built, installation: Installation
) -> None:
    found = with_environment(read_index(built.packed.path), installation, gpu, {})
    assert [difference.field for difference in found] == fields
    assert all(difference.causes_miss and difference.remedy for difference in found)


def test_an_engine_that_uses_fewer_sms_than_the_card_has_still_fits(
    built: building.Built, installation: Installation
) -> None:
    index = read_index(built.packed.path)
    index = index.model_copy(update={"fingerprint": index.fingerprint.model_copy(update={"sm_counts": (108,)})})
    assert with_environment(index, installation, H200, {}) == []
    assert [m.field for m in with_environment(index, installation, replace(H200, sm_count=78), {})] == ["sm_counts"]


@pytest.mark.parametrize(
    ("planned", "here", "fields", "misses"),
    [
        pytest.param({}, {"DG_JIT_CACHE_DIR": "/x", "DG_PRINT_CONFIGS": "1"}, [], [], id="harmless"),
        pytest.param({}, {"DG_JIT_DEBUG": "0"}, [], [], id="switched-off"),
        pytest.param({}, {"DG_JIT_DEBUG": "1"}, ["DG_JIT_DEBUG"], ["DG_JIT_DEBUG"], id="set-here-only"),
        pytest.param({"DG_JIT_DEBUG": "1"}, {"DG_JIT_DEBUG": "1"}, [], [], id="set-in-both"),
        pytest.param({"DG_JIT_DEBUG": "1"}, {}, ["DG_JIT_DEBUG"], [], id="planned-only-env-sets-it"),
        pytest.param({"DG_X": "1"}, {"DG_X": "2"}, ["DG_X"], ["DG_X"], id="another-value"),
        pytest.param({}, {"DG_JIT_NVCC_COMPILER": "/x/nvcc"}, ["DG_JIT_NVCC_COMPILER"], [], id="another-nvcc"),
        pytest.param({}, {"DG_JIT_NVCC_COMPILER": "/dir/nvcc"}, [], [], id="the-frozen-nvcc"),
    ],
)
def test_variables_that_change_kernels_are_compared(
    planned: dict[str, str],
    here: dict[str, str],
    fields: list[str],
    misses: list[str],
    built: building.Built,
    installation: Installation,
) -> None:
    index = read_index(built.packed.path)
    index = index.model_copy(update={"fingerprint": index.fingerprint.model_copy(update={"environment": planned})})
    found = with_environment(index, installation, None, here, frozen_nvcc="/dir/nvcc")
    assert [difference.field for difference in found] == fields
    assert [difference.field for difference in found if difference.causes_miss] == misses


def test_the_fitting_artifact_of_several_is_taken_and_each_others_reasons_are_shown(
    run: Run, built: building.Built, installation: Installation, tmp_path: Path
) -> None:
    other = tmp_path / "other.tar.zst"
    members = edit_index(unpack(built.packed.path), lambda index: index["fingerprint"].update(deep_gemm="9.9.9"))
    other.write_bytes(compress(join(members)))
    here = ("--deep-gemm", installation.imported_as)
    done = run("restore", other, built.packed.path, "--to", tmp_path / "dir", *here)
    assert done.returncode == 0, done.stderr
    assert f"{other} does not fit" in done.stderr and "wanted: 9.9.9" in done.stderr
    assert f"{len(built.plan.kernels)} kernels written" in done.stderr
    none = run("restore", other, other, "--to", tmp_path / "none", *here)
    assert none.returncode == 9 and none.stderr.count("wanted: 9.9.9") == 2
    assert not (tmp_path / "none").exists()
    forced = run("restore", other, "--to", tmp_path / "forced", "--force", *here)
    assert forced.returncode == 0 and "forced" in forced.stderr and "wanted: 9.9.9" in forced.stderr


def test_no_deepgemm_at_all_is_a_difference(built: building.Built, tmp_path: Path) -> None:
    with pytest.raises(CompatibilityError, match="found:  none") as error:
        restore([built.packed.path], tmp_path / "dir", None)
    assert "--deep-gemm PATH" in str(error.value)
    assert restore([built.packed.path], tmp_path / "dir", None, force=True).written == len(built.plan.kernels)


def test_a_restore_imports_no_torch_no_deepgemm_and_nothing_slow(
    built: building.Built, installation: Installation, tmp_path: Path
) -> None:
    slow = ("torch", "deep_gemm", "rich", "ruamel", "tarfile")
    code = f"import sys\nfor name in {slow}: sys.modules[name] = None\nfrom cachebuilder.cli.main import main\nmain()"
    command = ["restore", built.packed.path, "--to", tmp_path / "dir", "--deep-gemm", installation.imported_as]
    done = subprocess.run([sys.executable, "-c", code, *map(str, command)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# Relocation


@pytest.mark.slow
def test_legacy_entries_move_to_the_names_that_deepgemm_gives_them_at_the_new_path(
    built: building.Built, installation: Installation, small: Path, tmp_path: Path
) -> None:
    moved = copy_of(installation, tmp_path / "moved" / "deep_gemm")
    done = restore([built.packed.path], tmp_path / "dir", moved)
    planned = planning.make(dataclasses.replace(built.inputs, installation=moved), reuse=False)
    restored = {path.name for path in (tmp_path / "dir" / "cache").iterdir()}
    assert restored == {kernel.entry for kernel in planned.kernels} == {entry.name for entry in done.index.entries}
    assert done.relocated == (installation.generation == "legacy")
    if done.relocated:
        assert done.index.fingerprint.install_include == str(moved.path / "include") == planned.include
        assert done.index.fingerprint.legacy_flags == planned.legacy_flags
        assert open_folder(tmp_path / "dir").indexes == [done.index]
        assert done.index.fingerprint_digest == done.index.fingerprint.digest()
        again = restore([built.packed.path], tmp_path / "dir", moved)
        assert (again.written, again.skipped) == (0, len(planned.kernels))


def test_the_install_path_is_the_one_that_python_imports_from_links_kept(
    built: building.Built, installation: Installation, tmp_path: Path
) -> None:
    (tmp_path / "link").symlink_to(installation.path.parent)
    done = restore([built.packed.path], tmp_path / "dir", installations.find(tmp_path / "link" / "deep_gemm"))
    if installation.generation == "legacy":
        assert done.index.fingerprint.install_include == str(tmp_path / "link" / "deep_gemm" / "include")


@pytest.mark.parametrize("deep_gemm", ["legacy"], indirect=True, scope="session")
def test_nothing_is_relocated_if_one_name_does_not_follow_from_its_source(
    built: building.Built, installation: Installation, tmp_path: Path
) -> None:
    members = unpack(built.packed.path)
    name = members[-1].info.name.split("/")[1]
    wrong = name[:-1] + ("0" if name[-1] != "0" else "1")
    renamed = [member(m.info.name.replace(name, wrong), m.data) for m in members[1:]]

    def rename(index: dict[str, list[dict[str, str]]]) -> None:
        next(entry for entry in index["entries"] if entry["name"] == name)["name"] = wrong

    odd = tmp_path / "odd.tar.zst"
    odd.write_bytes(compress(join(edit_index([members[0], *renamed], rename))))
    moved = copy_of(installation, tmp_path / "moved" / "deep_gemm")
    with pytest.raises(CompatibilityError, match=wrong):
        restore([odd], tmp_path / "dir", moved)
    assert not (tmp_path / "dir").exists()


# Many at once, and killed


def restore_command(built: building.Built, to: Path) -> list[str]:
    here = built.inputs.installation.imported_as
    command = [sys.executable, "-m", "cachebuilder", "restore", built.packed.path, "--to", to, "--deep-gemm", here]
    return list(map(str, command))


def test_ten_restores_at_once_end_with_one_whole_cache(
    built: building.Built, installation: Installation, tmp_path: Path
) -> None:
    alone = tmp_path / "alone"
    restore([built.packed.path], alone, installation)
    together = [
        subprocess.Popen(restore_command(built, tmp_path / "dir"), stderr=subprocess.PIPE, text=True) for _ in range(10)
    ]
    said = [process.communicate()[1] for process in together]
    assert [process.returncode for process in together] == [0] * 10, said
    assert sum(int(text.split(": ")[1].split()[0]) for text in said) == len(built.plan.kernels)
    assert snapshot(tmp_path / "dir") == snapshot(alone)


#: A restore that kills itself where it makes its N-th file, folder or rename in DIR; at the end it says how many it made.
KILLED_AT_ITS_NTH_STEP = """
import os, signal, sys
n, dir, seen = int(sys.argv.pop(1)), sys.argv[sys.argv.index("--to") + 1], 0
def count(event, arguments):
    global seen
    if event in ("open", "os.mkdir", "os.rename", "os.link", "os.chmod", "os.remove") and dir in str(arguments):
        seen += 1
        if seen == n:
            os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(count)
from cachebuilder.cli.main import main
try:
    main()
finally:
    print(seen)
"""


def test_a_restore_killed_at_any_of_its_steps_leaves_whole_entries_only(
    built: building.Built, installation: Installation, tmp_path: Path
) -> None:
    whole, dir = tmp_path / "whole", tmp_path / "dir"
    restore([built.packed.path], whole, installation)
    wanted = snapshot(whole)

    def run_until(step: int) -> subprocess.CompletedProcess[str]:
        _, *command = restore_command(built, dir)
        command[:2] = ["-c", KILLED_AT_ITS_NTH_STEP, str(step)]
        return subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False)

    steps = int(run_until(0).stdout)
    assert steps > 4 * len(built.plan.kernels)
    for number in range(12):
        if number % 2 == 0:  # half of them from nothing, half into what is there
            shutil.rmtree(dir, ignore_errors=True)
        done = run_until(1 + number * (steps - 1) // 12)
        assert done.returncode == -signal.SIGKILL or number % 2, "from nothing it makes as many steps each time"
        found = snapshot(dir) if dir.exists() else {}
        for name, content in found.items():
            if name.startswith("cache/") or (name.startswith("cachebuilder/artifacts/") and "/." not in name):
                assert content == wanted[name], name
        for entry in (dir / "cache").iterdir() if (dir / "cache").exists() else ():
            assert files(entry) == files(whole / "cache" / entry.name)
    restore([built.packed.path], dir, installation)
    left = snapshot(dir)
    assert {name: left[name] for name in wanted} == wanted
    assert not (dir / "cachebuilder" / "tmp").exists(), "what killed restores left is swept"
