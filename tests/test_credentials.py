"""Credentials: found in docker's config, sent to the registry's own origin only, and never printed."""

from __future__ import annotations

import base64
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from cachebuilder.errors import TransferError
from cachebuilder.ship import credentials, locations
from cachebuilder.ship.documents import Descriptor
from cachebuilder.ship.pull import Puller
from cachebuilder.ship.registry import Repository
from cachebuilder.ship.retry import Retries
from cachebuilder.ship.session import origin
from tests.conftest import Run
from tests.registries import Answer, Asked, Middleman, Raw, Registry, registry, reply
from tests.shipping import FEW, into, push_to

#: One generation is enough: a transfer treats the artifacts of both alike.
GENERATIONS = ("deepjit",)

ONCE = Retries(0)


def challenge(path: str, host: str) -> str:
    return f'Bearer realm="http://{host}/token",service="test",scope="repository:{path.split("/")[2]}:pull"'


def token_service(between: Middleman, secret: str) -> list[str]:
    """Makes a middleman want a token, that it gives for ``fleet`` and this secret; returns the tokens it gave."""
    given: list[str] = []
    basic = "Basic " + base64.b64encode(f"fleet:{secret}".encode()).decode()

    def change(asked: Asked, answer: Answer) -> Answer:
        authorization = asked.headers.get("Authorization", "")
        if asked.path.startswith("/token"):
            if authorization != basic:
                return Answer(401, {}, b'{"errors":[{"code":"UNAUTHORIZED","message":"who are you"}]}')
            given.append(f"t{len(given)}")
            return Answer(
                200, {}, json.dumps({"token": given[-1], "expires_in": 0, "issued_at": "1970-01-01"}).encode()
            )
        if not given or authorization != f"Bearer {given[-1]}":
            return Answer(401, {"WWW-Authenticate": challenge(asked.path, between.host)}, b"{}")
        return answer

    between.change = change
    return given


def config(folder: Path, host: str, secret: str) -> dict[str, str]:
    folder.mkdir()
    auth = base64.b64encode(f"fleet:{secret}".encode()).decode()
    (folder / "config.json").write_text(json.dumps({"auths": {host: {"auth": auth}}}))
    return {"DOCKER_CONFIG": str(folder)}


def test_credentials_come_from_dockers_config_and_are_never_printed(
    there: Registry, artifact: Path, run: Run, tmp_path: Path
) -> None:
    push_to(there.host, "private", artifact)
    with Middleman(there.host) as between:
        given = token_service(between, "swordfish-7")
        location = f"oci://{between.host}/private:v1"
        environment = config(tmp_path / "docker", between.host, "swordfish-7")
        done = run("pull", location, "-v", "-o", tmp_path / "got.tar.zst", **environment)
        assert done.returncode == 0, done.stderr
        assert len(given) == 1, "one token serves until it is refused, whatever the clock says of it"
        wrong = config(tmp_path / "wrong", between.host, "sardine-8")
        refused = run("pull", location, "-v", "-o", tmp_path / "not.tar.zst", **wrong)
        assert refused.returncode == 15 and "401" in refused.stderr and "docker login" in refused.stderr
        said = done.stdout + done.stderr + refused.stdout + refused.stderr
        for secret in ("swordfish-7", "sardine-8", *given, base64.b64encode(b"fleet:swordfish-7").decode()):
            assert secret not in said


