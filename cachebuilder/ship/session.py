"""HTTP to a registry: `requests` with docker's authentication, limits on what is read, and errors a person can act on.

Proxies and CA bundles come from the environment, as requests takes them (``HTTPS_PROXY``, ``REQUESTS_CA_BUNDLE``).
Credentials go to the registry's own origin and to the token service that it names, and nowhere else; no message holds
a URL's query or a header, where tokens are.
"""

from __future__ import annotations

import base64
import json
import re
import ssl
from collections.abc import Callable, Iterator
from http.cookiejar import DefaultCookiePolicy
from typing import Any
from urllib.parse import urljoin, urlsplit

import requests
import urllib3

from cachebuilder.common.version import __version__
from cachebuilder.errors import TransferError
from cachebuilder.ship.credentials import Credentials
from cachebuilder.ship.locations import printable
from cachebuilder.ship.retry import Again

#: Seconds to connect, and without a byte.
_TIMEOUT = (10.0, 60.0)
_MAX_REDIRECTS = 5
_MAX_TOKEN_BYTES = 1 << 20
_MAX_ERROR_BYTES = 64 << 10
#: Read from the socket at once.
_PART_BYTES = 1 << 20
#: What may be otherwise in a moment (RFC 9110, 15.5 and 15.6; RFC 6585, 4).
_TRANSIENT = (408, 425, 429, 500, 502, 503, 504)
_PORTS = {"http": 80, "https": 443}
_CHALLENGE = re.compile(r'([a-zA-Z]+)="([^"]*)"')

Body = Callable[[], Any]


class _Http(requests.Session):
    """requests' session, which on a redirect gives no credential to another host, whatever ~/.netrc has."""

    def rebuild_auth(self, prepared_request: requests.PreparedRequest, response: requests.Response) -> None:
        if origin(response.request.url or "") != origin(prepared_request.url or ""):
            prepared_request.headers.pop("Authorization", None)

    def rebuild_method(self, prepared_request: requests.PreparedRequest, response: requests.Response) -> None:
        was, now = urlsplit(response.request.url or ""), urlsplit(prepared_request.url or "")
        if was.scheme == "https" and now.scheme != "https":
            raise TransferError(f"{origin(was.geturl())}: it redirects to {origin(now.geturl())}, which has no TLS")
        super().rebuild_method(prepared_request, response)


class _Header(requests.auth.AuthBase):
    """Sets our header, or none; with an ``auth`` of our own, requests does not look into ~/.netrc."""

    def __init__(self, value: str | None) -> None:
        self.value = value

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        if self.value is not None:
            request.headers["Authorization"] = self.value
        return request


class Session:
    """Requests to one registry.

    Args:
        base: ``https://HOST``.
        credentials: asked for the first time the registry wants some.
    """

    def __init__(self, base: str, credentials: Callable[[], Credentials | None]) -> None:
        self.base = origin(base)
        self._credentials = credentials
        self._authorization: str | None = None
        self._http = _Http()
        self._http.max_redirects = _MAX_REDIRECTS
        # Harbor gives a session cookie, and takes who returns it for a browser, from which it wants a CSRF token.
        self._http.cookies.set_policy(DefaultCookiePolicy(allowed_domains=[]))
        self._http.headers.update({"User-Agent": f"cachebuilder/{__version__}", "Accept-Encoding": "identity"})

    def send(
        self,
        method: str,
        url: str,
        *,
        accept: tuple[int, ...],
        what: str,
        headers: dict[str, str] | None = None,
        params: dict[str, str] | None = None,
        body: Body | None = None,
    ) -> requests.Response:
        """The response, its body not read yet.

        Args:
            url: absolute, or a path on the registry.
            accept: status codes that are an answer.
            what: what is asked for, for errors.
            body: makes the body, anew each time it is sent.

        Raises:
            Again: it may work in a moment.
            TransferError: it will not.
        """
        url = urljoin(self.base + "/", url)
        for fresh in (False, True):
            response = self._send(method, url, headers, params, body, what)
            if response.status_code == 401 and not fresh and origin(url) == self.base:
                self._authorization = self._answer(response, what)
                response.close()
                continue
            if response.status_code not in accept:
                raise self._refused(response, what)
            return response
        raise AssertionError

    def _send(
        self,
        method: str,
        url: str,
        headers: dict[str, str] | None,
        params: dict[str, str] | None,
        body: Body | None,
        what: str,
    ) -> requests.Response:
        own = self._authorization if origin(url) == self.base else None
        try:
            return self._http.request(
                method,
                url,
                headers=headers,
                params=params,
                data=body() if body else None,
                auth=_Header(own),
                timeout=_TIMEOUT,
                stream=True,
                allow_redirects=method in ("GET", "HEAD"),
            )
        except requests.exceptions.TooManyRedirects:
            raise TransferError(f"{what}: {origin(url)} redirects more than {_MAX_REDIRECTS} times") from None
        except requests.exceptions.SSLError as error:
            raise TransferError(f"{what}: {origin(url)}: {why(error)}", hint=_tls_hint(error)) from None
        except (requests.exceptions.ConnectionError, requests.exceptions.Timeout) as error:
            raise Again(TransferError(f"{what}: {origin(url)}: {why(error)}", hint=_UNREACHED)) from None
        except (requests.exceptions.RequestException, urllib3.exceptions.HTTPError, ValueError) as error:
            raise TransferError(f"{what}: {origin(url)}: {type(error).__name__}: not a request that works") from None

    # Credentials

    def _answer(self, response: requests.Response, what: str) -> str | None:
        """The header that answers a registry's challenge (distribution's docs/spec/auth/token.md)."""
        kind, _, rest = response.headers.get("WWW-Authenticate", "").partition(" ")
        found = self._credentials()
        if kind.lower() == "basic":
            if found is None:
                raise self._refused(response, what)
            return _basic(found)
        if kind.lower() != "bearer":
            raise self._refused(response, what)
        challenge = {name.lower(): value for name, value in _CHALLENGE.findall(rest)}
        return f"Bearer {self._token(challenge, found, what)}"

    def _token(self, challenge: dict[str, str], found: Credentials | None, what: str) -> str:
        realm, service, scope = (challenge.get(name, "") for name in ("realm", "service", "scope"))
        allowed = ("https",) if self.base.startswith("https:") else ("https", "http")
        if urlsplit(realm).scheme not in allowed:
            raise TransferError(f"{what}: {self.base} names no token service with TLS, found {origin(realm)!r}")
        named = {"service": service, "scope": scope}
        try:
            if found is not None and not found.user:
                grant = {"grant_type": "refresh_token", "client_id": "cachebuilder", "refresh_token": found.secret}
                form = named | grant
                response = self._http.post(realm, data=form, auth=_Header(None), timeout=_TIMEOUT, stream=True)
            else:
                header = _Header(_basic(found) if found else None)
                response = self._http.get(realm, params=named, auth=header, timeout=_TIMEOUT, stream=True)
        except (requests.exceptions.ConnectionError, requests.exceptions.Timeout) as error:
            raise Again(TransferError(f"{what}: the token service {origin(realm)}: {why(error)}")) from None
        except requests.exceptions.RequestException as error:
            raise TransferError(f"{what}: the token service {origin(realm)}: {type(error).__name__}") from None
        if response.status_code != 200:
            raise self._refused(response, f"{what}: token service")
        try:
            answer = json.loads(read(response, _MAX_TOKEN_BYTES, what))
            token = answer.get("token") or answer.get("access_token")
        except (ValueError, RecursionError, AttributeError):
            token = None
        if not isinstance(token, str) or not token.isascii() or not token.isprintable():
            raise TransferError(f"{what}: the token service {origin(realm)} gave no token")
        return token

    def _refused(self, response: requests.Response, what: str) -> Exception:
        status, host = response.status_code, origin(response.url)
        text = f"{what}: {host} answers {status} {printable(response.reason or '')}".rstrip()
        if said := _said(response):
            text += f": {said}"
        hint = None
        if status in (401, 403):
            hint = f"docker login {urlsplit(self.base).netloc}, with a user who may do this"
        elif status == 404:
            hint = "check the repository and the tag or digest"
        error = TransferError(text, hint=hint)
        if status in _TRANSIENT:
            after = response.headers.get("Retry-After", "")  # in seconds; a date would be told by two clocks
            return Again(error, float(after) if after.isascii() and after.isdigit() else None)
        return error


