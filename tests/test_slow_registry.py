"""A registry that never ends its answer, however slowly it sends: one sentence after a bounded time."""

from __future__ import annotations

import itertools
import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cachebuilder.errors import TransferError
from cachebuilder.ship import locations
from cachebuilder.ship.documents import MANIFEST, digest_of
from cachebuilder.ship.pull import Puller
from cachebuilder.ship.retry import Patience, Retries
from tests.registries import Raw
from tests.shipping import into
from tests.test_hostile_registry import image

#: Half a second for the headers, and a body of 10 kB a second.
HASTY = Retries(0, patience=Patience(0.5, 10_000))
HEAD = b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Type: " + MANIFEST.encode() + b"\r\n"


def drip(connection: socket.socket, parts: Iterator[bytes] | list[bytes]) -> None:
    """A part every 50 ms, for as long as somebody reads, but not for longer than 10 s."""
    for part in itertools.islice(parts, 200):
        connection.sendall(part)
        time.sleep(0.05)


DRIPS = {
    "the-status-line": [b"HTTP/1.1 ", *[b" "] * 200],
    "the-headers": [HEAD + b"X: ", *[b"x"] * 200],
    "continue-for-ever": [b"HTTP/1.1 100 Continue\r\n\r\n"] * 200,
    "a-body-with-a-length": [HEAD + b"Content-Length: 1000\r\n\r\n", *[b" "] * 200],
    "a-body-without-an-end": [HEAD + b"\r\n", *[b" "] * 200],
    "a-chunk": [HEAD + b"Transfer-Encoding: chunked\r\n\r\nff\r\n", *[b" "] * 200],
    "the-size-of-a-chunk": [HEAD + b"Transfer-Encoding: chunked\r\n\r\n", *[b"0"] * 200],
    "trailers": [HEAD + b"Transfer-Encoding: chunked\r\n\r\n0\r\n", *[b"x: y\r\n"] * 200],
    "the-body-of-an-error": [b"HTTP/1.1 403 No\r\nContent-Length: 1000\r\n\r\n", *[b" "] * 200],
}


@pytest.mark.slow
@pytest.mark.parametrize("parts", [pytest.param(parts, id=name) for name, parts in DRIPS.items()])
def test_a_registry_that_drips_is_given_up(parts: list[bytes]) -> None:
    with Raw(lambda connection, head: drip(connection, iter(parts))) as server:
        started = time.monotonic()
        with pytest.raises(TransferError) as caught:
            Puller(locations.parse(f"oci://{server.host}/a:b"), HASTY).look_up()
        assert time.monotonic() - started < 5, "the server would go on for ten seconds"
        assert "too slowly" in str(caught.value) or "403" in str(caught.value)


def test_a_token_service_that_drips_is_given_up() -> None:
    def answer(connection: socket.socket, head: bytes) -> None:
        if head.startswith(b"GET /token"):
            drip(connection, iter([b"HTTP/1.1 200 OK\r\n\r\n", *[b" "] * 200]))
            return
        realm = f'Bearer realm="http://{server.host}/token",service="s",scope="x"'
        connection.sendall(
            b"HTTP/1.1 401 No\r\nContent-Length: 0\r\nConnection: close\r\nWWW-Authenticate: "
            + realm.encode()
            + b"\r\n\r\n"
        )

    with Raw(answer) as server, pytest.raises(TransferError, match="too slowly"):
        Puller(locations.parse(f"oci://{server.host}/a:b"), HASTY).look_up()


@pytest.mark.slow
def test_a_blob_that_drips_is_given_up_and_one_that_is_merely_slow_is_not(tmp_path: Path) -> None:
    data = bytes(20_000)
    pause = [0.05]
    layer = image()["layers"][0] | {"digest": digest_of(data), "size": len(data)}
    annotations = image()["annotations"] | {"cachebuilder.artifact": digest_of(data)}
    manifest = json.dumps(image(layers=[layer], annotations=annotations)).encode()

    def answer(connection: socket.socket, head: bytes) -> None:
        path = head.split()[1]
        if b"/blobs/" in path:
            connection.sendall(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(data))
            step = 1 if pause[0] else 1000
            for at in range(0, len(data), step):
                connection.sendall(data[at : at + step])
                time.sleep(pause[0] or 0.05)
        elif b"/manifests/b" in path or b"/manifests/sha256:" in path:
            connection.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(manifest) + manifest)
        else:
            connection.sendall(b"HTTP/1.1 404 No\r\nConnection: close\r\nContent-Length: 0\r\n\r\n")

    with Raw(answer) as server:
        puller = Puller(locations.parse(f"oci://{server.host}/a:b"), HASTY)
        candidate = puller.look_up()[0]
        with pytest.raises(TransferError, match="too slowly"):
            puller.fetch(candidate, into(tmp_path))
        pause[0] = 0  # 20 kB a second, for twice the time that headers have
        assert puller.fetch(candidate, into(tmp_path)).read_bytes() == data


def test_a_line_between_chunks_without_an_end_is_not_kept_in_memory() -> None:
    def answer(connection: socket.socket, head: bytes) -> None:
        connection.sendall(HEAD + b"Transfer-Encoding: chunked\r\n\r\n")
        for _ in range(2000):
            connection.sendall(b"0" * 65536)
        sent.append(True)

    sent: list[bool] = []
    with Raw(answer) as server, pytest.raises(TransferError):
        Puller(locations.parse(f"oci://{server.host}/a:b"), HASTY).look_up()
    assert not sent


def test_a_redirect_with_a_body_without_an_end_is_not_read() -> None:
    def answer(connection: socket.socket, head: bytes) -> None:
        if b"/elsewhere" in head.split()[1]:
            connection.sendall(b"HTTP/1.1 404 No\r\nConnection: close\r\nContent-Length: 0\r\n\r\n")
            return
        connection.sendall(b"HTTP/1.1 307 There\r\nLocation: /elsewhere\r\n\r\n")
        for _ in range(2000):
            connection.sendall(bytes(65536))
        sent.append(True)

    sent: list[bool] = []
    with Raw(answer) as server, pytest.raises(TransferError, match="not found"):
        Puller(locations.parse(f"oci://{server.host}/a:b"), HASTY).look_up()
    assert not sent
