"""A real registry on loopback, and a proxy before it that makes it fail as networks and registries do."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

CONFIG = """\
version: 0.1
log: {{level: error, accesslog: {{disabled: true}}}}
storage: {{filesystem: {{rootdirectory: {storage}}}, delete: {{enabled: true}}}}
http: {{addr: "127.0.0.1:{port}"}}
{more}
"""


def program(name: str) -> str:
    """The path of a program of Debian's; it is installed first where it is missing and this process may."""
    if shutil.which(name) is None and os.geteuid() == 0 and shutil.which("apt-get"):
        for command in (["update", "-q"], ["install", "-yq", "--no-install-recommends", name]):
            apt = [
                "apt-get",
                "-o",
                "DPkg::Lock::Timeout=200",
                *command,
            ]  # other test processes install it at the same time
            subprocess.run(apt, capture_output=True, check=False, timeout=240)
    return shutil.which(name) or pytest.skip(f"no {name} on PATH, and apt-get did not install one")


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port


class Registry:
    """docker-registry. It can be stopped, and started again with the same contents."""

    def __init__(self, folder: Path, more: str = "") -> None:
        self.storage, self.port = folder / "storage", free_port()
        self.host = f"127.0.0.1:{self.port}"
        self._config = folder / "registry.yml"
        self._config.write_text(CONFIG.format(storage=self.storage, port=self.port, more=more))
        self._program = program("docker-registry")
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [self._program, "serve", str(self._config)]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for _ in range(200):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
                return
            time.sleep(0.05)
        raise AssertionError("docker-registry does not answer")

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def blob(self, digest: str) -> Path:
        """The file in which it keeps a blob."""
        kind, _, digits = digest.partition(":")
        return self.storage / "docker/registry/v2/blobs" / kind / digits[:2] / digits / "data"


@contextlib.contextmanager
def registry(folder: Path, more: str = "") -> Iterator[Registry]:
    folder.mkdir(parents=True, exist_ok=True)
    running = Registry(folder, more)
    running.start()
    try:
        yield running
    finally:
        running.stop()


@dataclass
class Asked:
    """A request that the proxy received."""

    method: str
    path: str
    headers: dict[str, str]


@dataclass
class Answer:
    """What the proxy answers. ``cut``: the connection closes after so many bytes of the body."""

    status: int
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    cut: int | None = None


#: Takes a request and the registry's own answer, and returns the answer to send.
Change = Callable[[Asked, Answer], Answer]


class Middleman:
    """A proxy before a registry. It passes each answer through ``change``, and records the requests in ``asked``."""

    def __init__(self, upstream: str, change: Change = lambda asked, answer: answer) -> None:
        self.change = change
        self.asked: list[Asked] = []
        middleman = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_any(self) -> None:
                length = int(self.headers.get("Content-Length") or 0)
                body = self.rfile.read(length)
                asked = Asked(self.command, self.path, dict(self.headers))
                middleman.asked.append(asked)
                connection = HTTPConnection(upstream, timeout=30)
                kept = {n: v for n, v in asked.headers.items() if n.lower() not in ("connection", "authorization")}
                try:
                    connection.request(self.command, self.path, body, kept)
                    got = connection.getresponse()
                    headers = {n: v for n, v in got.getheaders() if n.lower() not in ("connection", "content-length")}
                    answer = Answer(got.status, headers, got.read())
                    if self.command == "HEAD":
                        headers["Content-Length"] = got.headers.get("Content-Length", "0")
                finally:
                    connection.close()
                answer = middleman.change(asked, answer)
                self.send_response(answer.status)
                for name, value in answer.headers.items():
                    self.send_header(name, value)
                if "Content-Length" not in answer.headers:
                    self.send_header("Content-Length", str(len(answer.body)))
                self.end_headers()
                with contextlib.suppress(OSError):
                    self.wfile.write(answer.body[: answer.cut])
                    if answer.cut is not None:
                        self.close_connection = True
                        self.connection.shutdown(socket.SHUT_RDWR)

            do_GET = do_HEAD = do_PUT = do_POST = do_PATCH = do_DELETE = handle_any

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.handle_error = lambda *_: None  # type: ignore[method-assign]  # the client has closed the connection
        self._server.daemon_threads = True
        self.host = f"127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def __enter__(self) -> Middleman:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Raw:
    """A server that gets each connection as it is, when the headers of a request have arrived, and says what it likes."""

    def __init__(self, answer: Callable[[socket.socket, bytes], object]) -> None:
        self.requests: list[bytes] = []
        self._answer = answer
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.host = f"127.0.0.1:{self._listening.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listening.accept()
                threading.Thread(target=self._one, args=(connection,), daemon=True).start()

    def _one(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError), connection:
            head = b""
            while b"\r\n\r\n" not in head:
                if not (part := connection.recv(65536)):
                    return
                head += part
            self.requests.append(head)
            self._answer(connection, head)

    def __enter__(self) -> Raw:
        return self

    def __exit__(self, *_: object) -> None:
        self._listening.close()


def reply(connection: socket.socket, status: str, *headers: str, body: bytes = b"") -> None:
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", "Connection: close", *headers]
    connection.sendall("\r\n".join(lines).encode() + b"\r\n\r\n" + body)
