"""``cachebuilder env``."""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import click

from cachebuilder.cli import console, shared
from cachebuilder.errors import RestoreError
from cachebuilder.restoring import baked
from cachebuilder.restoring import place as places
from cachebuilder.restoring.environment import Engine, Variable, variables
from cachebuilder.restoring.folder import open_folder
from cachebuilder.restoring.place import Place

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def _shell(variable: Variable) -> str:
    return f"export {variable.name}={shlex.quote(variable.value)}"


def _docker(variable: Variable) -> str:
    """An instruction of a Dockerfile: in double quotes, a backslash, a quote and a dollar take a backslash."""
    value = variable.value
    if shlex.quote(value) != value:
        value = '"' + re.sub(r'["$\\]', r"\\\g<0>", value) + '"'
    return f"ENV {variable.name}={value}"


def _k8s(variable: Variable) -> str:
    """An item of a container's ``env``: a JSON string is YAML, and Kubernetes makes one dollar of two."""
    value = json.dumps(variable.value.replace("$", "$$"), ensure_ascii=False)
    return f"- name: {variable.name}\n  value: {value}"


_LINES: dict[str, Callable[[Variable], str]] = {"shell": _shell, "docker": _docker, "k8s": _k8s}
_FORMATS = (*_LINES, "json")


def text(serving: Sequence[Variable], form: str) -> str:
    """The variables in one of the formats, each with the reason as a comment, where the format has comments.

    Raises:
        RestoreError: a name or a value that cannot stand in every format as it is.
    """
    for variable in serving:
        if not _NAME.fullmatch(variable.name):
            raise RestoreError(f"wanted a variable's name of letters, digits and '_', found {variable.name!r}")
        if not variable.value.isprintable():
            raise RestoreError(
                f"{variable.name}: wanted a printable value, found {variable.value!r}",
                hint="restore into a folder whose path has no control characters and is UTF-8",
            )
    if form == "json":
        return json.dumps({variable.name: variable.value for variable in serving}, indent=1)
    return "\n".join(f"# {variable.why}\n{_LINES[form](variable)}" for variable in serving)


@click.command()
@click.argument("dir", type=shared.folder_type)
@shared.engine_option
@click.option(
    "--format", "form", type=click.Choice(_FORMATS), default="shell", show_default=True, help="What to print."
)
@shared.scratch_option
@shared.baked_option
def env(dir: Path, engine: Engine, form: str, scratch: Path | None, with_baked: bool) -> None:
    """Print the environment variables for a process that serves from DIR, where an artifact was restored.

    Run it in the image that serves: CUDA_HOME is printed only if the image has no CUDA toolkit. The formats shell and
    json are for a process of this user on this machine, so the writable root is checked, and made if it is missing.
    """
    indexes = open_folder(dir).indexes
    place = (places.usable if form in ("shell", "json") else places.usual)(dir, indexes, scratch)
    place = replace(place, baked=place.baked and with_baked)
    for note in place.notes or _other_users(place, scratch):
        console.echo(f"note      {note}", err=True)
    serving = variables(place, indexes, engine, os.environ)
    if place.baked:
        baked.require_fit(dir, os.environ | {variable.name: variable.value for variable in serving})
    console.echo(text(serving, form))


def _other_users(place: Place, scratch: Path | None) -> list[str]:
    """What to know of a root that only root can write to, since a container may run as another user."""
    if scratch is not None or os.geteuid() != 0:
        return []
    return [
        f"only root can write to {place.roots[0]}, and DeepGEMM ends at a kernel that the cache lacks if it cannot. If "
        "the server runs as another user, start it with cachebuilder run, or name with --scratch a folder that it can "
        "write to (DeepJIT)"
    ]
