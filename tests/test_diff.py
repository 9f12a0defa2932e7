from __future__ import annotations

import json
from pathlib import Path

from cachebuilder import building
from cachebuilder.inspecting import diff
from cachebuilder.manifest.inputs import load_manifest
from tests.conftest import LEGACY, Run
from tests.restored import unpack


def test_an_artifact_and_what_was_restored_from_it_are_equal(built: building.Built, run: Run, tmp_path: Path) -> None:
    folder = unpack(built.packed.path, tmp_path / "restored")
    done = run("diff", built.packed.path, folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == "fingerprint  equal"
    assert f"{len(built.plan.kernels)} equal, 0 with other bytes, 0 only in A, 0 only in B" in done.stdout


def test_kernels_are_compared_by_key_and_by_bytes(built: building.Built, run: Run, tmp_path: Path) -> None:
    folder = unpack(built.packed.path, tmp_path / "restored")
    gone, changed, *equal = sorted(path.name for path in (folder / "cache").iterdir())
    (folder / "cache" / changed / "kernel.cubin").write_bytes(b"\x7fELF other")
    (folder / "cache" / gone).rename(folder / "cache" / "another.0123456789abcdef0123456789abcdef")
    done = run("diff", built.packed.path, folder, "--json")
    assert done.returncode == 1 and done.stderr == ""
    assert json.loads(done.stdout) == {
        "same": False,
        "fingerprint": [],
        "only_a": [gone],
        "only_b": ["another.0123456789abcdef0123456789abcdef"],
        "equal": equal,
        "changed": [{"entry": changed, "files": ["kernel.cubin"]}],
    }
    text = run("diff", built.packed.path, folder).stdout
    assert f"only in A    {gone}" in text and f"other bytes  {changed}" in text


def test_every_field_that_differs_is_shown_with_both_values(built: building.Built, tmp_path: Path) -> None:
    index = diff.read(built.packed.path).fingerprints[0]
    other = index.model_copy(update={"sm_counts": (100, 132), "compiler": index.compiler.replace("Cuda", "Other", 1)})
    a = diff.Side(tmp_path, (index,), {})
    comparison = diff.compare(a, diff.Side(tmp_path, (other,), {}))
    assert json.loads(comparison.to_json())["fingerprint"] == [
        {"field": "compiler", "a": index.compiler, "b": other.compiler},
        {"field": "sm_counts", "a": [132], "b": [100, 132]},
    ]
    assert diff.compare(a, diff.Side(tmp_path, (other, index), {})).same  # the nearest of several


def test_both_generations_differ_in_everything_that_a_key_holds(small: Path, run: Run, tmp_path: Path) -> None:
    artifacts = [tmp_path / "deepjit.tar.zst", tmp_path / "legacy.tar.zst"]
    for artifact, deep_gemm in zip(artifacts, (None, LEGACY), strict=True):
        building.build(load_manifest(small, deep_gemm=deep_gemm), artifact)
    done = run("diff", *artifacts)
    assert done.returncode == 1
    assert "fingerprint  generation\n  A: deepjit\n  B: legacy\n" in done.stdout
    assert "kernels      0 equal, 0 with other bytes, 5 only in A, 5 only in B" in done.stdout
    assert all(len(line) <= 80 for line in done.stdout.splitlines() if line.startswith("  "))


def test_what_is_neither_an_artifact_nor_a_restored_folder_is_one_sentence(run: Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no artifact")
    for path in (tmp_path / "file", tmp_path):
        done = run("diff", path, path)
        assert done.returncode == 8 and "error: " in done.stderr
