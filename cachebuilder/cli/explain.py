"""``cachebuilder explain``."""

from __future__ import annotations

import textwrap
from pathlib import Path

import click

from cachebuilder.cli import remote, shared, words
from cachebuilder.inspecting import documents
from cachebuilder.inspecting import explain as explaining


@click.command()
@click.argument("kernel", metavar="KERNEL_DIR|KEY")
@click.option(
    "--in",
    "inside",
    type=remote.LocationType(path_type=Path, exists=True),
    metavar="ARTIFACT|DIR",
    help="Where the KEY is; default: the cache roots that DeepGEMM takes here.",
)
@shared.json_option
def explain(kernel: str, inside: Path | None, as_json: bool) -> None:
    """Say what a kernel is: its template's arguments in words, what it takes, and who asked for it.

    KERNEL_DIR is a kernel's folder in a cache; KEY its name, or the first digits of its key.
    """
    found = explaining.explain(kernel, inside)
    if as_json:
        click.echo(_document(found).text())
        return
    click.echo(f"kernel     {found.name} ({found.generation})")
    click.echo(f"key        {found.entry[-32:]}")
    if found.cubin_bytes is not None and (takes := found.resources) is not None:
        threads = f", {takes.threads} threads a block" if takes.threads else ""
        click.echo(f"cubin      {words.size(found.cubin_bytes)}: {takes.registers} registers{threads}")
        click.echo(
            f"           {takes.shared_bytes} B of shared memory in the code, {takes.stack_bytes} B of stack a thread"
        )
    if shape := found.shape:
        fields = {"n": shape.n, "k": shape.k, "experts": shape.experts}
        told = [f"{name}={value}" for name, value in fields.items() if value is not None]
        click.echo(f"made for   {' '.join([shape.op or shape.gemm_type, *told])}, {shape.sm_count} SMs")
    click.echo(f"template   {found.template or 'the source instantiates none'}")
    for parameter in found.parameters:
        _line(parameter.plain_name or "?", parameter.value.rsplit("::", 1)[-1], parameter.words or "")
    for asker in found.askers:
        head = f"{asker.artifact}: {asker.op.title}, {asker.selection.sm_count} SMs: {asker.op.variable} "
        text = head + words.ranges(asker.selection.ranges)
        click.echo(textwrap.fill(text, 80, initial_indent="asked by   ", subsequent_indent=" " * 13))
    if not found.askers:
        click.echo("asked by   no op: DeepGEMM compiled it itself, or a manifest's sources hold it")


def _line(name: str, value: str, words: str) -> None:
    """A parameter, its value, and what it means, wrapped at 80 columns."""
    head = f"  {name:<20} {value:<11} "
    click.echo(
        textwrap.fill(words, 80, initial_indent=head, subsequent_indent=" " * len(head)) if words else head.rstrip()
    )


def _document(found: explaining.Explanation) -> documents.Explain:
    return documents.Explain(
        entry=found.entry,
        name=found.name,
        generation=found.generation,
        where=str(found.where),
        template=found.template,
        parameters=tuple(documents.TemplateArgument(p.name, p.value, p.words) for p in found.parameters),
        made_for=found.shape,
        cubin_bytes=found.cubin_bytes,
        resources=found.resources,
        asked_by=tuple(
            documents.AskingOp(
                artifact=asker.artifact,
                op=asker.op.op,
                position=asker.selection.op,
                shape=asker.op.shape,
                variable=asker.op.variable,
                sm_count=asker.selection.sm_count,
                ranges=asker.selection.ranges,
            )
            for asker in found.askers
        ),
    )
