"""``cachebuilder restore``."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import click

from cachebuilder.artifact.trust import Trust
from cachebuilder.cli import console, remote, shared, signing, words
from cachebuilder.restoring import restore as restoring
from cachebuilder.restoring.machine import Compared, Machine


@dataclass(frozen=True)
class ArtifactOptions:
    """What an artifact is checked with before it is restored."""

    deep_gemm: Path | None
    force: bool
    trust: tuple[Path, ...]
    name: str | None
    not_before: datetime | None

    def load_trust(self) -> Trust | None:
        """The trusted keys, and what is wanted of what they signed."""
        return signing.load_trust(self.trust, self.name, self.not_before)


@dataclass(frozen=True)
class RestoreOptions(ArtifactOptions):
    """What a restore is to go by."""

    with_baked: bool


restore_options = shared.option_group(
    "options",
    RestoreOptions,
    shared.serving_deep_gemm_option,
    shared.force_option,
    shared.baked_option,
    signing.trust_option,
    signing.name_option,
    signing.not_before_option,
)


def run_restore(
    artifacts: Sequence[Path | str], to: Path, machine: Machine, trust: Trust | None, options: RestoreOptions
) -> restoring.Restored:
    """Fetch and restore, and say on stderr what was done."""
    started = time.monotonic()
    signing.warn_unchecked(trust)
    files = [
        remote.fetched(str(artifact), machine, trust, options.force) if remote.is_remote(artifact) else Path(artifact)
        for artifact in artifacts
    ]
    restored = restoring.restore(
        files, to, machine=machine, trust=trust, force=options.force, with_baked=options.with_baked
    )
    for other in restored.others:
        if other.fits:
            console.echo(f"unused    {other.artifact}: it fits as well; the first one that fits is taken", err=True)
        else:
            console.echo(f"refused   {other}", err=True)
    say_differences(Compared(restored.artifact, restored.differences))
    if restored.signed_by is not None:
        shared.remark(f"signed    {restored.artifact}, by {restored.signed_by.path} ({restored.signed_by.fingerprint})")
    relocated = f", relocated to {restored.index.fingerprint.install_include}" if restored.relocated else ""
    written = words.several(restored.written, "kernel")
    shared.remark(
        f"restored  {restored.index.name}: {written} written, {restored.skipped} there already{relocated}, "
        f"{time.monotonic() - started:.2f} s"
    )
    if restored.baked is not None:
        shared.remark(f"baked     {words.several(len(restored.baked.files), 'file')} of the engine's other compilers")
    return restored


def say_differences(taken: Compared[Any]) -> None:
    """Say on stderr how what was taken differs from this machine, if it does."""
    if taken.differences:
        console.echo(f"{'note      ' if taken.fits else 'forced    '}{taken}", err=True)


@click.command()
@click.argument(
    "artifacts", metavar="ARTIFACT...", nargs=-1, required=True, type=remote.NamedType(path_type=Path, dir_okay=False)
)
@click.option("--to", required=True, metavar="DIR", type=shared.folder_type, help="Where DeepGEMM will read it.")
@restore_options
@shared.progress_options
def restore(artifacts: tuple[Path | str, ...], to: Path, options: RestoreOptions) -> None:
    """Put the first ARTIFACT that fits this machine's DeepGEMM and GPU into DIR, beside a frozen nvcc.

    ARTIFACT is a file, or oci://… or s3://…, which is fetched first. Every ARTIFACT is checked before anything becomes
    visible in DIR, with --trust first of all its signature. DIR may be in use.
    """
    machine, trust = Machine.here(options.deep_gemm), options.load_trust()
    restored = run_restore(artifacts, to, machine, trust, options)
    shared.remark(f"next      cachebuilder env {restored.dir} --engine vllm|sglang")
