"""A registry that gives something else than was asked for: one sentence, and no file of it is left."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cachebuilder import building
from cachebuilder.errors import CacheBuilderError, TransferError
from cachebuilder.ship import locations
from cachebuilder.ship.documents import INDEX, MANIFEST, digest_of
from cachebuilder.ship.pull import Puller
from tests.archives import snapshot
from tests.conftest import Run
from tests.registries import Answer, Asked, Middleman, Registry
from tests.shipping import into, push_to
from tests.test_bad_days import GENERATIONS, ONCE, between, is_blob, left
from tests.test_registry import pull_from
from tests.test_signature import keys, sign

__all__ = ["GENERATIONS", "between", "keys"]


# Other bytes


def wrong_bytes(body: bytes) -> tuple[int, bytes]:
    return 200, body[:-1] + bytes([body[-1] ^ 1])


def too_short(body: bytes) -> tuple[int, bytes]:
    return 200, body[:-10]


def too_long(body: bytes) -> tuple[int, bytes]:
    return 200, body + b"more"


def nothing(body: bytes) -> tuple[int, bytes]:
    return 200, b""


def a_page(body: bytes) -> tuple[int, bytes]:
    return 200, b"<html>please log in to the hotel's network</html>"


@pytest.mark.parametrize(
    ("how", "words"),
    [
        (wrong_bytes, r"not the bytes that were asked for\nwanted: sha256:[0-9a-f]{64}\nfound:  sha256:[0-9a-f]{64}"),
        (too_short, "truncated: it ends after"),
        (too_long, r"wanted \d+ bytes, found more"),
        (nothing, "truncated: it ends after 0 of"),
        (a_page, "truncated: it ends after"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_another_blob_than_was_asked_for_is_refused_and_dir_is_as_before(
    how: Callable[[bytes], tuple[int, bytes]], words: str, between: Middleman, artifact: Path, run: Run, tmp_path: Path
) -> None:
    def change(asked: Asked, answer: Answer) -> Answer:
        if not is_blob(asked, artifact):
            return answer
        status, body = how(artifact.read_bytes())
        return Answer(status, {}, body)

    between.change = change
    to = tmp_path / "dir"
    (to / "cache").mkdir(parents=True)
    before = snapshot(to)
    done = run(
        "restore", f"oci://{between.host}/bad:v1", "--to", to,
        CACHEBUILDER_RETRIES="0", CACHEBUILDER_CACHE_DIR=str(tmp_path / "c"),
    )  # fmt: skip
    assert done.returncode == 15 and re.search(words, done.stderr), done.stderr
    assert snapshot(to) == before and "small.tar.zst" not in left(tmp_path / "c")


def test_a_manifest_that_says_it_is_another_is_refused(between: Middleman, tmp_path: Path) -> None:
    def change(asked: Asked, answer: Answer) -> Answer:
        return Answer(200, answer.headers | {"Docker-Content-Digest": f"sha256:{'0' * 64}"}, answer.body)

    between.change = change
    with pytest.raises(TransferError, match=r"not the bytes that were asked for\nwanted: sha256:000"):
        pull_from(f"oci://{between.host}/bad:v1", tmp_path / "got")


# A hostile index


def image(**changes: Any) -> dict[str, Any]:
    layer = {"mediaType": "application/vnd.oci.image.layer.v1.tar+zstd", "digest": f"sha256:{'1' * 64}", "size": 5}
    found = {"schemaVersion": 2, "mediaType": MANIFEST, "config": layer, "layers": [layer], "annotations": ANNOTATIONS}
    return found | changes


FINGERPRINT = {
    "generation": "deepjit", "deep_gemm": "1", "headers": "0" * 64, "cutlass": "1", "compiler": "n", "arch": "sm_90a",
    "sm_counts": [132], "environment": {},
}  # fmt: skip
ANNOTATIONS = {
    "cachebuilder.fingerprint": json.dumps(FINGERPRINT),
    "cachebuilder.artifact": f"sha256:{'1' * 64}",
    "cachebuilder.name": "evil\x1b[2J\nname",
    "cachebuilder.gpu": "\x1b]0;evil\x07",
}
ENTRY = {"mediaType": MANIFEST, "digest": f"sha256:{'2' * 64}", "size": 5, "annotations": ANNOTATIONS}
LAYER = image()["layers"][0]

HOSTILE = [
    ("no-json", b"{", "found something else"),
    ("a-list", b"[]", "found something else"),
    ("deep", b'{"schemaVersion":2,"a":' + b"[" * 9000 + b"]" * 9000 + b"}", "found something else"),
    ("wide", b'{"schemaVersion":2,"a":[' + b"{}," * 20_000 + b"{}]}", "at most 10000 objects and lists"),
    ("huge", b" " * (5 << 20), "at most 4194304 bytes, found more"),
    ("docker-1", {"schemaVersion": 1, "manifests": []}, "found something else"),
    ("many-entries", {"schemaVersion": 2, "mediaType": INDEX, "manifests": [ENTRY] * 1001}, "at most 1000 entries"),
    ("no-entries", {"schemaVersion": 2, "mediaType": INDEX, "manifests": []}, "found no annotation of one"),
    ("entries-a-number", {"schemaVersion": 2, "mediaType": INDEX, "manifests": 7}, "wanted an index"),
    ("entry-a-number", {"schemaVersion": 2, "mediaType": INDEX, "manifests": [7]}, "wanted a descriptor"),
    ("md5", {"schemaVersion": 2, "mediaType": INDEX, "manifests": [ENTRY | {"digest": "md5:12"}]}, "a sha256 digest"),
    (
        "path-as-digest",
        {"schemaVersion": 2, "mediaType": INDEX, "manifests": [ENTRY | {"digest": "sha256:../../../../etc/passwd"}]},
        "a sha256 digest",
    ),
    ("size-negative", {"schemaVersion": 2, "mediaType": INDEX, "manifests": [ENTRY | {"size": -1}]}, "and size"),
    ("an-index-of-indexes", {"schemaVersion": 2, "mediaType": INDEX, "manifests": [ENTRY | {"mediaType": INDEX}]}, "found no annotation"),
    ("no-annotations", image(annotations={}), "found no annotation of one"),
    ("annotations-a-list", image(annotations=[1]), "found no annotation of one"),
    (
        "fingerprint-with-escapes",
        image(annotations=ANNOTATIONS | {"cachebuilder.fingerprint": json.dumps(FINGERPRINT | {"arch": "\x1b[2J"})}),
        "wanted a line of printable characters",
    ),
    (
        "fingerprint-no-json",
        image(annotations=ANNOTATIONS | {"cachebuilder.fingerprint": "{"}),
        "annotation cachebuilder.fingerprint: wanted JSON",
    ),
    ("artifact-no-digest", image(annotations=ANNOTATIONS | {"cachebuilder.artifact": "\x1b[2J"}), "wanted a sha256 digest"),
    ("half-a-character", image(annotations=ANNOTATIONS | {"cachebuilder.artifact": "\ud800"}), "wanted a sha256 digest"),
    ("half-a-fingerprint", image(annotations=ANNOTATIONS | {"cachebuilder.fingerprint": "\ud800"}), "found no annotation of one"),
    ("no-layer", image(layers=[]), "found no layer"),
    ("layers-an-object", image(layers={}), "found no layer"),
    ("another-layer", image(layers=[LAYER | {"digest": f"sha256:{'3' * 64}"}]), "of another artifact than its first layer"),
    ("a-layer-of-terabytes", image(layers=[LAYER | {"size": 1 << 45}]), "wanted at most 1073741824 bytes"),
]  # fmt: skip


@pytest.mark.parametrize(("document", "words"), [pytest.param(d, w, id=i) for i, d, w in HOSTILE])
def test_a_hostile_index_or_manifest_is_one_sentence(
    document: Any, words: str, between: Middleman, tmp_path: Path
) -> None:
    data = document if isinstance(document, bytes) else json.dumps(document).encode()
    between.change = lambda asked, answer: (
        Answer(200, {"Content-Type": "application/json"}, data)
        if re.search("/manifests/(v1|sha256:)", asked.path)
        else answer
    )
    with pytest.raises(CacheBuilderError, match=words) as caught:
        puller = Puller(locations.parse(f"oci://{between.host}/bad:v1"), ONCE)
        puller.fetch(puller.look_up()[0], into(tmp_path / "got"))
    assert isinstance(caught.value, TransferError) and str(caught.value).replace("\n", "").isprintable()
    assert not (tmp_path / "got").exists() and len(str(caught.value)) < 1000


def test_what_a_hostile_index_says_of_itself_leaves_the_terminal_alone(between: Middleman) -> None:
    data = json.dumps({"schemaVersion": 2, "mediaType": INDEX, "manifests": [ENTRY, ENTRY]}).encode()
    between.change = lambda asked, answer: Answer(200, {"Content-Type": INDEX}, data)
    [candidate] = Puller(locations.parse(f"oci://{between.host}/bad:v1"), ONCE).look_up()
    assert str(candidate).isprintable() and "evil" in str(candidate)


@pytest.mark.parametrize(
    "title", ["../../evil.tar.zst", "/etc/evil.tar.zst", "a/b.tar.zst", "..", "", ".bashrc", "a\n.tar.zst"]
)
def test_a_title_that_leaves_its_folder_names_no_file(
    title: str, between: Middleman, there: Registry, artifact: Path, tmp_path: Path
) -> None:
    def change(asked: Asked, answer: Answer) -> Answer:
        if asked.path.endswith("/manifests/v1"):
            document = json.loads(answer.body)
            document["layers"][0]["annotations"] = {"org.opencontainers.image.title": title}
            renamed.append(json.dumps(document).encode())
        if "/manifests/v1" in asked.path or "/manifests/sha256:" in asked.path:
            return Answer(200, {"Content-Type": MANIFEST}, renamed[0])
        return answer

    renamed: list[bytes] = []
    between.change = change
    got = pull_from(f"oci://{between.host}/bad:v1", tmp_path / "got")
    assert got == tmp_path / "got" / f"{digest_of(artifact.read_bytes())[7:19]}.tar.zst"


@pytest.mark.parametrize("range", ["0-\u00b2", "0-" + "9" * 5000, "0--1", "bytes=0-x", "5-9"])
def test_a_range_that_is_no_number_begins_the_upload_anew(range: str, there: Registry, artifact: Path) -> None:
    lost: list[str] = []

    def change(asked: Asked, answer: Answer) -> Answer:
        if asked.method == "PATCH" and not lost:
            lost.append(asked.path)
            return Answer(503, {"Retry-After": "0"}, b"")
        if asked.method == "GET" and "/blobs/uploads/" in asked.path:
            return Answer(204, {"Location": asked.path, "Range": range}, b"")
        return answer

    with Middleman(there.host, change) as between:
        push_to(between.host, f"range-{digest_of(range.encode())[7:15]}", artifact)
    assert lost


@pytest.mark.parametrize("platform", [{"os": "a/b", "architecture": "c"}, {"os": "\ud800"}, {"os": ["x"]}, "x", 7])
def test_a_platform_that_is_none_does_not_break_a_push(
    platform: Any, there: Registry, artifact: Path, keys: Path
) -> None:
    """The registry's list of what is attached is read, and written again with one entry more."""
    sign(artifact, keys)
    listed: list[str] = []

    def change(asked: Asked, answer: Answer) -> Answer:
        if asked.method == "GET" and "/manifests/sha256-" in asked.path and not listed:
            listed.append(asked.path)
            index = {"schemaVersion": 2, "mediaType": INDEX, "manifests": [ENTRY | {"platform": platform}]}
            return Answer(200, {"Content-Type": INDEX}, json.dumps(index).encode())
        return answer

    with (
        Middleman(there.host, change) as between,
        contextlib.suppress(TransferError),
    ):  # the entry's manifest is missing
        push_to(between.host, f"platform-{len(str(platform))}", artifact)
    assert listed


def test_a_body_without_an_end_is_not_read_to_the_end(between: Middleman, tmp_path: Path) -> None:
    """No length is said, and bytes keep coming: reading stops at the limit."""
    between.change = lambda asked, answer: Answer(200, {"Content-Type": MANIFEST}, b" " * (20 << 20))
    with pytest.raises(TransferError, match="at most 4194304 bytes"):
        Puller(locations.parse(f"oci://{between.host}/bad:v1"), ONCE).look_up()


@pytest.mark.slow
def test_mutated_answers_and_configs_are_taken_right_or_refused(built: building.Built) -> None:
    """A small run of the fuzzer, with a fixed seed."""
    fuzzer = Path(__file__).with_name("fuzz_registry.py")
    command = [sys.executable, fuzzer, built.packed.path, "150", "1", built.inputs.installation.imported_as]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert figures["taken"] > 10 and figures["refusals"] > 15, figures
