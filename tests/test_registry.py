"""Artifacts pushed to a registry and pulled back byte for byte, by cachebuilder and by other tools."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import zstandard

from cachebuilder import building
from cachebuilder.artifact import signature
from cachebuilder.common.folders import Folder
from cachebuilder.errors import ArtifactError, TransferError
from cachebuilder.restoring.machine import Machine
from cachebuilder.restoring.restore import restore
from cachebuilder.ship import fetch, image, locations
from cachebuilder.ship.documents import INDEX, MANIFEST
from cachebuilder.ship.pull import Puller
from cachebuilder.ship.push import push
from cachebuilder.ship.registry import Repository
from cachebuilder.ship.retry import Retries, Watcher
from cachebuilder.verifying.verify import verify
from tests.archives import snapshot
from tests.conftest import ROOT, Run
from tests.registries import Answer, Asked, Middleman, Registry, program
from tests.shipping import FEW, ONE, apply, for_another, into, pull_from, push_to
from tests.test_signature import beside, flip, keys, sign, trusted

__all__ = ["keys"]

#: One generation is enough: a transfer treats the artifacts of both alike.
GENERATIONS = ("deepjit",)


def skopeo(*arguments: str | Path) -> bytes:
    done = subprocess.run([program("skopeo"), *map(str, arguments)], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout


# There and back


@pytest.mark.slow
def test_pushed_copied_by_skopeo_pulled_and_restored_it_is_the_same_and_nothing_is_missing(
    there: Registry, built: building.Built, run: Run, tmp_path: Path
) -> None:
    image = f"127.0.0.1:{there.port}/team/small"
    done = run("push", f"oci://{image}:v1", built.packed.path)
    assert done.returncode == 0, done.stderr
    digest = next(line.split()[1] for line in done.stdout.splitlines() if line.startswith("digest"))
    seen = json.loads(skopeo("inspect", "--tls-verify=false", f"docker://{image}:v1"))
    assert (seen["Digest"], seen["Layers"][0]) == (digest, f"sha256:{built.packed.sha256}")
    skopeo(
        "copy", "--src-tls-verify=false", "--dest-tls-verify=false", f"docker://{image}:v1", f"docker://{image}-copy:v2"
    )
    clean = tmp_path / "clean"
    clean.mkdir()
    done = run("pull", f"oci://{image}-copy@{digest}", "-o", clean / "pulled.tar.zst")
    assert done.returncode == 0, done.stderr
    assert (clean / "pulled.tar.zst").read_bytes() == built.packed.path.read_bytes()
    assert [path.name for path in clean.iterdir()] == ["pulled.tar.zst"]
    done = run("restore", f"oci://{image}-copy@{digest}", "--to", tmp_path / "dir")
    assert done.returncode == 0, done.stderr
    report = verify(tmp_path / "dir", deep_gemm=built.inputs.installation.imported_as)
    assert report.complete and not report.damage


@pytest.mark.slow
def test_build_pushes_what_it_built_and_run_serves_from_there(
    there: Registry, built: building.Built, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    Path("small.yaml").write_bytes(built.inputs.manifest_bytes)
    location = f"oci://{there.host}/built:v1"
    done = run("build", "small.yaml", "-o", location)
    assert done.returncode == 0 and f"pushed    {location}" in done.stdout, done.stderr
    assert hashlib.sha256(Path("dist/small.tar.zst").read_bytes()).hexdigest() == built.packed.sha256
    done = run("run", location, "--to", tmp_path / "dir", "--", "printenv", "DG_JIT_NVCC_COMPILER")
    assert done.returncode == 0 and done.stdout.strip() == f"{tmp_path}/dir/cachebuilder/bin/nvcc", done.stderr


def test_an_oci_layout_of_skopeo_holds_the_artifact_as_a_file_of_its_digest(
    there: Registry, artifact: Path, tmp_path: Path
) -> None:
    push_to(there.host, "layout", artifact)
    skopeo("copy", "--src-tls-verify=false", f"docker://{there.host}/layout:v1", f"oci:{tmp_path}/layout:v1")
    digest = hashlib.sha256(artifact.read_bytes()).hexdigest()
    assert (tmp_path / "layout/blobs/sha256" / digest).read_bytes() == artifact.read_bytes()


def test_the_layers_one_over_the_other_are_the_restored_folder_and_diff_ids_are_theirs(
    there: Registry, artifact: Path, tmp_path: Path
) -> None:
    done = push_to(there.host, "mounted", artifact)
    manifest = json.loads(there.blob(done.digest).read_bytes())
    config = json.loads(there.blob(manifest["config"]["digest"]).read_bytes())
    layers = [there.blob(layer["digest"]).read_bytes() for layer in manifest["layers"]]
    assert layers[0] == artifact.read_bytes()
    assert {layer["mediaType"] for layer in manifest["layers"]} == {"application/vnd.oci.image.layer.v1.tar+zstd"}
    unpacked = [zstandard.ZstdDecompressor().decompressobj().decompress(layer) for layer in layers]
    assert config["rootfs"]["diff_ids"] == [f"sha256:{hashlib.sha256(tar).hexdigest()}" for tar in unpacked]
    assert (config["os"], config["architecture"]) == ("linux", "amd64")
    apply(layers, tmp_path / "mount")
    restore([artifact], tmp_path / "dir", machine=Machine(None), force=True)
    mounted, restored = snapshot(tmp_path / "mount"), snapshot(tmp_path / "dir")
    assert mounted.keys() - restored.keys() == {"artifact.json", "manifest.yaml"}
    assert {name: mounted[name][1] for name in restored} == {name: found[1] for name, found in restored.items()}
    nvcc = "cachebuilder/bin/nvcc"
    assert mounted[nvcc][0] == restored[nvcc][0]


def test_a_legacy_image_has_the_folder_that_legacy_deep_gemm_would_make(tmp_path: Path) -> None:
    path = ROOT / "tests" / "data" / "v1-legacy.tar.zst"
    data = path.read_bytes()
    made = image.make(path, data, ONE)
    apply([data, made.blobs[0][1]], tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "artifact.json", "cache", "cachebuilder", "manifest.yaml", "tmp",
    ]  # fmt: skip
    assert list((tmp_path / "tmp").iterdir()) == []


def test_equal_artifacts_make_equal_images_and_a_second_push_sends_no_blob(there: Registry, artifact: Path) -> None:
    with Middleman(there.host) as between:
        first = push_to(between.host, "again", artifact)
        sent = [asked.method for asked in between.asked]
        between.asked.clear()
        second = push_to(between.host, "again", artifact)
        assert first.digest == second.digest
        assert "PATCH" in sent and "PATCH" not in [asked.method for asked in between.asked]


def test_of_a_damaged_artifact_nothing_is_pushed_that_has_a_name(there: Registry, artifact: Path) -> None:
    artifact.write_bytes(flip(artifact.read_bytes(), 4000))
    with Middleman(there.host) as between, pytest.raises(ArtifactError):
        push_to(between.host, "damaged", artifact)
    assert not [asked for asked in between.asked if "/manifests/" in asked.path]


def test_the_tag_is_put_last(there: Registry, artifact: Path, keys: Path) -> None:
    sign(artifact, keys)
    with Middleman(there.host) as between:
        push_to(between.host, "last", artifact)
        puts = [asked.path for asked in between.asked if asked.method == "PUT" and "/manifests/" in asked.path]
        assert puts[-1].endswith("/manifests/v1") and "/manifests/v1" not in "".join(puts[:-1])


# Several under one tag


def test_of_an_index_the_one_that_fits_is_taken_and_the_others_are_told_with_reasons(
    there: Registry, artifact: Path, run: Run, tmp_path: Path
) -> None:
    other = for_another(artifact, "other", "B200", arch="sm_100a", sm_counts=[148], deep_gemm="9.9.9")
    location = f"oci://{there.host}/several:v1"
    done = run("push", location, other, artifact)
    assert done.returncode == 0, done.stderr
    index = json.loads(skopeo("inspect", "--raw", "--tls-verify=false", location.replace("oci:", "docker:")))
    assert index["mediaType"] == INDEX and len(index["manifests"]) == 2
    assert [entry["annotations"]["cachebuilder.gpu"] for entry in index["manifests"]] == ["B200", "H200"]
    done = run("pull", location, "-o", tmp_path / "got.tar.zst")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "got.tar.zst").read_bytes() == artifact.read_bytes()
    assert "refused   other, B200" in done.stderr and "wanted: 9.9.9" in done.stderr and "deep_gemm" in done.stderr
    done = run("restore", location, "--to", tmp_path / "dir")
    assert done.returncode == 0 and "refused   other, B200" in done.stderr, done.stderr


def test_where_none_of_several_fits_all_reasons_are_given_and_force_takes_the_first(
    there: Registry, artifact: Path, run: Run, tmp_path: Path
) -> None:
    one = for_another(artifact, "one", "B200", deep_gemm="9.9.8")
    two = for_another(artifact, "two", "H20", deep_gemm="9.9.9")
    location = f"oci://{there.host}/none:v1"
    push_to(there.host, "none", one, two)
    done = run("restore", location, "--to", tmp_path / "dir")
    assert done.returncode == 9 and "9.9.8" in done.stderr and "9.9.9" in done.stderr, done.stderr
    assert not (tmp_path / "dir").exists()
    done = run("restore", location, "--to", tmp_path / "dir", "--force")
    assert done.returncode == 0 and "restored  one" in done.stderr, done.stderr


def test_two_for_the_same_machines_are_not_pushed_under_one_tag(there: Registry, artifact: Path) -> None:
    twin = for_another(artifact, "twin", "H200")
    with pytest.raises(TransferError, match="found two for the same"):
        push_to(there.host, "twins", artifact, twin)


def test_an_image_for_each_platform_holds_one_artifact(there: Registry, artifact: Path, tmp_path: Path) -> None:
    reference = locations.parse(f"oci://{there.host}/platforms:v1")
    done = push(reference, [artifact], ("linux/amd64", "linux/arm64"), FEW)
    assert [manifest.platform for manifest in done.targets[0].manifests] == ["linux/amd64", "linux/arm64"]
    assert len(Puller(reference, FEW).look_up()) == 1
    for architecture in ("amd64", "arm64"):
        seen = skopeo(
            "--override-arch", architecture, "inspect", "--tls-verify=false", f"docker://{there.host}/platforms:v1"
        )
        assert json.loads(seen)["Architecture"] == architecture


def test_an_index_that_another_tool_made_of_our_images_will_do(
    there: Registry, artifact: Path, machine: Machine
) -> None:
    other = for_another(artifact, "other", "B200", deep_gemm="9.9.9")
    ours, theirs = push_to(there.host, "joined", artifact, tag="a"), push_to(there.host, "joined", other, tag="b")
    entries = [
        {"mediaType": MANIFEST, "digest": done.digest, "size": there.blob(done.digest).stat().st_size}
        for done in (theirs, ours)
    ]
    repository = Repository(locations.parse(f"oci://{there.host}/joined:v1"), FEW)
    data = json.dumps({"schemaVersion": 2, "mediaType": INDEX, "manifests": entries}).encode()
    repository.push_manifest(data, INDEX, "v1")

    said: list[str] = []
    tries = Retries(0, watcher=Watcher(notice=said.append))
    located = fetch.look_up(f"oci://{there.host}/joined:v1", machine, tries)
    assert ours.digest in located.name
    assert [("9.9.9" in line, theirs.digest in line) for line in said] == [(True, True)]


# Signatures


def test_the_signature_is_attached_and_comes_back_with_the_artifact(
    there: Registry, artifact: Path, keys: Path, run: Run, tmp_path: Path
) -> None:
    sign(artifact, keys)
    location = f"oci://{there.host}/signed:v1"
    done = run("push", location, artifact)
    assert done.returncode == 0 and ", signed" in done.stdout, done.stderr
    digest = next(line.split()[1] for line in done.stdout.splitlines() if line.startswith("digest"))
    tag = digest.replace(":", "-")  # the referrers tag schema: docker-registry has no API
    attached = json.loads(skopeo("inspect", "--raw", "--tls-verify=false", f"docker://{there.host}/signed:{tag}"))
    [entry] = attached["manifests"]
    assert entry["artifactType"] == "application/vnd.cachebuilder.signature.v1"
    assert json.loads(there.blob(entry["digest"]).read_bytes())["subject"]["digest"] == digest
    done = run("pull", location, "-o", tmp_path / "got" / "g.tar.zst", "--trust", keys / "ours.pub")
    assert done.returncode == 0, done.stderr
    got = tmp_path / "got" / "g.tar.zst"
    for suffix in ("", ".sig", ".intoto.json"):
        assert beside(got, suffix).read_bytes() == beside(artifact, suffix).read_bytes()
    done = run("restore", location, "--to", tmp_path / "dir", "--trust", keys / "ours.pub")
    assert done.returncode == 0 and "signed    " in done.stderr and "unchecked" not in done.stderr, done.stderr


@pytest.mark.slow
def test_with_trust_an_unsigned_or_wrongly_signed_image_is_refused_before_it_is_decompressed(
    there: Registry, artifact: Path, keys: Path, run: Run, tmp_path: Path
) -> None:
    push_to(there.host, "unsigned", artifact)
    sign(artifact, keys)
    push_to(there.host, "ours", artifact)
    for name, key in (("unsigned", "ours.pub"), ("ours", "other.pub")):
        code = (
            "import sys\nfrom cachebuilder.artifact import read\nassert callable(read.unpacked)\n"
            "read.unpacked = lambda *_: sys.exit('decompressed')\nfrom cachebuilder.cli.main import main\nmain()"
        )
        command = ["restore", f"oci://{there.host}/{name}:v1", "--to", tmp_path / name, "--trust", keys / key]
        done = subprocess.run([sys.executable, "-c", code, *map(str, command)], capture_output=True, text=True)
        assert done.returncode == 14 and not (tmp_path / name).exists(), done.stderr


@pytest.mark.parametrize("part", ["manifest", "signature", "damaged signature"])
def test_a_broken_attached_signature_does_not_hide_a_valid_one(
    part: str, there: Registry, artifact: Path, keys: Path, tmp_path: Path
) -> None:
    name = "broken-" + part.replace(" ", "-")
    sign(artifact, keys)
    push_to(there.host, name, artifact)
    broken = base64.b64encode(b"x" * 60) if part == "damaged signature" else b"?"
    beside(artifact, ".sig").write_bytes(broken + part.encode())
    beside(artifact, ".intoto.json").unlink()
    push_to(there.host, name, artifact)
    repository = Repository(locations.parse(f"oci://{there.host}/{name}:v1"), FEW)
    newest = repository.referrers(repository.manifest("v1", "it").digest)[-1].digest
    layer = json.loads(there.blob(newest).read_bytes())["layers"][0]["digest"]
    if part != "damaged signature":
        there.blob(newest if part == "manifest" else layer).unlink()
    trust = trusted(keys, "ours.pub")
    got = pull_from(f"oci://{there.host}/{name}:v1", tmp_path / "got", fetch.checker(trust, name))
    assert trust.check_file(got).key is trust.keys[0]


def test_of_several_signatures_the_trusted_one_is_found_whoever_came_last(
    there: Registry, artifact: Path, keys: Path, tmp_path: Path
) -> None:
    sign(artifact, keys)
    push_to(there.host, "rotated", artifact)
    data = artifact.read_bytes()
    beside(artifact, ".sig").write_bytes(signature.sign(data, signature.load_key(keys / "other.pem")))
    beside(artifact, ".intoto.json").unlink()
    push_to(there.host, "rotated", artifact)
    for name in ("ours.pub", "other.pub"):
        trust = trusted(keys, name)
        got = pull_from(f"oci://{there.host}/rotated:v1", tmp_path / name, fetch.checker(trust, "rotated"))
        assert trust.check_file(got).key is trust.keys[0]
    assert not beside(got, ".intoto.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("part", ["index", "manifest", "blob", "list", "attached", "signature"])
def test_a_bit_flipped_on_the_way_is_refused_before_extraction_and_nothing_is_left(
    part: str, there: Registry, artifact: Path, keys: Path, run: Run, tmp_path: Path
) -> None:
    sign(artifact, keys)
    other = for_another(artifact, "other", "B200", deep_gemm="9.9.9")
    done = push_to(there.host, f"flipped-{part}", artifact, other)
    image = done.targets[0].manifests[0].digest
    layers = json.loads(there.blob(image).read_bytes())["layers"]
    attached = Repository(locations.parse(f"oci://{there.host}/flipped-{part}:v1"), FEW).referrers(image)[0].digest
    signatures = json.loads(there.blob(attached).read_bytes())["layers"]
    end = {
        "index": done.digest,
        "manifest": image,
        "blob": layers[0]["digest"],
        "list": image.replace(":", "-"),
        "attached": attached,
        "signature": signatures[0]["digest"],
    }[part]
    flipped: list[str] = []

    def change(asked: Asked, answer: Answer) -> Answer:
        if asked.path.endswith(end):
            flipped.append(asked.path)
            return Answer(answer.status, answer.headers, flip(answer.body, 4 * len(answer.body)))
        return answer

    with Middleman(there.host, change) as between:
        location = f"oci://{between.host}/flipped-{part}@{done.digest}"
        restored = run(
            "restore", location, "--to", tmp_path / "dir", "--trust", keys / "ours.pub",
            CACHEBUILDER_RETRIES="0", CACHEBUILDER_CACHE_DIR=str(tmp_path / "c"),
        )  # fmt: skip
    assert flipped and restored.returncode == 15, restored.stderr
    assert re.search(r"wanted: .*[0-9a-f]{64}\nfound:  .*[0-9a-f]{64}", restored.stderr), restored.stderr
    assert not (tmp_path / "dir").exists() and [*filter(Path.is_file, (tmp_path / "c").rglob("*"))] == []


# On the way


@pytest.mark.slow
def test_of_what_was_fetched_the_last_few_stay(
    there: Registry, artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CACHEBUILDER_CACHE_DIR", str(tmp_path / "c"))
    for number in range(10):
        push_to(there.host, f"few{number}", artifact)
        with fetch.fetched(f"oci://{there.host}/few{number}:v1", Machine(None), FEW) as path:
            os.utime(path.parent, (number, number))
    assert path.exists() and len(list((tmp_path / "c" / "fetched").iterdir())) == 8


@pytest.mark.slow
def test_twelve_at_once_keep_what_they_fetched_until_they_have_used_it(
    there: Registry, artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More than stay in the end: each tidies what was used longest ago, but nothing that another one uses."""
    monkeypatch.setenv("CACHEBUILDER_CACHE_DIR", str(tmp_path / "c"))
    for number in range(12):
        push_to(there.host, f"crowd{number}", artifact)
    meet = threading.Barrier(12)

    def use(number: int) -> bytes:
        try:
            with fetch.fetched(f"oci://{there.host}/crowd{number}:v1", Machine(None), FEW) as path:
                meet.wait(300)  # ends a hang; not how long it may take
                return path.read_bytes()
        except BaseException:
            meet.abort()  # the others wait no longer
            raise

    for _ in range(2):
        with ThreadPoolExecutor(12) as pool:
            uses = [pool.submit(use, number) for number in range(12)]
        failures = [error for one in uses if (error := one.exception())]
        assert [error for error in failures if not isinstance(error, threading.BrokenBarrierError)] == []
        assert {one.result() for one in uses} == {artifact.read_bytes()}
    with fetch.fetched(f"oci://{there.host}/crowd0:v1", Machine(None), FEW):
        assert len(list((tmp_path / "c" / "fetched").iterdir())) == 8


