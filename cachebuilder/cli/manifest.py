"""``cachebuilder manifest``."""

from __future__ import annotations

from pathlib import Path

import click

from cachebuilder.authoring.derive.config import Config
from cachebuilder.authoring.derive.derive import derive
from cachebuilder.authoring.derive.engines import ENGINES
from cachebuilder.authoring.derive.text import manifest_text
from cachebuilder.common.files import write_atomically
from cachebuilder.cuda import gpus
from cachebuilder.errors import ManifestError, ModelError
from cachebuilder.manifest import schema as manifests

_size = click.IntRange(min=1)


def _names(begun: str) -> list[str]:
    return [name for name in gpus.GPUS if name.lower().startswith(begun.lower())]


@click.command()
@click.option(
    "--model", type=click.Path(path_type=Path), required=True, metavar="PATH", help="A config.json, or its folder."
)
@click.option("--engine", type=click.Choice(list(ENGINES)), required=True, help="Whose rules hold.")
@click.option(
    "--engine-version", metavar="X.Y.Z", help="The engine's release; default: the newest whose source was read."
)
@click.option(
    "--gpu", required=True, metavar="NAME", help="A known GPU, as H200.", shell_complete=lambda *told: _names(told[-1])
)
@click.option("--tp", type=_size, default=1, show_default=True, help="Tensor parallel ranks.")
@click.option("--ep", type=_size, default=1, show_default=True, help="Expert parallel ranks (vLLM: tp · dp, or 1).")
@click.option("--dp", type=_size, default=1, show_default=True, help="vLLM: replicas; SGLang: attention's groups.")
@click.option("--pp", type=_size, default=1, show_default=True, help="Pipeline stages.")
@click.option(
    "--max-num-batched-tokens",
    "max_tokens",
    type=click.IntRange(1, 1 << 20),
    default=8192,
    show_default=True,
    help="The largest number of tokens in a step; SGLang: --chunked-prefill-size.",
)
@click.option("--max-num-seqs", type=_size, default=1024, show_default=True, help="Sequences in a step (vLLM).")
@click.option("--max-model-len", type=_size, help="The longest sequence (vLLM); default: the model's.")
@click.option(
    "--moe-backend",
    type=click.Choice(["deep_gemm", "deep_gemm_mega_moe", "other"]),
    default="deep_gemm",
    show_default=True,
    help="Whose kernels run the routed experts, as vLLM has it; other: leave them out.",
)
@click.option("--low-latency", is_flag=True, help="Experts through DeepEP's low-latency dispatch.")
@click.option("--name", help="The manifest's name; default: the model's, the ranks, the GPU and the engine.")
@click.option("--output", "-o", type=click.Path(path_type=Path, dir_okay=False), help="Default: standard output.")
def manifest(
    model: Path,
    engine: str,
    engine_version: str | None,
    gpu: str,
    tp: int,
    ep: int,
    dp: int,
    pp: int,
    max_tokens: int,
    max_num_seqs: int,
    max_model_len: int | None,
    moe_backend: str,
    low_latency: bool,
    name: str | None,
    output: Path | None,
) -> None:
    """Write a manifest from a model's config.json: the shapes that an engine asks DeepGEMM for."""
    rules = ENGINES[engine]
    config = Config.read(model)
    try:
        found = gpus.find(gpu)
    except ValueError as error:
        raise ModelError(f"--gpu: {error}") from None
    serving = rules(
        gpu=found,
        version=rules.release(engine_version),
        tp=tp,
        ep=ep,
        dp=dp,
        pp=pp,
        max_tokens=max_tokens,
        max_seqs=max_num_seqs,
        max_model_len=max_model_len,
        low_latency=low_latency,
        moe_deep_gemm=moe_backend != "other",
        mega_moe=moe_backend == "deep_gemm_mega_moe",
    )
    derived = derive(config, serving)
    text = manifest_text(config, serving, derived, name)
    manifests.parse(text.encode(), "the written manifest")
    for item in derived.unknown:
        click.echo(f"not known: {item}", err=True)
    if output is None:
        click.echo(text, nl=False)
        return
    write_atomically(output, text.encode(), ManifestError)
    shapes = f"{len(derived.ops)} shapes, {len(derived.left_out)} left out"
    click.echo(f"manifest  {output}: {shapes}; the reasons are in it\nnext      cachebuilder plan {output}")
