"""``cachebuilder restore``."""

from __future__ import annotations

import gc
import time
from pathlib import Path

import click

from cachebuilder.cli import remote, shared, signing, words
from cachebuilder.cuda import nvml
from cachebuilder.restoring import entries as restoring


def run_restore(
    artifacts: tuple[Path | str, ...], to: Path, deep_gemm: Path | None, force: bool, trust: tuple[Path, ...]
) -> restoring.Restored:
    """Restore and say what was done, on stderr."""
    started = time.monotonic()
    gc.disable()  # what a restore makes lives until it ends: looking for garbage is a twentieth of its time
    trusted = signing.trusted(trust)
    if trusted is None:
        click.echo(restoring.UNCHECKED, err=True)
    installation, gpu = remote.installation(deep_gemm), nvml.first_gpu()
    files = []
    for artifact in artifacts:
        if remote.is_remote(artifact):
            with remote.retries() as tries:
                wish = remote.wish(installation, gpu, to=to, force=force)
                artifact = remote.fetched(str(artifact), wish, tries, trusted)
        files.append(Path(artifact))
    done = restoring.restore(files, to, installation, gpu, force, trusted)
    for path, differences in done.refused:
        click.echo(f"refused   {restoring.explain(path, differences)}", err=True)
    if done.differences:
        overruled = any(difference.causes_miss for difference in done.differences)
        click.echo(
            f"{'forced    ' if overruled else 'note      '}{restoring.explain(done.artifact, done.differences)}",
            err=True,
        )
    if done.signed_by is not None:
        shared.remark(f"signed    {done.artifact}, by {done.signed_by.path} ({done.signed_by.fingerprint})")
    relocated = f", relocated to {done.index.fingerprint.install_include}" if done.relocated else ""
    written = words.several(done.written, "kernel")
    shared.remark(
        f"restored  {done.index.name}: {written} written, {done.skipped} there already{relocated}, "
        f"{time.monotonic() - started:.2f} s"
    )
    return done


@click.command()
@click.argument(
    "artifacts", metavar="ARTIFACT...", nargs=-1, required=True, type=remote.NamedType(path_type=Path, dir_okay=False)
)
@click.option("--to", required=True, metavar="DIR", type=shared.folder_type, help="Where DeepGEMM will read it.")
@shared.serving_deep_gemm_option
@shared.force_option
@signing.trust_option
@shared.progress_options
def restore(
    artifacts: tuple[Path | str, ...], to: Path, deep_gemm: Path | None, force: bool, trust: tuple[Path, ...]
) -> None:
    """Put the first ARTIFACT that fits this machine's DeepGEMM and GPU into DIR, beside a frozen nvcc.

    ARTIFACT is a file, or oci://… or s3://…, which is fetched first. The whole archive is checked before anything
    becomes visible in DIR. DIR may be in use. With --trust the signature beside it is checked before anything else.
    """
    done = run_restore(artifacts, to, deep_gemm, force, trust)
    shared.remark(f"next      cachebuilder env {done.dir} --engine vllm|sglang")