def test_a_folder_that_another_process_removes_before_it_is_opened_is_made_again(
    there: Registry, artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CACHEBUILDER_CACHE_DIR", str(tmp_path / "c"))
    push_to(there.host, "removed", artifact)
    open_folder, removed = Folder.open, []

    def removed_once(self: Folder, name: str) -> Folder:
        if self.path.name == "fetched" and not removed:
            os.rmdir(self.path / name)
            removed.append(name)
        return open_folder(self, name)

    monkeypatch.setattr(Folder, "open", removed_once)
    with fetch.fetched(f"oci://{there.host}/removed:v1", Machine(None), FEW) as path:
        assert path.read_bytes() == artifact.read_bytes()
    assert removed == [path.parent.name]


def test_progress_counts_the_bytes(there: Registry, artifact: Path, tmp_path: Path) -> None:
    reports: list[tuple[str, int, int]] = []

    def progress(step: str, done: int, total: int, share: float | None = None) -> None:
        reports.append((step, done, total))

    tries = Retries(0, watcher=Watcher(progress))
    reference = locations.parse(f"oci://{there.host}/progress:v1")
    push(reference, [artifact], ONE, tries)
    size = artifact.stat().st_size
    assert ("push small.tar.zst", size, size) in reports
    puller = Puller(reference, tries)
    puller.fetch(puller.look_up()[0], into(tmp_path / "got"))
    assert reports[-1] == ("fetch", size, size)


def test_a_restore_of_a_file_imports_nothing_of_the_network(artifact: Path, tmp_path: Path) -> None:
    code = (
        "import sys\nfor name in ('requests', 'urllib3', 'fsspec', 'cachebuilder.ship'): sys.modules[name] = None\n"
        "from cachebuilder.cli.main import main\nmain()"
    )
    command = [sys.executable, "-c", code, "restore", str(artifact), "--to", str(tmp_path / "dir")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_without_a_network_library_the_error_says_what_to_install(artifact: Path) -> None:
    code = "import sys\nsys.modules['requests'] = None\nfrom cachebuilder.cli.main import main\nmain()"
    command = [sys.executable, "-c", code, "push", "oci://127.0.0.1:1/a:b", str(artifact)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 4 and "pip install 'cachebuilder[ship]'" in done.stderr
