"""``cachebuilder plan``."""

from __future__ import annotations

import textwrap
from pathlib import Path

import click

import cachebuilder
from cachebuilder.cli import console, shared, table, words
from cachebuilder.planning.plan import FlashInferPlan, Kernel
from cachebuilder.planning.selection import Selection


@click.command()
@shared.manifest_argument
@shared.json_option
@shared.tools_options
@shared.store_options
@shared.progress_options
def plan(manifest: Path, as_json: bool, tools: shared.ToolPaths, kept: shared.StoreOptions) -> None:
    """Print every kernel that DeepGEMM will ask for, and the M ranges that select each."""
    inputs = tools.load_manifest(manifest)
    with shared.show_progress() as progress:
        made = cachebuilder.plan(inputs, reuse=kept.use_store, shared=kept.open(), progress=progress)
    if as_json:
        console.echo_json(made.model_dump_json(indent=1, exclude_none=True))
        return
    for index, op in enumerate(inputs.manifest.ops):
        for sm_count in inputs.manifest.sm_counts_of(op):
            table.title(f"ops[{index}] {op.op} {op.shape()}, {sm_count} SMs: {op.variable}")
            selected = [
                (kernel, selection)
                for kernel in made.kernels
                for selection in kernel.selected_by
                if (selection.op, selection.sm_count) == (index, sm_count)
            ]
            for kernel, selection in sorted(selected, key=lambda pair: (pair[0].name, pair[1].ranges[0].first)):
                console.echo(_line(kernel, selection))
            if not selected:
                reason = "this DeepGEMM has no kernel of its own (cuBLASLt serves it)"
                table.line("  nothing to compile:", reason, column=22)
    if made.flashinfer:
        _print_flashinfer(made.flashinfer)
    from_sources = [kernel for kernel in made.kernels if not kernel.selected_by]
    if from_sources:
        table.title("sources")
        for kernel in from_sources:
            console.echo(f"  {_short_name(kernel)}")
    sm_counts = ", ".join(map(str, made.sm_counts))
    target = f"{made.gpu.name}, {made.arch}, {sm_counts} SMs"
    table.line("plan", f"{len(made.kernels)} kernels from {made.calls} calls: {target}")
    table.line("", f"torch {made.torch}, peak memory {words.size(made.peak_bytes)}")
    table.line("using", f"{inputs.installation}")


def _print_flashinfer(plan: FlashInferPlan) -> None:
    for module in plan.modules:
        table.title(f"flashinfer: module {module}")
    for index, gemm in enumerate(plan.gemms):
        table.title(f"flashinfer: gemms[{index}] n={gemm['n']} k={gemm['k']}: m")
        for kernel in plan.kernels:
            for selection in kernel.selected_by:
                if selection.op == index:
                    points = words.ranges(selection.ranges)
                    console.echo(textwrap.fill(f"  {kernel.entry} {points}", 80, subsequent_indent=" " * 4))


def _line(kernel: Kernel, selection: Selection) -> str:
    """A kernel with the points that select it, wrapped at 80 columns."""
    points = words.ranges(selection.ranges)
    return textwrap.fill(points, 80, initial_indent=f"  {_short_name(kernel):<48} ", subsequent_indent=" " * 51)


def _short_name(kernel: Kernel) -> str:
    """The kernel's name and the first eight digits of its key."""
    return f"{kernel.name}.{kernel.entry[-32:][:8]}"
