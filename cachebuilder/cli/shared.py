"""What several verbs share: arguments, options and output."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import click

import cachebuilder
from cachebuilder.cli import console
from cachebuilder.cli.progress import options as progress_options
from cachebuilder.cli.progress import quiet, remark, show_progress

if TYPE_CHECKING:
    from cachebuilder.manifest.inputs import Inputs
    from cachebuilder.ship.shared import SharedStore

# The verbs use these imported names as `shared.…`; mypy requires such names in `__all__`.
__all__ = ["progress_options", "quiet", "remark", "show_progress"]


F = TypeVar("F", bound=Callable[..., Any])

manifest_argument = click.argument("manifest", type=click.Path(path_type=Path, dir_okay=False))
deep_gemm_option = click.option(
    "--deep-gemm",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="FOLDER",
    help="The deep_gemm package to plan with; default: the installed one, else vLLM's own copy.",
)
nvcc_option = click.option(
    "--nvcc",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="The compiler; default: CUDA_HOME's, else the one on PATH, else the one from PyPI's wheels.",
)
flashinfer_option = click.option(
    "--flashinfer",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="FOLDER",
    help="The flashinfer package, for a manifest that needs one; default: the installed one.",
)
with_flashinfer_option = click.option(
    "--with-flashinfer", is_flag=True, help="Also what the engine takes from FlashInfer; building it needs FlashInfer."
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON for machines.")


def option_group(name: str, kind: type[Any], *options: Callable[[F], F]) -> Callable[[F], F]:
    """Give a verb several options, and pass them to it as one object.

    Args:
        name: the verb's argument that takes the object.
        kind: the object's type, a dataclass with a field for each option; the two have the same name.
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
    """A folder, not an empty text: that usually comes from an unset variable, and Python reads it as this folder."""

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
    help="Also set the variables that this engine needs.",
)
scratch_option = click.option(
    "--scratch",
    type=folder_type,
    metavar="DIR",
    help="A writable folder for kernels that are not in the cache (DeepJIT); default: DIR/scratch.",
)
force_option = click.option(
    "--force",
    is_flag=True,
    help="Restore even if DeepGEMM would not find the kernels, or if DIR is another user's; say what does not fit.",
)
baked_option = click.option(
    "--baked/--no-baked",
    "with_baked",
    default=True,
    show_default=True,
    help="Use the caches of the engine's other compilers, if they were baked.",
)
device_option = click.option(
    "--device",
    type=click.Choice(["virtual", "cuda", "auto"]),
    default="virtual",
    show_default=True,
    help="virtual: needs no GPU; cuda: also on this machine's GPU, which must be the target; auto: cuda if it is.",
)


@dataclasses.dataclass(frozen=True)
class ToolPaths:
    """The paths of the compiler, of DeepGEMM and of FlashInfer, where the user names them."""

    nvcc: Path | None
    deep_gemm: Path | None
    flashinfer: Path | None = None

    def load_manifest(self, path: Path) -> Inputs:
        """Read a manifest, and find what it is planned with at these paths. Raises as `cachebuilder.load_manifest`."""
        return cachebuilder.load_manifest(path, nvcc=self.nvcc, deep_gemm=self.deep_gemm, flashinfer=self.flashinfer)


@dataclasses.dataclass(frozen=True)
class StoreOptions:
    """Where plans and compiled kernels are kept: in the user's cache folder, and where other builders keep theirs."""

    store: str | None
    read_only: bool
    use_store: bool

    def open(self) -> SharedStore | None:
        """The shared store; None if there is none."""
        if self.store is None:
            if self.read_only:
                raise click.UsageError("--read-only goes with --store URL")
            return None
        return cachebuilder.open_store(self.store, read_only=self.read_only, notice=remark)


store_options = option_group(
    "kept",
    StoreOptions,
    click.option(
        "--store",
        metavar="URL",
        envvar="CACHEBUILDER_STORE",
        help="Also share plans and compiled kernels with other builders there: s3://…, gs://…, a folder. "
        "[env var: CACHEBUILDER_STORE]",
    ),
    click.option("--read-only", is_flag=True, help="Take from the shared store, and write nothing there."),
    click.option(
        "--no-store",
        "use_store",
        flag_value=False,
        default=True,
        help="Neither keep plans and compiled kernels in the user's cache folder nor take them from there.",
    ),
)
tools_options = option_group("tools", ToolPaths, nvcc_option, deep_gemm_option, flashinfer_option)


def say(text: str) -> None:
    """Print a line on standard output, unless the user gave ``--quiet``."""
    if not quiet():
        console.echo(text)
