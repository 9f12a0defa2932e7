"""HTTP connections that bound what a server may send: how slowly, and how long a line.

A timeout of a socket begins again with each byte, so a server that sends a byte a second keeps a reader for ever. These
connections give each answer one deadline, for its headers, its chunks and its trailers.
"""

from __future__ import annotations

import errno
import http.client
import io
import socket
import time
from contextvars import ContextVar
from typing import Any

import requests
import urllib3

from cachebuilder.ship.retry import Patience

#: The longest line of headers or between chunks; http.client allows as much for a header.
_MAX_LINE_BYTES = 64 << 10


class Answer:
    """One answer of a server while it is read.

    Args:
        most: the bytes of its body that are worth waiting for.
    """

    def __init__(self, patience: Patience, most: int) -> None:
        self._patience, self._most = patience, most
        self._started = time.monotonic()
        self._received = 0
        self.in_body = False

    def begin(self) -> None:
        """Start the clock: the request has been sent."""
        self._started = time.monotonic()

    def count(self, size: int) -> None:
        """Bytes have arrived."""
        self._received += size

    def seconds_left(self) -> float:
        """Until the answer is too slow. The headers have a fixed time; each byte of the body prolongs it."""
        worth = min(self._received, self._most) if self.in_body else 0
        return self._patience.seconds + worth / self._patience.bytes_per_second - (time.monotonic() - self._started)

    def too_slow(self) -> TimeoutError:
        """The error for an answer that does not end in time."""
        seconds = time.monotonic() - self._started
        return TimeoutError(
            errno.ETIMEDOUT, f"the answer comes too slowly: {self._received} bytes in {seconds:.0f} seconds"
        )


#: The answer that the next response on a connection of this context is.
expected: ContextVar[Answer] = ContextVar("expected")


class _Timed(io.RawIOBase):
    """A socket's bytes, until the answer's time is over."""

    def __init__(self, sock: socket.socket, answer: Answer) -> None:
        self._sock, self._answer = sock, answer
        self._file = sock.makefile("rb", buffering=0)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        left, timeout = self._answer.seconds_left(), self._sock.gettimeout()
        if left <= 0:
            raise self._answer.too_slow()
        if timeout is None or left < timeout:
            self._sock.settimeout(left)
        try:
            size = self._file.readinto(buffer)
        except TimeoutError:
            if self._answer.seconds_left() <= 0:
                raise self._answer.too_slow() from None
            raise
        finally:
            self._sock.settimeout(timeout)
        self._answer.count(size or 0)
        return size

    def close(self) -> None:
        self._file.close()
        super().close()


class _Lines(io.BufferedReader):
    """A reader whose lines have a limit: urllib3 before 2.7 reads the lines between chunks without one."""

    def readline(self, size: int | None = -1, /) -> bytes:
        line = super().readline(_MAX_LINE_BYTES + 2 if size is None or size < 0 else size)
        if len(line) > _MAX_LINE_BYTES + 1:
            raise OSError(errno.EMSGSIZE, "a line of the answer is too long")
        return line


class _Response(http.client.HTTPResponse):
    def __init__(self, sock: socket.socket, *arguments: Any, **options: Any) -> None:
        super().__init__(sock, *arguments, **options)
        self._answer = expected.get()
        self._answer.begin()
        timed = _Lines(_Timed(sock, self._answer))
        self.fp.close()
        self.fp = timed

    def begin(self) -> None:
        super().begin()
        self._answer.in_body = True


class _Connection(urllib3.connection.HTTPConnection):
    response_class = _Response


class _TlsConnection(urllib3.connection.HTTPSConnection):
    response_class = _Response


class _Pool(urllib3.HTTPConnectionPool):
    ConnectionCls = _Connection


class _TlsPool(urllib3.HTTPSConnectionPool):
    ConnectionCls = _TlsConnection


class Adapter(requests.adapters.HTTPAdapter):
    """requests' adapter with these connections, direct or through an HTTP proxy. The caller sets `expected`."""

    def init_poolmanager(self, *arguments: Any, **options: Any) -> None:
        """Make the connections that go to the server itself."""
        super().init_poolmanager(*arguments, **options)
        self.poolmanager.pool_classes_by_scheme = {"http": _Pool, "https": _TlsPool}

    def proxy_manager_for(self, proxy: str, **options: Any) -> Any:
        """Make the connections that go through a proxy."""
        manager = super().proxy_manager_for(proxy, **options)
        if not proxy.lower().startswith("socks"):  # a SOCKS proxy has connections of its own
            manager.pool_classes_by_scheme = {"http": _Pool, "https": _TlsPool}
        return manager
