"""HTTP to a registry: `requests` with docker's authentication, limits on what is read, and errors a person can act on.

Proxies and CA bundles come from the environment, as requests takes them (``HTTPS_PROXY``, ``REQUESTS_CA_BUNDLE``).

Who answers decides, not who was asked. Credentials go only to the registry's own origin and to the token service that
this origin names in a challenge of its own. Another host that a redirect leads to gets none, and its challenge is not
answered. At the token service no redirect is followed. No message holds a URL's query or a header, because tokens are
in them.
"""

from __future__ import annotations

import base64
import json
import re
import ssl
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from http.cookiejar import DefaultCookiePolicy
from typing import Any
from urllib.parse import urljoin, urlsplit

import requests
import urllib3

from cachebuilder.common.version import __version__
from cachebuilder.errors import TransferError
from cachebuilder.ship.connection import Adapter, Answer, expected
from cachebuilder.ship.credentials import Credentials
from cachebuilder.ship.locations import printable
from cachebuilder.ship.retry import Again, Patience

#: Seconds to connect, and without a byte.
_TIMEOUT = (10.0, 60.0)
_MAX_REDIRECTS = 5
_MAX_TOKEN_BYTES = 1 << 20
_MAX_ERROR_BYTES = 64 << 10
#: Bytes of one read from the socket.
_PART_BYTES = 1 << 20
#: Failures that may pass (RFC 9110, 15.5 and 15.6; RFC 6585, 4).
_TRANSIENT = (408, 425, 429, 500, 502, 503, 504)
_REDIRECTS = (301, 302, 303, 307, 308)
_PORTS = {"http": 80, "https": 443}
_CHALLENGE = re.compile(r'([a-zA-Z]+)="([^"]*)"')
_UNREACHED = "run the same command again once the registry can be reached; what arrived is kept"


@dataclass(frozen=True)
class Request:
    """A request to a registry.

    Attributes:
        url: absolute, or a path on the registry.
        what: what errors call the thing that is requested.
        accept: status codes that are an answer; any other is an error.
        body: makes the body, anew each time it is sent.
        most: bytes of the answer's body that are worth waiting for.
    """

    method: str
    url: str
    what: str
    accept: tuple[int, ...] = (200,)
    headers: Mapping[str, str] | None = None
    params: Mapping[str, str] | None = None
    body: Callable[[], Any] | None = None
    most: int = _MAX_ERROR_BYTES


class _Http(requests.Session):
    """requests' session without its redirects, which read a whole body into memory and look into ~/.netrc."""

    def get_redirect_target(self, resp: requests.Response) -> str | None:
        return None


class _Header(requests.auth.AuthBase):
    """Sets our Authorization header if the request goes to the origin that the header is for, else none.

    The URL is the one that requests connects to. With an ``auth`` of our own, requests does not look into ~/.netrc.
    """

    def __init__(self, for_origin: str, value: str | None) -> None:
        self._origin, self._value = for_origin, value

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        if self._value is not None and origin(request.url or "") == self._origin:
            request.headers["Authorization"] = self._value
        return request


