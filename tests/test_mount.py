"""A Kubernetes image volume, as it is mounted: read-only, and nothing in it can be executed."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from cachebuilder import building
from cachebuilder.deepgemm.installation import Installation
from cachebuilder.restoring.folder import RestoredFolder
from cachebuilder.ship import image
from cachebuilder.sweep.process import Compiler
from cachebuilder.verifying import virtual
from cachebuilder.verifying.verify import verify
from tests.shipping import apply


@pytest.fixture
def volume(built: building.Built, tmp_path: Path) -> Iterator[Path]:
    path = built.packed.path
    data = path.read_bytes()
    made = image.make(path, data, ("linux/amd64",))
    apply([data, made.blobs[0][1]], tmp_path / "image")
    where = tmp_path / "volume"
    where.mkdir()
    for command in (["--bind", tmp_path / "image", where], ["-o", "remount,bind,ro,noexec", where]):
        done = subprocess.run(["mount", *command], capture_output=True, check=False)
        if done.returncode:
            subprocess.run(["umount", where], capture_output=True, check=False)
            pytest.skip("wants to mount a folder read-only, which this machine does not allow")
    try:
        yield where
    finally:
        subprocess.run(["umount", where], check=True)


@pytest.mark.slow
def test_deep_gemm_serves_from_the_volume_with_the_frozen_nvcc_copied_out_of_it(
    built: building.Built, volume: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The replay of `verify`, with the volume itself for the cache root; a copy of bin/ is all that it lacks."""
    shutil.copytree(volume / "cachebuilder" / "bin", tmp_path / "frozen" / "bin")
    roots, compiler = virtual.linked_roots, virtual.frozen_compiler
    served: list[Path] = []

    def linked_roots(
        folder: RestoredFolder, entries: frozenset[str], installation: Installation, scratch: Path
    ) -> list[Path]:
        found = roots(folder, entries, installation, scratch)
        if scratch.name != "frozen":  # the self-check, which compiles
            return found
        served.append(volume)
        return [volume] if installation.generation == "legacy" else [found[0], volume]

    def copied(compiler_text: str, work: Path) -> Compiler:
        return replace(compiler(compiler_text, work), nvcc=tmp_path / "frozen" / "bin" / "nvcc")

    monkeypatch.setattr(virtual, "linked_roots", linked_roots)
    monkeypatch.setattr(virtual, "frozen_compiler", copied)
    report = verify(volume, deep_gemm=built.inputs.installation.imported_as)
    assert served and report.complete, report
    assert [len(replay.hits) for replay in report.replays] == [len(built.plan.kernels)]
    with pytest.raises(PermissionError):
        subprocess.run([volume / "cachebuilder" / "bin" / "nvcc", "--version"], check=False)
