"""Artifacts written by earlier versions: what docs/versions.md promises of their schema."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from tests.conftest import LEGACY, ROOT, Run

DATA = ROOT / "tests" / "data"
SHA256 = {
    "v1-deepjit": "0274c072b8400e301fb9ee1aa6bff7bb123fc6fc92f858c4b34fd09093e492f6",
    "v2-deepjit": "c3197879ad961e1ec3ca51d0228689a36e608da638810999bb468a8a477126ea",
    "v3-deepjit": "e517f2d2ca8460712ce44e69033539398309d5fb39606620cc0999235f155807",
    "v1-legacy": "dd049b510bc6ae2a07e9017eda90011d892f2c76af1ce4bac0ae043c78d64c12",
}


def test_every_stored_artifact_is_tested_and_as_it_was_written() -> None:
    found = {p.name.removesuffix(".tar.zst"): hashlib.sha256(p.read_bytes()).hexdigest() for p in DATA.glob("*.zst")}
    assert found == SHA256


@pytest.mark.parametrize("name", SHA256)
def test_a_stored_artifact_still_inspects_and_restores(name: str, run: Run, tmp_path: Path) -> None:
    artifact = DATA / f"{name}.tar.zst"
    done = run("inspect", artifact, "--json")
    assert done.returncode == 0, done.stderr
    index = json.loads(done.stdout)
    schema, _, generation = name.removeprefix("v").partition("-")
    assert (str(index["schema_version"]), index["fingerprint"]["generation"]) == (schema, generation)
    # --force: the DeepGEMM that is installed here may be a newer one than the artifact's.
    options = ["--deep-gemm", LEGACY] if generation == "legacy" else []
    done = run("restore", artifact, "--to", tmp_path / "restored", "--force", *options)
    assert done.returncode == 0, done.stderr
    entries = sorted((tmp_path / "restored" / "cache").iterdir())
    assert len(entries) == len(index["entries"]) > 0
    restored = {hashlib.sha256((entry / "kernel.cubin").read_bytes()).hexdigest() for entry in entries}
    assert restored == {f["sha256"] for e in index["entries"] for f in e["files"] if f["name"] == "kernel.cubin"}
    baked = {file["path"]: file["sha256"] for file in index.get("baked", {}).get("files", ())}
    assert {
        path: hashlib.sha256((tmp_path / "restored" / "baked" / path).read_bytes()).hexdigest() for path in baked
    } == baked
    for module in index.get("flashinfer", {}).get("modules", ()):
        [file] = module["files"]
        restored_module = tmp_path / "restored" / "flashinfer" / "modules" / module["name"] / file["name"]
        assert hashlib.sha256(restored_module.read_bytes()).hexdigest() == file["sha256"]
