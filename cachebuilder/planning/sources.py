"""Plan the kernels that a manifest gives as source text, with keys computed by DeepGEMM's own formula."""

from __future__ import annotations

import re
from collections.abc import Sequence

from cachebuilder.deepgemm import entries as entry_files
from cachebuilder.deepgemm import source as deepgemm_source
from cachebuilder.errors import PlanError
from cachebuilder.manifest.inputs import Inputs
from cachebuilder.planning.plan import Kernel
from cachebuilder.planning.requests import Requests


class Sources:
    """The kernels of a manifest's ``sources``, with their keys computed as DeepGEMM computes them.

    DeepGEMM names and compiles such a kernel like the requested kernels of the same family, so its name and its flags
    come from those.
    """

    def __init__(self, inputs: Inputs, requests: Requests) -> None:
        self._inputs = inputs
        self._requested = requests.kernels
        self._planned = requests.planned
        self._legacy_flags = requests.legacy_flags

    def entry(self, name: str, source: str) -> str:
        """The name of the entry's folder. Raises OSError if a header that the source includes cannot be read."""
        toolchain, installation = self._inputs.toolchain, self._inputs.installation
        if self._legacy_flags is not None:
            return entry_files.legacy_entry(name, toolchain.release, self._legacy_flags, source.encode())
        return entry_files.deepjit_entry(
            name,
            toolchain.version_text,
            installation.cutlass_version,
            self._requested[0].flags,
            source,
            installation.include,
        )

    def check_formula(self, kernels: Sequence[Kernel], hint: str | None = None) -> None:
        """Raise `PlanError` if DeepGEMM gave one of ``kernels`` another name than `entry` does."""
        for kernel in kernels:
            computed = self.entry(kernel.name, kernel.source)
            if computed != kernel.entry:
                raise PlanError(
                    f"this DeepGEMM does not follow the formula of the {self._inputs.installation.generation} key: "
                    f"wanted {computed}, found {kernel.entry}",
                    hint=hint,
                )

    def kernels(self) -> list[Kernel]:
        """The kernels of the sources that the manifest's ops do not ask for.

        Raises:
            PlanError: a source's name or key cannot be computed, or the source is for another architecture or for
                other headers.
        """
        planned_sources = {kernel.source for kernel in self._planned}
        sources = [(n, s) for n, s in enumerate(self._inputs.manifest.sources) if s.source not in planned_sources]
        if not sources:
            return []
        example = self._requested[0]
        self.check_formula([example], "leave sources out of the manifest and give the ops that ask for these kernels")
        other_flags = sorted({" ".join(kernel.flags) for kernel in self._requested if kernel.flags != example.flags})
        if other_flags:
            raise PlanError(
                "sources cannot be planned: wanted the same flags for all kernels, "
                f"found {' '.join(example.flags)} and {other_flags}"
            )
        kernels = []
        for number, item in sources:
            where = f"sources[{number}]"
            name = item.kernel or self._name_of(where, item.source)
            self._check(where, item.source)
            try:
                entry = self.entry(name, item.source)
            except OSError as error:
                raise PlanError(f"{where}: includes {error.filename}, which this DeepGEMM does not have") from None
            # The example's meta.json fits: it holds the compiler and its options, and nothing about the kernel itself.
            update = {"entry": entry, "name": name, "source": item.source, "selected_by": ()}
            kernels.append(example.model_copy(update=update))
        return kernels

    def _name_of(self, where: str, source: str) -> str:
        """DeepGEMM's name for a kernel: that of the requested kernels with the same template and GemmType."""
        family = deepgemm_source.family(source)
        names = sorted({kernel.name for kernel in self._requested if kernel.family == family})
        if len(names) != 1:
            described = " ".join(filter(None, family)) or "a kernel of no known template"
            raise PlanError(
                f"{where}: DeepGEMM's name for {described} is unknown: wanted one name among planned kernels of its "
                f"kind, found {names or 'none'}",
                hint="give the name as kernel: NAME, or add an op that asks for such kernels",
            )
        return names[0]

    def _check(self, where: str, source: str) -> None:
        """Raise `PlanError` if a source is for another architecture, or for other headers.

        A legacy source begins with a hash of the headers, which must be that of the kernels with the same includes.
        """
        template, target_arch = deepgemm_source.kernel_template(source) or "", self._requested[0].arch or ""
        template_arch = re.match(r"sm(\d+)_", template)
        if template_arch and not target_arch.startswith(f"sm_{template_arch[1][:-1]}"):
            raise PlanError(f"{where}: wanted a kernel for {target_arch}, found {template}")
        if self._legacy_flags is None:
            return
        headers_hash, _, body = source.partition("\n")
        for kernel in self._requested:
            asked_hash, _, asked_body = kernel.source.partition("\n")
            if deepgemm_source.includes(asked_body) == deepgemm_source.includes(body) and asked_hash != headers_hash:
                raise PlanError(
                    f"{where}: a DeepGEMM with other headers wrote it: wanted {asked_hash!r}, found {headers_hash!r}",
                    hint="remove this source: the DeepGEMM that serves now would not ask for it",
                )
