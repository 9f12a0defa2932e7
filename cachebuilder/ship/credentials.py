"""A registry's credentials, from docker's config as ``docker login`` or a Kubernetes secret writes it.

Format: https://docs.docker.com/reference/cli/docker/login/ and https://github.com/docker/docker-credential-helpers.
No message holds any part of them.
"""

from __future__ import annotations

import base64
import binascii
import json
import os
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cachebuilder.artifact.whole import open_file
from cachebuilder.errors import ArtifactError, TransferError
from cachebuilder.ship.locations import is_text

#: The name of docker.io's entry (docker/cli, config/configfile).
_DOCKER_HUB = "https://index.docker.io/v1/"
_HELPER = re.compile(r"[A-Za-z0-9._-]+")
_HELPER_SECONDS = 60
#: A config of a hundred registries has 30 kB.
_MAX_CONFIG_BYTES = 1 << 20
_LOGIN = "run docker login HOST to write them again"


@dataclass(frozen=True)
class Credentials:
    """A user and a secret. Without a user, the secret is an identity token, to be exchanged for an access token."""

    user: str
    secret: str = field(repr=False)


def config_path(environment: Mapping[str, str]) -> Path | None:
    """``$REGISTRY_AUTH_FILE`` (skopeo's and podman's), else ``$DOCKER_CONFIG/config.json``, else docker's default.

    None if no variable names it and the user has no home folder.
    """
    if named := environment.get("REGISTRY_AUTH_FILE"):
        return Path(named)
    if folder := environment.get("DOCKER_CONFIG"):
        return Path(folder) / "config.json"
    try:
        return Path.home() / ".docker" / "config.json"
    except RuntimeError:
        return None


def find(host: str, environment: Mapping[str, str] = os.environ) -> Credentials | None:
    """The credentials for a registry's host; None if docker's config has none. Raises `TransferError`."""
    path = config_path(environment)
    if path is None:
        return None
    config = _read(path)
    names = [_DOCKER_HUB, "docker.io"] if host == "docker.io" else [host, f"https://{host}", f"https://{host}/v2/"]
    helpers = config.get("credHelpers")
    for name in names:
        if isinstance(helpers, dict) and isinstance(helper := helpers.get(name), str):
            return _ask(helper, name, path)
    entries = config.get("auths")
    for name in names:
        if isinstance(entries, dict) and isinstance(entry := entries.get(name), dict) and entry:
            return _entry(entry, name, path)
    if isinstance(store := config.get("credsStore"), str) and store:
        return _ask(store, names[0], path)
    return None


def _read(path: Path) -> dict[str, Any]:
    try:
        with open_file(path) as file:  # a regular file only: a FIFO would wait for a writer
            data = file.read(_MAX_CONFIG_BYTES + 1)
    except ArtifactError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            return {}
        raise TransferError(str(error)) from None
    except OSError as error:
        raise TransferError(f"{path}: cannot be read: {error.strerror}") from None
    if len(data) > _MAX_CONFIG_BYTES:
        raise TransferError(f"{path}: wanted docker's config of at most {_MAX_CONFIG_BYTES} bytes, found more")
    try:
        config = json.loads(data)
    except (ValueError, RecursionError):
        config = None
    if not isinstance(config, dict):
        raise TransferError(
            f"{path}: wanted docker's config, found no JSON object", hint="run docker login HOST to write it"
        )
    return config


def _entry(entry: dict[str, Any], name: str, path: Path) -> Credentials:
    token = entry.get("identitytoken")
    if isinstance(token, str) and token and is_text(token):
        return Credentials("", token)
    user, secret = entry.get("username"), entry.get("password")
    if isinstance(auth := entry.get("auth"), str) and auth:
        try:
            user, _, secret = base64.b64decode(auth, validate=True).decode().partition(":")
        except (binascii.Error, ValueError):
            user = None
    if not isinstance(user, str) or not isinstance(secret, str) or not user or not is_text(user + secret):
        raise TransferError(f"{path}: {name}: wanted auth, or username and password, found neither", hint=_LOGIN)
    return Credentials(user, secret.rstrip("\0"))


def _ask(helper: str, name: str, path: Path) -> Credentials | None:
    if not _HELPER.fullmatch(helper):
        raise TransferError(f"{path}: wanted the name of a credential helper, found another text")
    command = f"docker-credential-{helper}"
    try:
        process = subprocess.run([command, "get"], input=name.encode(), capture_output=True, timeout=_HELPER_SECONDS)
    except FileNotFoundError:
        raise TransferError(f"{path}: wanted {command} on PATH, found none") from None
    except (OSError, subprocess.TimeoutExpired) as error:
        raise TransferError(f"{command}: it cannot be run, or does not answer: {type(error).__name__}") from None
    if b"credentials not found" in process.stdout:  # docker-credential-helpers, credentials/error.go
        return None
    try:
        answer = json.loads(process.stdout if process.returncode == 0 else b"{}")
        user, secret = answer["Username"], answer["Secret"]
        if (
            not isinstance(user, str)
            or not isinstance(secret, str)
            or not (user and secret)
            or not is_text(user + secret)
        ):
            raise ValueError
    except (ValueError, TypeError, KeyError, RecursionError):
        raise TransferError(
            f"{command}: wanted the credentials for {name}, found none (exit code {process.returncode})", hint=_LOGIN
        ) from None
    return Credentials("" if user == "<token>" else user, secret)
