"""References to a registry: what is one, and when it is spoken to without TLS."""

from __future__ import annotations

import base64
import re
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from cachebuilder import building
from cachebuilder.errors import TransferError
from cachebuilder.ship import locations
from tests.conftest import Run
from tests.registries import Raw, reply

#: One generation is enough: a transfer treats the artifacts of both alike.
GENERATIONS = ("deepjit",)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("oci://h", "a repository's name"),
        ("oci://h/Upper:v1", "in lower case"),
        ("oci://h/a", "a tag or a digest"),
        ("oci://h/a:b c", "a tag of letters"),
        ("oci://h/a@sha256:12", "64 hexadecimal digits"),
        ("oci:///a:b", "wanted oci://HOST/NAME:TAG"),
        ("oci://h/../a:b", "a repository's name"),
        ("oci://h/a/../b:c", "a repository's name"),
        ("oci://h?x=1/a:b", "wanted oci://HOST/NAME:TAG"),
    ],
)
def test_a_reference_that_is_none_is_one_sentence(text: str, words: str) -> None:
    with pytest.raises(TransferError, match=words):
        locations.parse(text)


def test_a_password_in_a_reference_is_refused_and_not_repeated() -> None:
    with pytest.raises(TransferError, match="with a user in front") as caught:
        locations.parse("oci://me:hunter2@h/a:b")
    assert "hunter2" not in str(caught.value) + str(caught.value.hint)


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("oci://localhost:5000/a:b", True),
        ("oci://127.0.0.1/a:b", True),
        ("oci://[::1]:5000/a:b", True),
        ("oci://registry.example/a:b", False),
        ("oci://10.0.0.1/a:b", False),
        ("oci+http://10.0.0.1/a:b", True),
        ("oci://localhost.example/a:b", False),
    ],
)
def test_only_loopback_is_spoken_to_without_tls_unasked(text: str, plain: bool) -> None:
    reference = locations.parse(text)
    assert reference.plain is plain and str(reference) == text


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("http://user:pw@h.example:80/a.tar.zst", "http://h.example:80/a.tar.zst"),
        ("https://u:p@ss@h/a", "https://h/a"),
        ("https://h/a.tar.zst?X-Amz-Signature=secret#sha256=12", "https://h/a.tar.zst?…#sha256=12"),
        (
            "no answer from http://u:p@h/a, nor from ftp://x:y@h/b?t=1",
            "no answer from http://h/a, nor from ftp://h/b?…",
        ),
        ("oci://h/a@sha256:12", "oci://h/a@sha256:12"),
        ("s3://bucket/a@b.tar.zst", "s3://bucket/a@b.tar.zst"),
        ("dist/a@b?c.tar.zst", "dist/a@b?c.tar.zst"),
    ],
)
def test_a_location_is_shown_without_its_secrets(text: str, words: str) -> None:
    assert locations.shown(text) == words


@pytest.fixture
def guarded(artifact: Path) -> Iterator[tuple[Raw, str]]:
    """A web server that gives an artifact to whoever knows the password, and the location with it."""
    data, basic = artifact.read_bytes(), base64.b64encode(b"fleet:swordfish")

    def answer(connection: socket.socket, head: bytes) -> None:
        if basic not in head:
            reply(connection, "401 Who", 'WWW-Authenticate: Basic realm="x"')
        elif head.split()[1] != b"/a.tar.zst":
            reply(connection, "404 No")
        elif match := re.search(rb"(?i)range: bytes=(\d+)-(\d+)", head):
            start, end = int(match[1]), int(match[2])
            part, most = data[start : end + 1], len(data)
            reply(connection, "206 Part", f"Content-Range: bytes {start}-{end}/{most}", body=part)
        elif head.startswith(b"HEAD"):
            connection.sendall(
                b"HTTP/1.1 200 OK\r\nETag: 1\r\nAccept-Ranges: bytes\r\nContent-Length: %d\r\n\r\n" % len(data)
            )
        else:
            reply(connection, "200 OK", "ETag: 1", body=data)

    with Raw(answer) as server:
        yield server, f"http://fleet:swordfish@{server.host}/a.tar.zst"


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["a.tar.zst", "none.tar.zst", "a.tar.zst#sha256=" + "0" * 64, "a.tar.zst?token=swordfish"]
)
def test_a_password_in_a_location_is_in_no_message_and_in_no_record(
    name: str, guarded: tuple[Raw, str], built: building.Built, run: Run, tmp_path: Path
) -> None:
    location = guarded[1].replace("a.tar.zst", name)
    to = tmp_path / "dir"
    sync = run("sync", location, "--to", to, "-v", CACHEBUILDER_RETRIES="0")
    restore = run("restore", location, "--to", tmp_path / "other", "-v", "--trust", tmp_path, CACHEBUILDER_RETRIES="0")
    inspect = run("inspect", location, CACHEBUILDER_RETRIES="0")
    for done in (sync, restore, inspect):
        assert "swordfish" not in done.stdout + done.stderr and "Traceback" not in done.stderr, done.stderr
    assert (sync.returncode == 0) is (name == "a.tar.zst"), sync.stderr
    for path in to.rglob("*.json"):
        assert b"swordfish" not in path.read_bytes()
    if name == "a.tar.zst":
        assert guarded[0].host.encode() in next(to.glob("generations/*/synced.json")).read_bytes()
