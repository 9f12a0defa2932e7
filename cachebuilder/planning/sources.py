"""The kernels that a manifest gives as text, keyed by DeepGEMM's own formula."""

from __future__ import annotations

import re
from collections.abc import Sequence

from cachebuilder.deepgemm import entries as entry_files
from cachebuilder.deepgemm import source as sources
from cachebuilder.errors import PlanError
from cachebuilder.manifest.inputs import Inputs
from cachebuilder.planning.plan import Kernel


class KeyFormula:
    """A kernel's key as DeepGEMM computes it, for one DeepGEMM, one compiler and one set of flags.

    Args:
        example: a kernel that DeepGEMM asked for: its flags are those of all others.
        legacy_flags: legacy only: the flags as DeepGEMM joins them.
    """

    def __init__(self, inputs: Inputs, example: Kernel, legacy_flags: str | None) -> None:
        self._inputs = inputs
        self._example = example
        self._legacy_flags = legacy_flags

    def entry(self, name: str, source: str) -> str:
        """The name of the entry's folder. Raises OSError where a header that the source includes cannot be read."""
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
        """Raises `PlanError` where DeepGEMM named one of ``kernels`` otherwise."""
        for kernel in kernels:
            computed = self.entry(kernel.name, kernel.source)
            if computed != kernel.entry:
                raise PlanError(
                    f"the formula of the {self._inputs.installation.generation} key does not hold for this DeepGEMM: "
                    f"wanted {computed}, found {kernel.entry}",
                    hint=hint,
                )


def from_sources(
    inputs: Inputs, asked: Sequence[Kernel], planned: Sequence[Kernel], formula: KeyFormula
) -> list[Kernel]:
    """The kernels of the manifest's ``sources`` that its ops do not ask for.

    DeepGEMM names and compiles them as it does the kernels of the same family in ``asked``, so these give the name and
    the flags.

    Args:
        asked: all that DeepGEMM asked for in the sweep.
        planned: those of them that the manifest's ops launch.

    Raises:
        PlanError: a source's name or key cannot be computed, or it is for another arch or for other headers.
    """
    covered = {kernel.source for kernel in planned}
    wanted = [(number, given) for number, given in enumerate(inputs.manifest.sources) if given.source not in covered]
    if not wanted:
        return []
    example = asked[0]
    formula.require_holds([example], "leave sources out of the manifest and give the ops that ask for these kernels")
    if others := sorted({" ".join(kernel.flags) for kernel in asked if kernel.flags != example.flags}):
        raise PlanError(
            f"sources cannot be planned: wanted one set of flags, found {' '.join(example.flags)} and {others}"
        )
    kernels = []
    for number, given in wanted:
        where = f"sources[{number}]"
        name = given.kernel or _name_of(where, given.source, asked)
        _check(where, given.source, asked, inputs.installation.generation == "legacy")
        try:
            entry = formula.entry(name, given.source)
        except OSError as error:
            raise PlanError(f"{where}: includes {error.filename}, which this DeepGEMM does not have") from None
        # The example's meta.json serves: it holds the compiler and its options and says nothing of the kernel itself.
        update = {"entry": entry, "name": name, "source": given.source, "selected_by": ()}
        kernels.append(example.model_copy(update=update))
    return kernels


def _name_of(where: str, source: str, asked: Sequence[Kernel]) -> str:
    """DeepGEMM's name for a kernel, from those in ``asked`` with the same template and GemmType."""
    family = sources.family(source)
    names = sorted({kernel.name for kernel in asked if kernel.family == family})
    if len(names) != 1:
        what = " ".join(filter(None, family)) or "a kernel of no known template"
        raise PlanError(
            f"{where}: cannot tell DeepGEMM's name for {what}: wanted one planned kernel of its kind, "
            f"found {names or 'none'}",
            hint="give the name as kernel: NAME, or add an op that asks for such kernels",
        )
    return names[0]


def _check(where: str, source: str, asked: Sequence[Kernel], legacy: bool) -> None:
    """Raises `PlanError` for a kernel of another arch, or of other headers, whose hash a legacy source begins with."""
    template, ours = sources.family(source)[0] or "", asked[0].arch or ""
    arch = re.match(r"sm(\d+)_", template)
    if arch and not ours.startswith(f"sm_{arch[1][:-1]}"):
        raise PlanError(f"{where}: wanted a kernel for {ours}, found {template}")
    if not legacy:
        return
    head, _, body = source.partition("\n")
    for kernel in asked:
        asked_head, _, asked_body = kernel.source.partition("\n")
        if sources.includes(asked_body) == sources.includes(body) and asked_head != head:
            raise PlanError(
                f"{where}: a DeepGEMM with other headers wrote it: wanted {asked_head!r}, found {head!r}",
                hint="take the source out: the DeepGEMM that serves now would not ask for it",
            )
