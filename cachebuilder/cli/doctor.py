"""``cachebuilder doctor``."""

from __future__ import annotations

from pathlib import Path

import click

from cachebuilder.cli import remote, shared, table
from cachebuilder.inspecting import doctor as examining
from cachebuilder.inspecting import documents

#: Damaged entries of a root that are named; all of them are in the JSON.
_SHOWN = 5


@click.command()
@click.argument(
    "target", type=remote.LocationType(path_type=Path, exists=True), metavar="[ARTIFACT|DIR]", required=False
)
@shared.deep_gemm_option
@shared.json_option
def doctor(target: Path | None, deep_gemm: Path | None, as_json: bool) -> None:
    """Say what is here: DeepGEMM, torch, compilers, GPU, cache roots and what is in them.

    With an artifact or a restored folder, also whether it fits. Imports neither torch nor DeepGEMM.
    """
    found = examining.examine(target, deep_gemm)
    if as_json:
        click.echo(_document(found).text())
    else:
        _print(found)


def _print(found: examining.Findings) -> None:
    here = found.installation
    if here:
        source = f" ({here.distribution})" if here.distribution else ""
        _line("deep_gemm", f"{here.version}{source}, {found.generation} cache")
        _line("", str(here.path))
        _line("", f"headers {here.headers_digest[:16]}…, CUTLASS {here.cutlass_version}")
    else:
        _line("deep_gemm", "none")
    _line("torch", found.torch or "none")
    _line("nvcc", f"{found.nvcc.release} ({found.nvcc.origin})" if found.nvcc else "none")
    if found.nvcc:
        _line("", str(found.nvcc.nvcc))
    _line("C compiler", found.c_compiler or "none")
    if found.gpu:
        major, minor = found.gpu.capability
        _line("GPU", f"{found.gpu.name}, compute capability {major}.{minor}, driver {found.gpu.driver}")
    else:
        _line("GPU", "none that NVML knows")
    for index, root in enumerate(found.roots):
        _print_root("caches" if index == 0 else "", root, f" ({found.roots_from})" if index == 0 else "")
    names = ", ".join(f"{name}={value}" for name, value in found.kernel_variables.items())
    _line("variables", names or "none set that changes kernels")
    if found.folder:
        _print_root("folder", found.folder)
    for verdict in found.verdicts:
        fits = (
            "fits, as far as can be told without a replay" if not verdict.differences else "differs from what is here"
        )
        _line("artifact", f"{verdict.artifact}: {fits}")
        for difference in verdict.differences:
            for text in difference.lines():
                click.echo(f"  {text}")
    for problem in found.problems:
        click.echo(f"note: {problem}")


def _line(name: str, text: str) -> None:
    table.line(name, text, column=13)


def _print_root(name: str, root: examining.Root, origin: str = "") -> None:
    _line(name, f"{root.path}{origin}")
    _line("", f"  {_contents(root)}")
    for item in root.damaged[:_SHOWN]:
        _line("", f"  damaged: {item}")
    if len(root.damaged) > _SHOWN:
        _line("", f"  … {len(root.damaged) - _SHOWN} more damaged: --json lists all")


def _contents(root: examining.Root) -> str:
    if not root.exists:
        return "not there"
    counts = ", ".join(f"{count} {generation} entries" for generation, count in sorted(root.entries.items()))
    access = "writable" if root.writable else "read-only"
    artifacts = f"; restored: {', '.join(root.artifacts)}" if root.artifacts else ""
    return f"{counts or 'no entries'}, {len(root.damaged)} damaged, {access}{artifacts}"


def _document(found: examining.Findings) -> documents.Doctor:
    here, nvcc, gpu = found.installation, found.nvcc, found.gpu
    return documents.Doctor(
        deep_gemm=documents.Installed(
            path=str(here.path),
            version=here.version,
            distribution=here.distribution,
            generation=found.generation,
            headers=here.headers_digest,
            cutlass=here.cutlass_version,
        )
        if here
        else None,
        torch=found.torch,
        nvcc=documents.Compiler(str(nvcc.nvcc), nvcc.release, nvcc.origin) if nvcc else None,
        c_compiler=found.c_compiler,
        gpu=documents.Card(gpu.name, gpu.capability, gpu.driver) if gpu else None,
        roots_from=found.roots_from,
        roots=tuple(map(_root_document, found.roots)),
        folder=_root_document(found.folder) if found.folder else None,
        kernel_variables=dict(found.kernel_variables),
        artifacts=tuple(
            documents.ArtifactHere(verdict.artifact, not verdict.differences, verdict.differences)
            for verdict in found.verdicts
        ),
        problems=found.problems,
    )


def _root_document(root: examining.Root) -> documents.CacheRoot:
    return documents.CacheRoot(
        str(root.path), root.exists, root.writable, dict(root.entries), root.damaged, root.artifacts
    )
