"""What the verbs share: options, progress, and how numbers are written."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import click

from cachebuilder.cli.progress import options as progress_options
from cachebuilder.cli.progress import quiet, remark, show_progress

__all__ = ["progress_options", "quiet", "remark", "show_progress"]  # with all that is defined here


F = TypeVar("F", bound=Callable[..., Any])

#: What to do with a folder whose entries are not what they were.
RESTORE_AGAIN = "remove the damaged entries and restore the artifact again"

manifest_argument = click.argument("manifest", type=click.Path(path_type=Path, dir_okay=False))
deep_gemm_option = click.option(
    "--deep-gemm",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="FOLDER",
    help="The deep_gemm package to plan for; default: the installed one, else vLLM's own copy.",
)
nvcc_option = click.option(
    "--nvcc",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="The compiler; default: CUDA_HOME's, else PATH's, else the one of PyPI's wheels.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON for machines.")


def option_group(name: str, kind: type[Any], *options: Callable[[F], F]) -> Callable[[F], F]:
    """Give a verb several options and hand them over as one object, the argument ``name``.

    Args:
        kind: a dataclass; each of its fields takes the option of that name.
        options: click's options, in the order of the help text.
    """
    fields = [field.name for field in dataclasses.fields(kind)]

    def decorate(verb: F) -> F:
        @functools.wraps(verb)
        def call(**values: Any) -> Any:
            values[name] = kind(**{field: values.pop(field) for field in fields})
            return verb(**values)

        decorated = cast(F, call)
        for option in reversed(options):
            decorated = option(decorated)
        return decorated

    return decorate


class _Folder(click.Path):
    """A folder; the empty text, which an unset variable leaves, is none, although Python takes it for this one."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value == "":
            self.fail("wanted a folder, found an empty text", param, ctx)
        return super().convert(value, param, ctx)


folder_type = _Folder(path_type=Path, file_okay=False)
artifact_type = click.Path(path_type=Path, dir_okay=False)
serving_deep_gemm_option = click.option(
    "--deep-gemm",
    type=folder_type,
    metavar="PATH",
    help="The deep_gemm package that will serve; default: the installed one, else vLLM's own copy.",
)
engine_option = click.option(
    "--engine",
    type=click.Choice(["vllm", "sglang", "none"]),
    default="none",
    show_default=True,
    help="Set what this engine needs, too.",
)
scratch_option = click.option(
    "--scratch",
    type=folder_type,
    metavar="DIR",
    help="A writable folder for what the cache lacks (DeepJIT); default: DIR/scratch.",
)
force_option = click.option("--force", is_flag=True, help="Restore although kernels would not be found; says why.")
store_option = click.option(
    "--store/--no-store",
    "use_store",
    default=True,
    help="Keep plans and compiled kernels in the user's cache folder and take them from there.",
)


device_option = click.option(
    "--device",
    type=click.Choice(["virtual", "cuda", "auto"]),
    default="virtual",
    show_default=True,
    help="cuda: on this machine's GPU as well, which must be the target; auto: if it is.",
)


@dataclasses.dataclass(frozen=True)
class ToolPaths:
    """Where a person says that the compiler and DeepGEMM are."""

    nvcc: Path | None
    deep_gemm: Path | None


tools_options = option_group("tools", ToolPaths, nvcc_option, deep_gemm_option)


def say(text: str) -> None:
    """A line on standard output, where the person did not say ``--quiet``."""
    if not quiet():
        click.echo(text)
