"""``cachebuilder env``."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

import click

from cachebuilder.cli import shared
from cachebuilder.restoring.environment import Engine, Variable, variables
from cachebuilder.restoring.folder import open_folder


def _shell(serving: Sequence[Variable]) -> str:
    return "\n".join(f"# {v.why}\nexport {v.name}={shlex.quote(v.value)}" for v in serving)


def _docker(serving: Sequence[Variable]) -> str:
    return "\n".join(f"# {v.why}\nENV {v.name}={shlex.quote(v.value)}" for v in serving)


def _k8s(serving: Sequence[Variable]) -> str:
    return "\n".join(f"# {v.why}\n- name: {v.name}\n  value: {json.dumps(v.value)}" for v in serving)


def _json(serving: Sequence[Variable]) -> str:
    return json.dumps({v.name: v.value for v in serving}, indent=1)


_FORMATS: dict[str, Callable[[Sequence[Variable]], str]] = {
    "shell": _shell,
    "docker": _docker,
    "k8s": _k8s,
    "json": _json,
}


@click.command()
@click.argument("dir", type=shared.folder_type)
@shared.engine_option
@click.option(
    "--format", "form", type=click.Choice(list(_FORMATS)), default="shell", show_default=True, help="What to print."
)
@shared.scratch_option
def env(dir: Path, engine: Engine, form: str, scratch: Path | None) -> None:
    """Print the environment variables for a process that serves from DIR, where an artifact was restored.

    Run it in the image that serves: CUDA_HOME is printed only if the image has no CUDA toolkit.
    """
    click.echo(_FORMATS[form](variables(dir, open_folder(dir).indexes, engine, scratch, os.environ)))