def test_a_token_that_ran_out_in_between_is_asked_for_again(
    there: Registry, artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    push_to(there.host, "private", artifact)
    with Middleman(there.host) as between:
        given = token_service(between, "s")
        monkeypatch.setenv("DOCKER_CONFIG", config(tmp_path / "docker", between.host, "s")["DOCKER_CONFIG"])
        puller = Puller(locations.parse(f"oci://{between.host}/private:v1"), FEW)
        candidate = puller.look_up()[0]
        given.append("a newer one, which we do not have")
        assert puller.fetch(candidate, into(tmp_path)).read_bytes() == artifact.read_bytes()


HTPASSWD = "fleet:$2b$05$KHH7JwYWZ8GfPHOP6FUzVO5i7HT4079hkj2jVXxKJ1d0/pz5rcUTK"


def test_a_registry_with_passwords_is_pushed_to_and_pulled_from(artifact: Path, tmp_path: Path, run: Run) -> None:
    (tmp_path / "htpasswd").write_text(HTPASSWD + "\n")
    more = f"auth: {{htpasswd: {{realm: test, path: {tmp_path}/htpasswd}}}}"
    with registry(tmp_path / "registry", more) as found:
        location = f"oci://{found.host}/private:v1"
        done = run("push", location, artifact, DOCKER_CONFIG=str(tmp_path / "none"))
        assert done.returncode == 15 and "docker login 127.0.0.1" in done.stderr, done.stderr
        environment = config(tmp_path / "docker", found.host, "swordfish")
        assert run("push", location, artifact, **environment).returncode == 0
        assert run("pull", location, "-o", tmp_path / "got.tar.zst", **environment).returncode == 0


def test_a_credential_helper_is_asked_and_its_failure_is_told_without_its_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    helper = tmp_path / "docker-credential-test"
    helper.write_text('#!/bin/sh\nread host\necho "{\\"Username\\": \\"u-$host\\", \\"Secret\\": \\"s\\"}"\n')
    helper.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    (tmp_path / "config.json").write_text('{"credHelpers": {"r.example": "test"}, "credsStore": "nowhere"}')
    environment = {"DOCKER_CONFIG": str(tmp_path)}
    found = credentials.find("r.example", environment)
    assert found == credentials.Credentials("u-r.example", "s") and "s'" not in repr(found)
    helper.write_text("#!/bin/sh\necho the-secret; exit 1\n")
    with pytest.raises(TransferError, match=r"found none \(exit code 1\)") as caught:
        credentials.find("r.example", environment)
    assert "the-secret" not in str(caught.value)
    with pytest.raises(TransferError, match="docker-credential-nowhere on PATH, found none"):
        credentials.find("other.example", environment)


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"auths": {"h": {"auth": "hunter2"}}}', '{"auths": {"h": {"username": "hunter2"}}}']
)
def test_a_bad_config_is_told_without_what_is_in_it(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(TransferError, match=r"config\.json") as caught:
        credentials.find("h", {"DOCKER_CONFIG": str(tmp_path)})
    assert "hunter2" not in str(caught.value)


# Trust goes by who answers


def secrets_in(requests: list[bytes]) -> list[bytes]:
    """The requests that hold the password, in whatever form."""
    basic = base64.b64encode(b"fleet:swordfish")
    return [head for head in requests if basic in head or b"swordfish" in head or b"authorization" in head.lower()]


@pytest.fixture
def logged_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def login(host: str, **entry: str) -> None:
        entry = entry or {"username": "fleet", "password": "swordfish"}
        (tmp_path / "config.json").write_text(json.dumps({"auths": {host: entry}}))
        monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))

    return login


@pytest.mark.parametrize("kind", ["bearer", "basic"])
def test_another_host_that_a_redirect_leads_to_and_that_answers_401_is_given_no_password(
    kind: str, logged_in: Callable[..., None]
) -> None:
    def challenge_of_its_own(connection: socket.socket, head: bytes) -> None:
        realm = f"http://{evil.host}/token"
        asks = f'Bearer realm="{realm}",service="s",scope="x"' if kind == "bearer" else f'Basic realm="{realm}"'
        reply(connection, "401 Who", f"WWW-Authenticate: {asks}")

    with Raw(challenge_of_its_own) as evil:

        def redirect(connection: socket.socket, head: bytes) -> None:
            reply(connection, "307 There", f"Location: http://{evil.host}{head.split()[1].decode()}")

        with Raw(redirect) as honest:
            logged_in(honest.host)
            with pytest.raises(TransferError, match=f"{evil.host} answers 401") as caught:
                Puller(locations.parse(f"oci://{honest.host}/a:b"), ONCE).look_up()
            assert evil.requests and not secrets_in(evil.requests)
            assert caught.value.hint is None, "a login there would be a login at another host"


@pytest.mark.parametrize("entry", [{}, {"identitytoken": "swordfish"}], ids=["password", "refresh-token"])
@pytest.mark.parametrize("status", ["301 There", "302 There", "307 There", "308 There"])
def test_a_redirect_of_the_token_service_is_not_followed_with_the_secret(
    entry: dict[str, str], status: str, logged_in: Callable[..., None]
) -> None:
    with Raw(lambda connection, head: reply(connection, "200 OK", body=b'{"token": "t"}')) as evil:

        def answer(connection: socket.socket, head: bytes) -> None:
            if b"/token" in head.split()[1]:
                reply(connection, status, f"Location: http://{evil.host}/token")
            else:
                reply(connection, "401 Who", f'WWW-Authenticate: Bearer realm="http://{honest.host}/token",service="s"')

        with Raw(answer) as honest:
            logged_in(honest.host, **entry)
            with pytest.raises(TransferError, match=r"wanted a token from .*, found a redirect"):
                Puller(locations.parse(f"oci://{honest.host}/a:b"), ONCE).look_up()
            assert not evil.requests


