"""Credentials: found in docker's config, sent to the registry's own origin only, and never printed."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest

from cachebuilder.errors import TransferError
from cachebuilder.ship import credentials, locations
from cachebuilder.ship.pull import Puller
from cachebuilder.ship.session import origin
from tests.conftest import Run
from tests.registries import Answer, Asked, Middleman, Registry, registry
from tests.shipping import FEW, push_to

#: One generation is enough: a transfer treats the artifacts of both alike.
GENERATIONS = ("deepjit",)


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
        assert puller.fetch(candidate, lambda name: tmp_path / name).read_bytes() == artifact.read_bytes()


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


def test_credentials_are_for_the_registrys_origin_however_it_is_spelt() -> None:
    assert origin("https://H.example:443/x") == origin("https://h.example/y?z=1")
    assert origin("https://h.example:5000") != origin("https://h.example")
    assert origin("https://u:p@h.example/") == "https://h.example"
