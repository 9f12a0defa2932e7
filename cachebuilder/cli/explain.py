"""``cachebuilder explain``."""

from __future__ import annotations

import textwrap
from pathlib import Path

import click

from cachebuilder.cli import console, remote, shared, words
from cachebuilder.inspecting import explain as explaining
from cachebuilder.inspecting.explain import Explanation


@click.command()
@click.argument("kernel", metavar="KERNEL_DIR|KEY")
@click.option(
    "--in",
    "inside",
    type=remote.LocationType(path_type=Path, exists=True),
    metavar="ARTIFACT|DIR",
    help="Where the KEY is; default: the cache roots that DeepGEMM uses here.",
)
@shared.json_option
def explain(kernel: str, inside: Path | None, as_json: bool) -> None:
    """Explain a kernel: its template's arguments in words, what it takes, and which ops ask for it.

    KERNEL_DIR is a kernel's folder in a cache; KEY its name, or the first digits of its key.
    """
    explanation = explaining.explain(kernel, inside)
    if as_json:
        console.echo_json(explanation.to_json())
    else:
        _print(explanation)


def _print(explanation: Explanation) -> None:
    console.echo(f"kernel     {explanation.name} ({explanation.generation or 'of FlashInfer'})")
    console.echo(f"key        {explanation.entry[-32:] if explanation.generation else explanation.entry}")
    if explanation.cubin_bytes is not None and (takes := explanation.resources) is not None:
        threads = f", {takes.threads} threads a block" if takes.threads else ""
        console.echo(f"cubin      {words.size(explanation.cubin_bytes)}: {takes.registers} registers{threads}")
        console.echo(
            f"           {takes.shared_bytes} B of shared memory in the code, {takes.stack_bytes} B of stack a thread"
        )
    if shape := explanation.made_for:
        sizes = {"n": shape.n, "k": shape.k, "experts": shape.experts}
        known = [f"{name}={size}" for name, size in sizes.items() if size is not None]
        console.echo(f"made for   {' '.join([shape.op or shape.gemm_type, *known])}, {shape.sm_count} SMs")
    console.echo(f"template   {explanation.template or 'the source instantiates none'}")
    for parameter in explanation.parameters:
        _print_parameter(parameter.plain_name or "?", parameter.value.rsplit("::", 1)[-1], parameter.words or "")
    for asker in explanation.asked_by:
        head = f"{asker.artifact}: {asker.op} {asker.shape}, {asker.sm_count} SMs: {asker.variable} "
        text = head + words.ranges(asker.ranges)
        console.echo(textwrap.fill(text, 80, initial_indent="asked by   ", subsequent_indent=" " * 13))
    if not explanation.asked_by:
        console.echo("asked by   no op: DeepGEMM compiled it itself, or it is one of a manifest's sources")


def _print_parameter(name: str, value: str, meaning: str) -> None:
    """One line of a parameter, wrapped at 80 columns."""
    head = f"  {name:<20} {value:<11} "
    console.echo(
        textwrap.fill(meaning, 80, initial_indent=head, subsequent_indent=" " * len(head)) if meaning else head.rstrip()
    )