class Session:
    """Requests to one registry.

    Args:
        base: ``https://HOST``.
        credentials: finds the credentials; called each time the registry asks for some.
    """

    def __init__(
        self, base: str, credentials: Callable[[], Credentials | None], patience: Patience | None = None
    ) -> None:
        self.base = origin(base)
        self._credentials = credentials
        self._patience = patience or Patience()
        self._authorization: str | None = None
        self._token_service = ""
        self._http = _Http()
        for scheme in _PORTS:
            self._http.mount(f"{scheme}://", Adapter())
        # Harbor sets a session cookie, takes a client that returns it for a browser, and wants a CSRF token from it.
        self._http.cookies.set_policy(DefaultCookiePolicy(allowed_domains=[]))
        self._http.headers.update({"User-Agent": f"cachebuilder/{__version__}", "Accept-Encoding": "identity"})

    def send(self, request: Request) -> requests.Response:
        """The response. Its body has not been read yet.

        Raises:
            Again: another try may work.
            TransferError: another try will not work.
        """
        request = replace(request, url=urljoin(self.base + "/", request.url))
        response = self._follow(request)
        # The registry's own challenge only: another host, which a redirect led to, could name a service of its own.
        if response.status_code == 401 and origin(response.url) == self.base:
            self._authorization = self._answer_challenge(response, request.what)
            response.close()
            response = self._follow(request)
        if response.status_code not in request.accept:
            raise self._refusal(response, request.what)
        return response

    def send_unread(self, request: Request) -> requests.Response:
        """As `send`, for a response whose body does not matter: its status and its headers."""
        response = self.send(request)
        response.close()
        return response

    def next_url(self, response: requests.Response, location: str, what: str) -> str:
        """The URL that a response leads to. Raises `TransferError` if it is not HTTP, or without TLS after TLS."""
        try:
            url = urljoin(response.url, location)
        except ValueError:
            url = ""
        before, after = origin(response.url), origin(url)
        if after.startswith("http://") and (before.startswith("https://") or self.base.startswith("https://")):
            raise TransferError(f"{what}: {before} leads to {after}, which has no TLS")
        if not after.startswith(("http://", "https://")):
            raise TransferError(f"{what}: wanted an http or https address from {before}, found another")
        return url

    def _follow(self, request: Request) -> requests.Response:
        """The response behind the redirects, where the request is one that can be sent elsewhere unchanged."""
        first = origin(request.url)
        for _ in range(_MAX_REDIRECTS + 1):
            response = self._ask(
                request.method,
                request.url,
                request.what,
                request.most,
                headers=request.headers,
                params=request.params,
                data=request.body() if request.body else None,
                auth=_Header(self.base, self._authorization),
            )
            location = response.headers.get("Location")
            if not location or response.status_code not in _REDIRECTS or request.method not in ("GET", "HEAD"):
                return response
            response.close()
            request = replace(request, url=self.next_url(response, location, request.what), params=None)
        raise TransferError(f"{request.what}: {first} redirects more than {_MAX_REDIRECTS} times")

    def _ask(self, method: str, url: str, what: str, most: int, **options: Any) -> requests.Response:
        """Send one request, and read the headers of its answer."""
        host = origin(url)
        token = expected.set(Answer(self._patience, most))
        connect_seconds, read_seconds = (min(seconds, self._patience.seconds) for seconds in _TIMEOUT)
        try:
            return self._http.request(
                method, url, timeout=(connect_seconds, read_seconds), stream=True, allow_redirects=False, **options
            )
        except requests.exceptions.SSLError as error:
            raise TransferError(f"{what}: {host}: {why(error)}", hint=_tls_hint(error)) from None
        except (requests.exceptions.ConnectionError, requests.exceptions.Timeout) as error:
            raise Again(TransferError(f"{what}: {host}: {why(error)}", hint=_UNREACHED)) from None
        except (requests.exceptions.RequestException, urllib3.exceptions.HTTPError, ValueError) as error:
            raise TransferError(f"{what}: {host}: the request failed: {type(error).__name__}") from None
        finally:
            expected.reset(token)

    # Credentials

    def _answer_challenge(self, response: requests.Response, what: str) -> str:
        """The Authorization header that answers a registry's challenge (distribution's docs/spec/auth/token.md)."""
        kind, _, parameters = response.headers.get("WWW-Authenticate", "").partition(" ")
        credentials = self._credentials()
        if kind.lower() == "basic" and credentials is not None:
            return _basic(credentials)
        if kind.lower() != "bearer":
            raise self._refusal(response, what)
        challenge = {name.lower(): value for name, value in _CHALLENGE.findall(parameters)}
        return f"Bearer {self._token(challenge, credentials, what)}"

    def _token(self, challenge: dict[str, str], credentials: Credentials | None, what: str) -> str:
        realm = challenge.get("realm", "")
        scope = {name: challenge.get(name, "") for name in ("service", "scope")}
        at = self._token_service = origin(realm)
        if not at.startswith("https://" if self.base.startswith("https://") else ("https://", "http://")):
            raise TransferError(f"{what}: wanted a token service with TLS from {self.base}, found {at!r}")
        service = f"the token service {at}"
        header = _Header(at, _basic(credentials) if credentials and credentials.user else None)
        if credentials is not None and not credentials.user:
            grant = {"grant_type": "refresh_token", "client_id": "cachebuilder", "refresh_token": credentials.secret}
            response = self._ask("POST", realm, f"{what}: {service}", _MAX_TOKEN_BYTES, data=scope | grant, auth=header)
        else:
            response = self._ask("GET", realm, f"{what}: {service}", _MAX_TOKEN_BYTES, params=scope, auth=header)
        if response.status_code in _REDIRECTS:  # the credentials are for this address, and no other
            response.close()
            raise TransferError(f"{what}: wanted a token from {service}, found a redirect")
        if response.status_code != 200:
            raise self._refusal(response, f"{what}: token service")
        try:
            answer = json.loads(read(response, _MAX_TOKEN_BYTES, what))
            token = answer.get("token") or answer.get("access_token")
        except (ValueError, RecursionError, AttributeError):
            token = None
        if not isinstance(token, str) or not token.isascii() or not token.isprintable():
            raise TransferError(f"{what}: wanted a token from {service}, found none in its answer")
        return token

    def _refusal(self, response: requests.Response, what: str) -> Exception:
        """The error for a status that is no answer: `Again` if it may pass, else a `TransferError`."""
        status, host = response.status_code, origin(response.url)
        text = f"{what}: {host} answers {status} {printable(response.reason or '')}".rstrip()
        if message := _error_message(response):
            text += f": {message}"
        hint = None
        if status in (401, 403) and host in (self.base, self._token_service):
            hint = f"docker login {urlsplit(self.base).netloc}, as a user who may do this"
        elif status == 404:
            hint = "check the repository and the tag or digest"
        error = TransferError(text, hint=hint)
        if status not in _TRANSIENT:
            return error
        after = response.headers.get("Retry-After", "")  # seconds; a date is ignored, since two clocks may differ
        return Again(error, float(after) if after.isascii() and after.isdigit() else None)


