"""Plan the kernels that a manifest gives as source text, with keys computed by DeepGEMM's own formula."""

from __future__ import annotations

import re
from collections.abc import Sequence

from cachebuilder.deepgemm import entries as entry_files
from cachebuilder.deepgemm import source as sources
from cachebuilder.errors import PlanError
from cachebuilder.manifest.inputs import Inputs
from cachebuilder.planning.plan import Kernel


class KeyFormula:
    """Computes a kernel's key as DeepGEMM does, for one DeepGEMM, one compiler and one set of flags.

    Args:
        example: a kernel that DeepGEMM asked for; all others have the same flags.
        legacy_flags: legacy only: the flags as DeepGEMM joins them.
    """

    def __init__(self, inputs: Inputs, example: Kernel, legacy_flags: str | None) -> None:
        self._inputs = inputs
        self._example = example
        self._legacy_flags = legacy_flags

    def entry(self, name: str, source: str) -> str:
        """The name of the entry's folder. Raises OSError if a header that the source includes cannot be read."""
        toolchain, installation = self._inputs.toolchain, self._inputs.installation
        if self._legacy_flags is not None:
            return entry_files.legacy_entry(name, toolchain.release, self._legacy_flags, source.encode())
        return entry_files.deepjit_entry(
            name,
            toolchain.version_text,
            installation.cutlass_version,
            self._example.flags,
            source,
            installation.include,
        )

    def require_holds(self, kernels: Sequence[Kernel], hint: str | None = None) -> None:
        """Raise `PlanError` if DeepGEMM gave one of ``kernels`` another name than the formula."""
        for kernel in kernels:
            computed = self.entry(kernel.name, kernel.source)
            if computed != kernel.entry:
                raise PlanError(
                    f"this DeepGEMM does not follow the formula of the {self._inputs.installation.generation} key: "
                    f"wanted {computed}, found {kernel.entry}",
                    hint=hint,
                )


def from_sources(
    inputs: Inputs, asked: Sequence[Kernel], planned: Sequence[Kernel], formula: KeyFormula
) -> list[Kernel]:
    """The kernels of the manifest's ``sources`` that its ops do not ask for.

    DeepGEMM names and compiles them like the kernels of the same family in ``asked``, so name and flags come from
    those.

    Args:
        asked: every kernel that DeepGEMM asked for in the sweep.
        planned: the kernels in ``asked`` that the manifest's ops launch.

    Raises:
        PlanError: a source's name or key cannot be computed, or the source is for another architecture or for other
            headers.
    """
    planned_sources = {kernel.source for kernel in planned}
    if all(item.source in planned_sources for item in inputs.manifest.sources):
        return []
    example = asked[0]
    formula.require_holds([example], "leave sources out of the manifest and give the ops that ask for these kernels")
    other_flags = sorted({" ".join(kernel.flags) for kernel in asked if kernel.flags != example.flags})
    if other_flags:
        raise PlanError(
            "sources cannot be planned: wanted the same flags for all kernels, "
            f"found {' '.join(example.flags)} and {other_flags}"
        )
    kernels = []
    for number, item in enumerate(inputs.manifest.sources):
        if item.source in planned_sources:
            continue
        where = f"sources[{number}]"
        name = item.kernel or _name_of(where, item.source, asked)
        _check(where, item.source, asked, inputs.installation.generation == "legacy")
        try:
            entry = formula.entry(name, item.source)
        except OSError as error:
            raise PlanError(f"{where}: includes {error.filename}, which this DeepGEMM does not have") from None
        # The example's meta.json fits: it holds the compiler and its options, and nothing about the kernel itself.
        update = {"entry": entry, "name": name, "source": item.source, "selected_by": ()}
        kernels.append(example.model_copy(update=update))
    return kernels


def _name_of(where: str, source: str, asked: Sequence[Kernel]) -> str:
    """DeepGEMM's name for a kernel: that of the kernels in ``asked`` with the same template and GemmType."""
    family = sources.family(source)
    names = sorted({kernel.name for kernel in asked if kernel.family == family})
    if len(names) != 1:
        described = " ".join(filter(None, family)) or "a kernel of no known template"
        raise PlanError(
            f"{where}: DeepGEMM's name for {described} is unknown: wanted one name among planned kernels of its kind, "
            f"found {names or 'none'}",
            hint="give the name as kernel: NAME, or add an op that asks for such kernels",
        )
    return names[0]


def _check(where: str, source: str, asked: Sequence[Kernel], legacy: bool) -> None:
    """Raise `PlanError` if a source is for another architecture, or for other headers.

    A legacy source begins with a hash of the headers, which must be that of the kernels with the same includes.
    """
    template, target_arch = sources.kernel_template(source) or "", asked[0].arch or ""
    template_arch = re.match(r"sm(\d+)_", template)
    if template_arch and not target_arch.startswith(f"sm_{template_arch[1][:-1]}"):
        raise PlanError(f"{where}: wanted a kernel for {target_arch}, found {template}")
    if not legacy:
        return
    headers_hash, _, body = source.partition("\n")
    for kernel in asked:
        asked_hash, _, asked_body = kernel.source.partition("\n")
        if sources.includes(asked_body) == sources.includes(body) and asked_hash != headers_hash:
            raise PlanError(
                f"{where}: a DeepGEMM with other headers wrote it: wanted {asked_hash!r}, found {headers_hash!r}",
                hint="remove this source: the DeepGEMM that serves now would not ask for it",
            )
