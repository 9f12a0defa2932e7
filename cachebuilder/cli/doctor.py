"""``cachebuilder doctor``."""

from __future__ import annotations

from pathlib import Path

import click

from cachebuilder.cli import console, remote, shared, table
from cachebuilder.inspecting.doctor import CacheRoot, Findings, examine

#: How many damaged entries of a root are printed; the JSON has all.
_SHOWN = 5


@click.command()
@click.argument(
    "target", type=remote.LocationType(path_type=Path, exists=True), metavar="[ARTIFACT|DIR]", required=False
)
@shared.deep_gemm_option
@shared.json_option
def doctor(target: Path | None, deep_gemm: Path | None, as_json: bool) -> None:
    """Print what is here: DeepGEMM, torch, compilers, GPU, cache roots and their contents.

    With an artifact or a restored folder, also whether it fits. Imports neither torch nor DeepGEMM.
    """
    findings = examine(target, deep_gemm)
    if as_json:
        console.echo_json(findings.to_json())
    else:
        _print(findings)


def _print(findings: Findings) -> None:
    if here := findings.deep_gemm:
        distribution = f" ({here.distribution})" if here.distribution else ""
        _line("deep_gemm", f"{here.version}{distribution}, {here.generation} cache")
        _line("", here.path)
        _line("", f"headers {here.headers[:16]}…, CUTLASS {here.cutlass}")
    else:
        _line("deep_gemm", "none")
    if flashinfer := findings.flashinfer:
        _line("flashinfer", f"{flashinfer.version}, apache-tvm-ffi {flashinfer.tvm_ffi}")
        _line("", flashinfer.path)
    _line("torch", findings.torch or "none")
    if nvcc := findings.nvcc:
        _line("nvcc", f"{nvcc.release} ({nvcc.origin})")
        _line("", nvcc.path)
    else:
        _line("nvcc", "none")
    _line("C compiler", findings.c_compiler or "none")
    if gpu := findings.gpu:
        major, minor = gpu.capability
        sms = f", {gpu.sm_count} SMs" if gpu.sm_count else ""
        driver = f", driver {gpu.driver}" if gpu.driver else ""
        _line("GPU", f"{gpu.name}, compute capability {major}.{minor}{sms}{driver}")
    else:
        _line("GPU", "none that NVML reports")
    for index, root in enumerate(findings.roots):
        _print_root("caches" if index == 0 else "", root, f" ({findings.roots_from})" if index == 0 else "")
    variables = ", ".join(f"{name}={value}" for name, value in findings.kernel_variables.items())
    _line("variables", variables or "none set that changes kernels")
    if findings.folder:
        _print_root("folder", findings.folder)
    for artifact in findings.artifacts:
        verdict = "fits; cachebuilder verify replays its calls" if artifact.fits else "differs from what is here"
        _line("artifact", f"{artifact.name}: {verdict}")
        for difference in artifact.differences:
            for text in difference.lines():
                console.echo(f"  {text}")
    for problem in findings.problems:
        console.echo(f"note: {problem}")


def _line(name: str, text: str) -> None:
    table.line(name, text, column=13)


def _print_root(name: str, root: CacheRoot, origin: str = "") -> None:
    _line(name, f"{root.path}{origin}")
    _line("", f"  {_contents(root)}")
    for sentence in root.damaged[:_SHOWN]:
        _line("", f"  damaged: {sentence}")
    if len(root.damaged) > _SHOWN:
        _line("", f"  … {len(root.damaged) - _SHOWN} more damaged: --json lists all")


def _contents(root: CacheRoot) -> str:
    if not root.exists:
        return "does not exist"
    counts = ", ".join(f"{count} {generation} entries" for generation, count in sorted(root.entries.items()))
    access = "writable" if root.writable else "read-only"
    artifacts = f"; restored: {', '.join(root.artifacts)}" if root.artifacts else ""
    return f"{counts or 'no entries'}, {len(root.damaged)} damaged, {access}{artifacts}"