def read(response: requests.Response, most: int, what: str) -> bytes:
    """The whole body. Raises `TransferError` if it is larger than ``most`` bytes, `Again` if it breaks off."""
    data = bytearray()
    for part in parts(response, what):
        data += part
        if len(data) > most:
            response.close()
            raise TransferError(f"{what}: wanted at most {most} bytes, found more")
    return bytes(data)


def parts(response: requests.Response, what: str) -> Iterator[bytes]:
    """The body, part by part. Raises `Again` if it breaks off."""
    try:
        yield from response.raw.stream(_PART_BYTES, decode_content=False)
    except (urllib3.exceptions.HTTPError, OSError) as error:
        raise Again(TransferError(f"{what}: {origin(response.url)}: {why(error)}", hint=_UNREACHED)) from None
    finally:
        response.close()


def why(error: BaseException) -> str:
    """The cause at the bottom of a network error, without the URLs, addresses and objects in the error's own text."""
    reason = "the connection broke"
    seen: set[int] = set()
    queue: list[Any] = [error]
    while queue:
        cause = queue.pop(0)
        if not isinstance(cause, BaseException) or id(cause) in seen:
            continue
        seen.add(id(cause))
        if isinstance(cause, ssl.SSLError):
            return printable(getattr(cause, "verify_message", "") or cause.reason or "TLS failed")
        if isinstance(cause, OSError) and not isinstance(cause, requests.RequestException) and cause.strerror:
            return printable(cause.strerror)
        if isinstance(cause, (requests.Timeout, urllib3.exceptions.TimeoutError)):
            reason = f"no answer within {_TIMEOUT[1]:.0f} s"
        queue += [getattr(cause, "reason", None), cause.__cause__, cause.__context__, *cause.args]
    return reason


def _tls_hint(error: BaseException) -> str:
    reason = why(error)
    if "not yet valid" in reason or "expired" in reason:
        return "check this machine's clock (date), then the registry's certificate"
    return "name the certificate authority with REQUESTS_CA_BUNDLE; for a registry without TLS, use oci+http://"


def _basic(credentials: Credentials) -> str:
    return f"Basic {base64.b64encode(f'{credentials.user}:{credentials.secret}'.encode()).decode()}"


def _error_message(response: requests.Response) -> str:
    """The registry's own words (distribution-spec, "Error Codes"); empty if it has none."""
    try:
        errors = json.loads(read(response, _MAX_ERROR_BYTES, "")).get("errors")
        return printable(f"{errors[0].get('code', '')} {errors[0].get('message', '')}".strip())
    except (Again, TransferError, ValueError, RecursionError, AttributeError, TypeError, LookupError):
        return ""


def origin(url: str) -> str:
    """Scheme, host and port: the part of a URL that messages may show, and for which credentials hold."""
    try:
        parsed = urllib3.util.parse_url(url)  # as requests reads it when it connects
    except ValueError:
        return "a bad URL"
    scheme, host = (parsed.scheme or "").lower(), (parsed.host or "").lower()
    port = "" if parsed.port in (None, _PORTS.get(scheme)) else f":{parsed.port}"
    return f"{scheme}://{host}{port}"
