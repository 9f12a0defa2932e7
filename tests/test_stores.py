"""Object stores: moto's server speaks S3 on loopback, and s3fs speaks to it as to any other."""

from __future__ import annotations

import hashlib
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cachebuilder.errors import CacheBuilderError, SignatureError, TransferError
from cachebuilder.ship.fetch import checker
from cachebuilder.ship.retry import Retries
from cachebuilder.ship.stores import Store, put_all
from tests.conftest import Run
from tests.registries import free_port
from tests.shipping import FEW, for_another, into
from tests.test_signature import beside, flip, keys, sign, trusted

__all__ = ["keys"]


#: One generation is enough: a transfer treats the artifacts of both alike.
GENERATIONS = ("deepjit",)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """The folder of a bucket, which ends with a slash; the environment names the server."""
    port = free_port()
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    settings = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "fleet",
        "AWS_SECRET_ACCESS_KEY": "swordfish",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name, value)
        try:
            for _ in range(900):  # moto imports all of AWS first
                try:
                    socket.create_connection(("127.0.0.1", port), 1).close()
                    break
                except OSError:
                    time.sleep(0.1)
            import fsspec

            fsspec.get_filesystem_class("s3").clear_instance_cache()  # one of an earlier server is kept otherwise
            fsspec.filesystem("s3").mkdir("caches")
            yield "s3://caches/"
        finally:
            server.kill()
            server.wait()


def fetch(location: str, folder: Path, check: object = None) -> Path:
    store = Store(location, FEW)
    return store.fetch(store.describe(), into(folder), check)  # type: ignore[arg-type]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def test_stored_fetched_and_restored_it_is_the_same_with_its_signature(
    s3: str, artifact: Path, keys: Path, run: Run, tmp_path: Path
) -> None:
    sign(artifact, keys)
    done = run("push", f"{s3}trip/", artifact)
    assert done.returncode == 0 and f"stored    {s3}trip/small.tar.zst" in done.stdout, done.stderr
    done = run("pull", f"{s3}trip/small.tar.zst", "-o", tmp_path / "got" / "a.tar.zst", "--trust", keys / "ours.pub")
    assert done.returncode == 0, done.stderr
    for suffix in ("", ".sig", ".intoto.json"):
        assert beside(tmp_path / "got" / "a.tar.zst", suffix).read_bytes() == beside(artifact, suffix).read_bytes()
    done = run("restore", f"{s3}trip/small.tar.zst", "--to", tmp_path / "dir", "--trust", keys / "ours.pub")
    assert done.returncode == 0 and "signed    " in done.stderr, done.stderr


@pytest.mark.parametrize("verb", ["inspect", "verify-signature", "doctor", "diff"])
def test_a_verb_takes_a_location_where_it_takes_an_artifact(
    verb: str, s3: str, artifact: Path, keys: Path, run: Run
) -> None:
    sign(artifact, keys)
    put_all(f"{s3}verbs/", [artifact], FEW)
    location = f"{s3}verbs/small.tar.zst" if verb != "diff" else f"file://{artifact}"
    more = {"verify-signature": ["--trust", keys / "ours.pub"], "diff": [f"{s3}verbs/small.tar.zst"]}.get(verb, [])
    done = run(verb, location, *more)
    assert done.returncode == 0, done.stderr
    assert "small" in done.stdout or "5 equal" in done.stdout or verb == "doctor"


def test_a_file_location_is_the_file_itself(artifact: Path, run: Run, tmp_path: Path) -> None:
    done = run("restore", f"file://{artifact}", "--to", tmp_path / "dir")
    assert done.returncode == 0 and "fetched" not in done.stderr, done.stderr
    assert run("inspect", f"file://localhost{artifact}").returncode == 0
    done = run("restore", f"file://{tmp_path}/none.tar.zst", "--to", tmp_path / "other")
    assert done.returncode == 8 and "none.tar.zst: cannot be read" in done.stderr, done.stderr


def test_with_trust_what_is_not_signed_or_changed_is_refused_and_no_file_is_left(
    s3: str, artifact: Path, keys: Path, run: Run, tmp_path: Path
) -> None:
    put_all(f"{s3}unsigned/", [artifact], FEW)
    sign(artifact, keys)
    put_all(f"{s3}changed/", [artifact], FEW)
    changed = tmp_path / "flipped"
    changed.write_bytes(flip(artifact.read_bytes(), 4000))
    Store(f"{s3}changed/small.tar.zst", FEW)._objects.fs.put_file(str(changed), "caches/changed/small.tar.zst")
    for name, words in (("unsigned", "not signed"), ("changed", "the signature is not valid")):
        location = f"{s3}{name}/small.tar.zst"
        with pytest.raises(SignatureError, match=words):
            fetch(location, tmp_path / name, checker(trusted(keys), location))
        assert names(tmp_path / name) == []
    done = run("restore", f"{s3}changed/small.tar.zst", "--to", tmp_path / "dir", "--trust", keys / "ours.pub")
    assert done.returncode == 14 and not (tmp_path / "dir").exists(), done.stderr


