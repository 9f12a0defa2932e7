"""``cachebuilder manifest``."""

from __future__ import annotations

from pathlib import Path

import click

from cachebuilder.authoring.derive.engines import ENGINES
from cachebuilder.authoring.derive.manifest import MOE_BACKENDS, Deployment, derive_manifest
from cachebuilder.cli import console, shared
from cachebuilder.common.files import write_atomically
from cachebuilder.cuda.gpus import GPUS
from cachebuilder.errors import ManifestError

_size = click.IntRange(min=1)


def _complete_gpu(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    return [name for name in GPUS if name.lower().startswith(incomplete.lower())]


@click.command()
@click.option(
    "--model", type=click.Path(path_type=Path), required=True, metavar="PATH", help="A config.json, or its folder."
)
@shared.option_group(
    "deployment",
    Deployment,
    click.option("--engine", type=click.Choice(list(ENGINES)), required=True, help="The engine whose rules hold."),
    click.option(
        "--engine-version", metavar="X.Y.Z", help="The engine's release; default: the newest whose source was read."
    ),
    click.option(
        "--gpu", required=True, metavar="NAME", help="A known GPU, for example H200.", shell_complete=_complete_gpu
    ),
    click.option("--tp", type=_size, default=1, show_default=True, help="Tensor parallel ranks."),
    click.option("--ep", type=_size, default=1, show_default=True, help="Expert parallel ranks (vLLM: tp · dp, or 1)."),
    click.option(
        "--dp", type=_size, default=1, show_default=True, help="vLLM: replicas; SGLang: groups that share attention."
    ),
    click.option("--pp", type=_size, default=1, show_default=True, help="Pipeline stages."),
    click.option(
        "--max-num-batched-tokens",
        "max_tokens",
        type=click.IntRange(1, 1 << 20),
        default=8192,
        show_default=True,
        help="The largest number of tokens in a step; SGLang: --chunked-prefill-size.",
    ),
    click.option(
        "--max-num-seqs",
        "max_seqs",
        type=_size,
        default=1024,
        show_default=True,
        help="The largest number of sequences in a step.",
    ),
    click.option("--max-model-len", type=_size, help="The longest sequence (vLLM); default: the model's."),
    click.option(
        "--moe-backend",
        type=click.Choice(MOE_BACKENDS),
        default="deep_gemm",
        show_default=True,
        help="Whose kernels run the routed experts, in vLLM's words; other: leave them out.",
    ),
    shared.with_flashinfer_option,
    click.option(
        "--allow-unread",
        is_flag=True,
        help="Go on although no rule reads a field of the config that shapes may depend on; the manifest names it.",
    ),
    click.argument("engine_arguments", nargs=-1, type=click.UNPROCESSED, metavar="[-- ENGINE_OPTION...]"),
    click.option("--low-latency", is_flag=True, help="DeepEP's low-latency dispatch brings tokens to the experts."),
)
@click.option("--name", help="The manifest's name; default: the model's, the ranks, the GPU and the engine.")
@click.option("--output", "-o", type=click.Path(path_type=Path, dir_okay=False), help="Default: standard output.")
def manifest(model: Path, deployment: Deployment, name: str | None, output: Path | None) -> None:
    """Write a manifest from a model's config.json: the shapes that an engine asks DeepGEMM for.

    Behind --: further options of the engine that bear on shapes, for example --enable-dbo. Each is read or refused.
    """
    written = derive_manifest(model, deployment, name)
    for name in written.derived.unread:
        console.echo(f"not read: {name}", err=True)
    for unknown in written.derived.unknown:
        console.echo(f"not known: {unknown}", err=True)
    if output is None:
        console.echo(written.text, newline=False)
        return
    write_atomically(output, written.text.encode(), ManifestError)
    shapes = f"{len(written.derived.ops)} shapes, {len(written.derived.left_out)} left out"
    console.echo(f"manifest  {output}: {shapes}; its comments say why\nnext      cachebuilder plan {output}")