@pytest.mark.parametrize(
    "where", ["http://{evil}/up", "http://{evil}\\@{honest}/up", "//{evil}/up", "http://{honest}@{evil}/up"]
)
def test_an_upload_that_goes_on_at_another_host_takes_no_password_there(
    where: str, logged_in: Callable[..., None]
) -> None:
    """However the address is written: the header goes by the host that is connected to."""
    with Raw(lambda connection, head: reply(connection, "401 Who", 'WWW-Authenticate: Basic realm="x"')) as evil:

        def answer(connection: socket.socket, head: bytes) -> None:
            if b"authorization" not in head.lower():
                reply(connection, "401 Who", 'WWW-Authenticate: Basic realm="x"')
            elif head.startswith(b"POST"):
                reply(connection, "202 Go", f"Location: {where.format(evil=evil.host, honest=honest.host)}")
            else:
                reply(connection, "404 No")

        with Raw(answer) as honest:
            logged_in(honest.host)
            repository = Repository(locations.parse(f"oci://{honest.host}/a:b"), ONCE)
            with pytest.raises(TransferError):
                repository.push_blob(Descriptor.of("x", b"data"), b"data", "push")
            assert evil.requests and not secrets_in(evil.requests)


def test_netrc_is_not_read_for_a_redirect_nor_for_a_token(
    tmp_path: Path, logged_in: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login fleet password swordfish\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    logged_in("nobody.example")
    with Raw(lambda connection, head: reply(connection, "404 No")) as other:

        def answer(connection: socket.socket, head: bytes) -> None:
            if b"/token" in head.split()[1]:
                reply(connection, "200 OK", body=b'{"token": "t"}')
            elif b"authorization" not in head.lower():
                reply(connection, "401 Who", f'WWW-Authenticate: Bearer realm="http://{honest.host}/token"')
            else:
                reply(connection, "307 There", f"Location: http://{other.host}/x")

        with Raw(answer) as honest:
            with pytest.raises(TransferError):
                Puller(locations.parse(f"oci://{honest.host}/a:b"), ONCE).look_up()
            assert other.requests and not secrets_in(other.requests)
            assert not [head for head in secrets_in(honest.requests) if b"Bearer t" not in head]


@pytest.mark.parametrize("realm", ["http://[", "ftp://h/", "", "token", "http://u:swordfish@", "http://h:99999/"])
def test_a_challenge_that_names_no_service_is_one_sentence(realm: str, logged_in: Callable[..., None]) -> None:
    with Raw(
        lambda connection, head: reply(connection, "401 Who", f'WWW-Authenticate: Bearer realm="{realm}"')
    ) as server:
        logged_in(server.host)
        with pytest.raises(TransferError) as caught:
            Puller(locations.parse(f"oci://{server.host}/a:b"), ONCE).look_up()
        assert "swordfish" not in str(caught.value)


# The config's file


@pytest.mark.parametrize("kind", ["fifo", "zero", "huge", "folder", "deep", "loop"])
def test_a_config_that_is_no_small_file_is_one_sentence_at_once(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    match kind:
        case "fifo":
            os.mkfifo(path)
        case "zero":
            path.symlink_to("/dev/zero")
        case "huge":
            path.write_bytes(b'{"auths": {' + b" " * (2 << 20) + b"}}")
        case "folder":
            path.mkdir()
        case "deep":
            path.write_bytes(b'{"auths": ' + b"[" * 100_000 + b"]" * 100_000 + b"}")
        case _:
            path.symlink_to(path)
    with pytest.raises(TransferError, match=r"config\.json"):
        credentials.find("h", {"DOCKER_CONFIG": str(tmp_path)})


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become a user without a name")
def test_a_user_without_a_home_has_no_config() -> None:
    code = "import os, encodings.idna\nfrom cachebuilder.ship import credentials\nos.setuid(54321)\nprint(credentials.find('h', {}))"
    environment = {name: value for name, value in os.environ.items() if name != "HOME"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout == "None\n", done.stderr


@pytest.mark.parametrize("entry", [{"username": "\ud800", "password": "p"}, {"identitytoken": "\udfff"}])
def test_half_a_character_in_a_config_is_one_sentence(entry: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"auths": {"h": entry}}))
    with pytest.raises(TransferError, match="h: wanted auth, or username and password"):
        credentials.find("h", {"DOCKER_CONFIG": str(tmp_path)})


def test_credentials_are_for_the_registrys_origin_however_it_is_spelt() -> None:
    assert origin("https://H.example:443/x") == origin("https://h.example/y?z=1")
    assert origin("https://h.example:5000") != origin("https://h.example")
    assert origin("https://u:p@h.example/") == "https://h.example"