def read(response: requests.Response, most: int, what: str) -> bytes:
    """All of the body. Raises `TransferError` where it is larger than ``most`` bytes, `Again` where it breaks."""
    data = bytearray()
    for part in parts(response, what):
        data += part
        if len(data) > most:
            response.close()
            raise TransferError(f"{what}: wanted at most {most} bytes, found more")
    return bytes(data)


def parts(response: requests.Response, what: str) -> Iterator[bytes]:
    """The body as it comes. Raises `Again` where it breaks off."""
    try:
        yield from response.raw.stream(_PART_BYTES, decode_content=False)
    except (urllib3.exceptions.HTTPError, OSError) as error:
        raise Again(TransferError(f"{what}: {origin(response.url)}: {why(error)}", hint=_UNREACHED)) from None
    finally:
        response.close()


_UNREACHED = "run the same again once it can be reached: it goes on from what is there"


def why(error: BaseException) -> str:
    """What is at the bottom of an error, without the URL, the addresses and the objects that are in its text."""
    seen: set[int] = set()
    waiting: list[Any] = [error]
    found = "the connection broke"
    while waiting:
        one = waiting.pop(0)
        if not isinstance(one, BaseException) or id(one) in seen:
            continue
        seen.add(id(one))
        if isinstance(one, ssl.SSLError):
            return printable(getattr(one, "verify_message", "") or one.reason or "TLS failed")
        if isinstance(one, OSError) and not isinstance(one, requests.RequestException) and one.strerror:
            return printable(one.strerror)
        if isinstance(one, (requests.Timeout, urllib3.exceptions.TimeoutError)):
            found = f"no answer within {_TIMEOUT[1]:.0f} s"
        waiting += [getattr(one, "reason", None), one.__cause__, one.__context__, *one.args]
    return found


def _tls_hint(error: BaseException) -> str:
    text = why(error)
    if "not yet valid" in text or "expired" in text:
        return "check this machine's clock (date), then the registry's certificate"
    return "name the certificate authority with REQUESTS_CA_BUNDLE; a registry without TLS is oci+http://"


def _basic(found: Credentials) -> str:
    return f"Basic {base64.b64encode(f'{found.user}:{found.secret}'.encode()).decode()}"


def _said(response: requests.Response) -> str:
    """A registry's own words (distribution-spec, "Error Codes")."""
    try:
        errors = json.loads(read(response, _MAX_ERROR_BYTES, "")).get("errors")
        return printable(f"{errors[0].get('code', '')} {errors[0].get('message', '')}".strip())
    except (Again, TransferError, ValueError, RecursionError, AttributeError, TypeError, LookupError):
        return ""


def origin(url: str) -> str:
    """Scheme, host and port: what of a URL may be shown, and what credentials are for."""
    try:
        split = urlsplit(url)
        port = split.port
    except ValueError:
        return "a bad URL"
    host = split.netloc.rpartition("@")[2].lower()
    return f"{split.scheme}://{host.removesuffix(f':{port}') if port == _PORTS.get(split.scheme) else host}"