def test_a_pinned_digest_must_be_the_objects(s3: str, artifact: Path, tmp_path: Path) -> None:
    put_all(f"{s3}pinned/", [artifact], FEW)
    location = f"{s3}pinned/small.tar.zst"
    sha256 = hashlib.sha256(artifact.read_bytes()).hexdigest()
    assert fetch(f"{location}#sha256={sha256}", tmp_path / "a").read_bytes() == artifact.read_bytes()
    with pytest.raises(TransferError, match=f"wanted: sha256:{'0' * 64}\nfound:  sha256:{sha256}"):
        fetch(f"{location}#sha256={'0' * 64}", tmp_path / "b")
    assert names(tmp_path / "b") == []


def test_a_signature_of_an_older_object_does_not_stay_beside_a_newer_one(
    s3: str, artifact: Path, keys: Path, tmp_path: Path
) -> None:
    sign(artifact, keys)
    put_all(f"{s3}older/", [artifact], FEW)
    fetch(f"{s3}older/small.tar.zst", tmp_path / "got")
    beside(artifact, ".sig").unlink()
    beside(artifact, ".intoto.json").unlink()
    put_all(f"{s3}older/", [artifact], FEW)
    fetch(f"{s3}older/small.tar.zst", tmp_path / "got")
    assert names(tmp_path / "got") == ["small.tar.zst"]


def test_an_object_that_is_replaced_while_it_is_fetched_is_not_mixed(
    s3: str, artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cachebuilder.ship.stores._RANGE_BYTES", 4096)
    newer = for_another(artifact, "newer", "H200")
    put_all(f"{s3}moves/small.tar.zst", [artifact], FEW)
    store = Store(f"{s3}moves/small.tar.zst", FEW)
    real, count = store._objects.fs.cat_file, []

    def cat_file(path: str, start: int | None = None, end: int | None = None, **options: float) -> bytes:
        count.append(start)
        if len(count) == 2:
            put_all(f"{s3}moves/small.tar.zst", [newer], FEW)
        return real(path, start=start, end=end)  # type: ignore[no-any-return]

    monkeypatch.setattr(store._objects.fs, "cat_file", cat_file)
    with pytest.raises(TransferError, match=r"the object changed during the fetch|truncated"):
        store.fetch(store.describe(), into(tmp_path / "got"))
    assert "small.tar.zst" not in names(tmp_path / "got")


def test_a_fetch_that_breaks_goes_on_where_it_broke(
    s3: str, artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_all(f"{s3}breaks/", [artifact], FEW)
    store = Store(f"{s3}breaks/small.tar.zst", FEW)
    monkeypatch.setattr("cachebuilder.ship.stores._RANGE_BYTES", 4096)
    real, asked = store._objects.fs.cat_file, []

    def cat_file(path: str, start: int = 0, end: int | None = None, **options: float) -> bytes:
        asked.append(start)
        if len(asked) in (2, 4):
            raise ConnectionResetError(104, "Connection reset by peer")
        return real(path, start=start, end=end)  # type: ignore[no-any-return]

    monkeypatch.setattr(store._objects.fs, "cat_file", cat_file)
    got = store.fetch(store.describe(), into(tmp_path / "got"))
    assert got.read_bytes() == artifact.read_bytes()
    assert asked[:4] == [0, 4096, 4096, 8192]


@pytest.mark.parametrize(
    ("location", "words"),
    [
        ("s3://caches/none.tar.zst", "not found"),
        ("s3://no-such-bucket/none.tar.zst", "not found|NoSuchBucket"),
        ("s3://caches/a.tar.zst#sha256=12", "64 hexadecimal digits"),
        ("s3://caches/folder/", "an object's name at the end"),
        ("simplecache::s3://caches/a.tar.zst", "an object's name at the end"),
        ("nonsense://caches/a.tar.zst", "nonsense"),
    ],
)
def test_a_location_that_leads_nowhere_is_one_sentence(location: str, words: str, s3: str, tmp_path: Path) -> None:
    with pytest.raises(CacheBuilderError, match=words):
        fetch(location, tmp_path)


def test_a_store_that_is_down_is_one_sentence_without_the_keys(artifact: Path, run: Run, tmp_path: Path) -> None:
    settings = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{free_port()}", "AWS_ACCESS_KEY_ID": "fleet",
        "AWS_SECRET_ACCESS_KEY": "swordfish", "AWS_MAX_ATTEMPTS": "1", "CACHEBUILDER_RETRIES": "0",
    }  # fmt: skip
    done = run("restore", "s3://caches/a.tar.zst", "--to", tmp_path / "dir", **settings)
    assert done.returncode == 15 and "Traceback" not in done.stderr, done.stderr
    assert "swordfish" not in done.stderr and not (tmp_path / "dir").exists()


def test_a_clock_that_is_wrong_is_what_the_hint_speaks_of(
    s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """S3's own answer to a request that was signed at another time than now."""
    from botocore.exceptions import ClientError

    def refuse(*_: object, **__: object) -> None:
        text = "The difference between the request time and the current time is too large."
        raise ClientError({"Error": {"Code": "RequestTimeTooSkewed", "Message": text}}, "HeadObject")

    store = Store(f"{s3}a.tar.zst", Retries(0))
    monkeypatch.setattr(store._objects.fs, "info", refuse)
    with pytest.raises(TransferError, match="RequestTimeTooSkewed") as caught:
        store.describe()
    assert "clock" in str(caught.value.hint)
