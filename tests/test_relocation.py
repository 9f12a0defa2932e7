"""A legacy cache that moves to another install path gets the names that DeepGEMM looks for there, or is left alone."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from cachebuilder import building
from cachebuilder.artifact.index import CACHE
from cachebuilder.deepgemm import entries
from cachebuilder.deepgemm import installation as installations
from cachebuilder.errors import CompatibilityError
from cachebuilder.planning import make as planning
from cachebuilder.planning.kept import KeptPlans
from cachebuilder.restoring.folder import open_folder
from cachebuilder.restoring.machine import Machine
from cachebuilder.restoring.restore import restore
from tests.archives import Member, compress, edit_index, join, member, unpack
from tests.archives import replace as replace_member
from tests.restored import copy_of


def rename(members: list[Member], name: str, other: str) -> list[Member]:
    """The same with one entry under another name, in the index and in the members."""

    def change(index: dict[str, list[dict[str, str]]]) -> None:
        next(entry for entry in index["entries"] if entry["name"] == name)["name"] = other

    return edit_index(
        [members[0], *(member(m.info.name.replace(name, other), m.data) for m in members[1:])],
        change,
    )


@pytest.mark.slow
def test_the_entries_have_the_names_that_deepgemm_gives_them_at_the_new_path(
    built: building.Built, tmp_path: Path
) -> None:
    """DeepJIT's names hold no path: they stay."""
    moved = copy_of(built.inputs.installation, tmp_path / "moved" / "deep_gemm")
    done = restore([built.packed.path], tmp_path / "dir", machine=Machine(moved))
    planned = planning.make(replace(built.inputs, installation=moved), plans=KeptPlans(own=False))
    restored = {path.name for path in (tmp_path / "dir" / "cache").iterdir()}
    assert restored == {kernel.entry for kernel in planned.kernels} == {entry.name for entry in done.index.entries}
    assert done.relocated == (moved.generation == "legacy")
    assert done.index.fingerprint.install_include == planned.include
    assert done.index.fingerprint.legacy_flags == planned.legacy_flags
    assert done.index.fingerprint_digest == done.index.fingerprint.digest()
    assert open_folder(tmp_path / "dir").indexes == [done.index]
    again = restore([built.packed.path], tmp_path / "dir", machine=Machine(moved))
    assert (again.written, again.skipped) == (0, len(planned.kernels))


@pytest.mark.parametrize("deep_gemm", ["legacy"], indirect=True, scope="session")
def test_the_install_path_is_the_one_that_python_imports_from_links_kept(built: building.Built, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(built.inputs.installation.path.parent)
    linked = installations.find(tmp_path / "link" / "deep_gemm")
    done = restore([built.packed.path], tmp_path / "dir", machine=Machine(linked))
    assert done.index.fingerprint.install_include == str(tmp_path / "link" / "deep_gemm" / "include")


@pytest.mark.parametrize("deep_gemm", ["legacy"], indirect=True, scope="session")
def test_nothing_is_relocated_if_one_name_does_not_follow_from_its_source(
    built: building.Built, tmp_path: Path
) -> None:
    members = unpack(built.packed.path)
    name = members[-1].info.name.split("/")[1]
    wrong = name[:-1] + ("0" if name[-1] != "0" else "1")
    odd = tmp_path / "odd.tar.zst"
    odd.write_bytes(compress(join(rename(members, name, wrong))))
    moved = copy_of(built.inputs.installation, tmp_path / "moved" / "deep_gemm")
    with pytest.raises(CompatibilityError, match=wrong):
        restore([odd], tmp_path / "dir", machine=Machine(moved))
    assert not (tmp_path / "dir").exists()


@pytest.mark.parametrize("deep_gemm", ["legacy"], indirect=True, scope="session")
def test_a_source_that_is_not_utf_8_moves_as_it_is(built: building.Built, tmp_path: Path) -> None:
    members = unpack(built.packed.path)
    source = members[2].data + b"// \xb5\n"
    name = members[2].info.name.split("/")[1]
    kernel = entries.kernel_name("legacy", name)
    release = re.search(r"release (\d+\.\d+)", built.inputs.toolchain.version_text)
    assert kernel is not None and release is not None and built.plan.legacy_flags is not None
    changed = entries.legacy_entry(kernel, release[1], built.plan.legacy_flags, source)
    odd = tmp_path / "odd.tar.zst"
    odd.write_bytes(compress(join(rename(replace_member(members, 2, source, honest=True), name, changed))))
    moved = copy_of(built.inputs.installation, tmp_path / "moved" / "deep_gemm")
    done = restore([odd], tmp_path / "dir", machine=Machine(moved))
    flags = done.index.fingerprint.legacy_flags
    assert done.relocated and flags is not None
    there = entries.legacy_entry(kernel, release[1], flags, source)
    assert (tmp_path / "dir" / CACHE / there / "kernel.cu").read_bytes() == source
