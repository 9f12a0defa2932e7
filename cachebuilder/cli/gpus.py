"""``cachebuilder gpus``."""

from __future__ import annotations

import json
import textwrap

import click

from cachebuilder.cli import console, shared
from cachebuilder.cuda.gpus import GPUS, MIB


@click.command()
@shared.json_option
def gpus(as_json: bool) -> None:
    """Print the GPUs that a manifest can name, and the sources of their figures."""
    if as_json:
        console.echo_json(json.dumps([gpu.model_dump(mode="json") for gpu in GPUS.values()], indent=1))
        return
    console.echo(f"{'name':<13}{'capability':>11}{'SMs':>5}{'L2':>11}{'shared':>9}{'clock':>10}  read from a card")
    for gpu in GPUS.values():
        console.echo(
            f"{gpu.name:<13}{gpu.capability:>11}{gpu.sm_count:>5}{gpu.l2_bytes / MIB:>7g} MiB"
            f"{gpu.shared_memory_bytes // 1024:>5} KiB{gpu.clock_khz // 1000:>6} MHz  {'yes' if gpu.verified else 'no'}"
        )
    console.echo()
    for source in dict.fromkeys(gpu.source for gpu in GPUS.values()):
        names = ", ".join(gpu.name for gpu in GPUS.values() if gpu.source == source)
        console.echo(textwrap.fill(f"{names}: {source}", 80, subsequent_indent="  "))
    console.echo("For another card or other figures, give the fields in the manifest's target.gpu.")
